"""Matryoshka post-training quantization of language models: one 8-bit parent, every slice a good model."""

__version__ = "0.1.0"
