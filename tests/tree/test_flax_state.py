"""Adapted trees through `flax.serialization`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from one_kernel import BASE, adapted

import loha_jax


def saved_too():
    return adapted(
        base={"q": BASE["q"], "head": {"kernel": jnp.ones((4, 2))}}, modules_to_save=["head"]
    )


TREES = {
    "tree": saved_too,
    "trainable": lambda: loha_jax.partition(saved_too())[0],
    "frozen": lambda: loha_jax.partition(saved_too())[1],
    "optimizer": lambda: optax.adam(1e-3).init(loha_jax.partition(saved_too())[0]),
    "train state": lambda: TrainState.create(
        apply_fn=None, params=loha_jax.partition(saved_too())[0], tx=optax.adam(1e-3)
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_flax_serialization_round_trip(name):
    tree = TREES[name]()
    noisy = jax.tree.map(lambda x: x + jnp.ones_like(x), tree)
    for back in (
        serialization.from_bytes(tree, serialization.to_bytes(noisy)),
        serialization.from_state_dict(tree, serialization.to_state_dict(noisy)),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(
            tree if name != "train state" else back
        )
        for one, other in zip(jax.tree.leaves(noisy), jax.tree.leaves(back), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "other", [{"r": 3}, {"target_modules": ["head"]}, {"init_weights": True}], ids=str
)
def test_flax_serialization_refuses_another_structure(other):
    base = {"q": BASE["q"], "head": {"kernel": jnp.ones((4, 2))}}
    held = adapted(base=base, **other)  # without `modules_to_save`
    with pytest.raises(ValueError, match=r"the state has"):
        serialization.from_bytes(saved_too(), serialization.to_bytes(held))
    trainable, frozen = loha_jax.partition(saved_too())
    with pytest.raises(ValueError, match="partition"):
        serialization.from_bytes(frozen, serialization.to_bytes(trainable))


def test_flax_may_be_imported_before_or_after():
    for order in ("loha_jax, flax.serialization", "flax.serialization, loha_jax"):
        code = (
            f"import {order}\nimport jax.numpy as jnp, jax\n"
            "params = loha_jax.inject({'q': {'kernel': jnp.ones((2, 2))}},\n"
            "    loha_jax.LoHaConfig(target_modules=['q']), key=jax.random.key(0))\n"
            "flax.serialization.from_bytes(params, flax.serialization.to_bytes(params))\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
