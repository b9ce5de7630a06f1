"""Which kernels a config adapts."""
