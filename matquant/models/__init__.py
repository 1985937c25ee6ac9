"""Models: loading a checkpoint, and running it block by block."""
