"""Formats: nested codes and bit planes, parents, allocations, slices, and descriptions of packed checkpoints."""
