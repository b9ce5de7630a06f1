"""The names in PEFT's files."""

PREFIX = "base_model.model."
"""The beginning of every key in PEFT's files."""

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
