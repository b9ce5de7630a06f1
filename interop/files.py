"""Safetensors files as numpy arrays of every dtype, bfloat16 and float8 too.

A public face of `loha_jax.interop.disk.tensor_files`, for scripts that look into files.
"""

from .disk.tensor_files import read_safetensors, safetensors_bytes

__all__ = ["read_safetensors", "safetensors_bytes"]
