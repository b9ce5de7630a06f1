"""Files that are complete or absent; nothing about adapters."""
