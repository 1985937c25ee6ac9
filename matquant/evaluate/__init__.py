"""Evaluation: perplexity, and divergence from the full-precision model, of every slice in one pass."""
