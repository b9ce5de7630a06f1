"""Tests on eight virtual CPU devices, in a process of their own.

Run them by `python -m pytest tests/devices`.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)  # an error where JAX has started with fewer
