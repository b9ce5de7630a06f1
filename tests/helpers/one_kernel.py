"""A tree with one adapted kernel and its reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import loha_jax

RNG = np.random.default_rng(0)
BASE = {"q": {"kernel": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), "bias": jnp.zeros(4)}}
X = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)


def adapted(key=0, base=BASE, **fields):
    config = loha_jax.LoHaConfig(
        **{"r": 2, "alpha": 4, "target_modules": ["q"], "init_weights": False, **fields}
    )
    return loha_jax.inject(base, config, key=jax.random.key(key))


def forward(params, x):
    return x @ params["q"]["kernel"] + params["q"]["bias"]


def reference(kernel, tensors, scaling):
    """W + ΔW in float64, torch's orientation of the factors and an `io` kernel."""
    a1, b1, a2, b2 = (
        np.asarray(tensors[f"hada_w{n}_{s}"], np.float64) for n in (1, 2) for s in "ab"
    )
    return np.asarray(kernel, np.float64) + scaling * ((a1 @ b1) * (a2 @ b2)).T


def config_of(params):
    return params["q"]["kernel"].adapters["default"].config
