"""Refinement: training of the whole model after quantizing, of the scales of single bit-widths or of the weights."""
