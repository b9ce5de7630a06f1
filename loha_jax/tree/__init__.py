"""Adapted leaves, and the functions from tree to tree."""
