"""GPTQ and its extension to all bit-widths of the objective."""
