"""`load_*` and `save_*`: from trees to files and back."""
