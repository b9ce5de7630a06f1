"""A base checkpoint with adapters merged in, streamed."""
