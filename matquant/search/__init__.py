"""Search for allocations: a bit-width for each layer of one parent, under a budget."""
