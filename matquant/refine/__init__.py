"""Refinement: scales of single bit-widths, trained end to end on the full-precision model's outputs."""
