"""Models: loading of a checkpoint, and block-by-block execution."""
