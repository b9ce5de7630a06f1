"""Stacks of layers that are quantised again after a merge."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from qwix._src.core.qarray import HowToQuantize
from qwix._src.providers.ptq import WithAux
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_that_a_scan_has_stacked_are_quantised_one_by_one(axis):
    """What qwix notes of a kernel are the axes of one layer; the stack has one axis more."""
    how = HowToQuantize(qtype=jnp.int8, channelwise_axes=[1])
    quantise = jax.vmap(
        lambda w: WithAux(qwix.quantize(w, jnp.int8, channelwise_axes=[1]), how),
        in_axes=axis,
        out_axes=axis,
    )
    base = {"a": {"kernel": quantise(jnp.moveaxis(normal_array(0, (3, 8, 12)), 0, axis))}}
    config = LoHaConfig(r=2, alpha=8, target_modules=["a"], init_weights=False)
    layouts = {"a": ["sio", "iso"][axis]}
    params = loha_jax.inject(base, config, key=jax.random.key(1), layouts=layouts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the share that rounding loses
        again = loha_jax.merge(params, requantise=True)["a"]["kernel"]
    wanted = quantise(loha_jax.merge(params)["a"]["kernel"])
    assert jax.tree.structure(again) == jax.tree.structure(wanted)
    np.testing.assert_array_equal(again.array.qvalue, wanted.array.qvalue)
    np.testing.assert_allclose(again.array.scale, wanted.array.scale, rtol=1e-6)
