"""Parts of a GGUF file: types of tensors, their exact and nearest encoding, architectures, and vocabulary."""
