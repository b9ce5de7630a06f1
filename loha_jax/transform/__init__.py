"""`adapt`, the transform that runs a function on factors."""
