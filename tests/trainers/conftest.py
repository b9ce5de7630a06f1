"""Tests of trainers, unmodified, in an environment and a process of their own.

`python run.py test-newest` makes the environment and runs them. Two virtual CPU devices stand for
the two meshes of reinforcement learning.
"""

import jax

jax.config.update("jax_num_cpu_devices", 2)  # an error where JAX has started with fewer

# google-tunix 0.1.7 and what it imports were written for earlier versions of JAX and Flax.
THEIR_WARNINGS = [
    r"ignore::DeprecationWarning:tunix\..*",
    "ignore:`with mesh.` context manager has been deprecated:DeprecationWarning",
    "ignore:'sharding' is deprecated, use 'out_sharding':DeprecationWarning",
    "ignore:optax.global_norm is deprecated:DeprecationWarning",
]


def pytest_configure(config):
    for line in THEIR_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
