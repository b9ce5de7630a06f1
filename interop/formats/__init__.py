"""Adapter files, and what they say."""
