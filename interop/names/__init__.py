"""Which torch tensor each leaf is."""
