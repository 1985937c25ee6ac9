"""The search for a width of each layer: allocations under a budget, from one parent."""
