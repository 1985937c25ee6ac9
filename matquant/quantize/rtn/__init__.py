"""Round to nearest."""
