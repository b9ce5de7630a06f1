"""PyTorch interop."""
