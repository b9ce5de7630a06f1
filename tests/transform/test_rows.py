"""Lookups in an adapted table, in range and out of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pullbacks import adapted, normal

import loha_jax

IDS = jnp.array([1, 2, 12, -1, -13])
LOOKUPS = {
    "take, fill 7": lambda t: jnp.take(t, IDS, axis=0, mode="fill", fill_value=7.0),
    "take, NaN": lambda t: jnp.nan_to_num(jnp.take(t, IDS, axis=0), nan=5.0),
    "take, clip": lambda t: jnp.take(t, IDS, axis=0, mode="clip"),
    "take, wrap": lambda t: jnp.take(t, IDS, axis=0, mode="wrap"),
    "get, fill -1": lambda t: t.at[IDS].get(mode="fill", fill_value=-1.0),
    "get, promised": lambda t: t.at[jnp.arange(3)].get(mode="promise_in_bounds"),
    "get, fill inf": lambda t: t.at[IDS].get(mode="fill", fill_value=jnp.inf),
    "columns, fill 3": lambda t: jnp.take(t, IDS, axis=1, mode="fill", fill_value=3.0),
    "half the table, fill 7": lambda t: jnp.take(0.5 * t, IDS, axis=0, mode="fill", fill_value=7.0),
    "vmap": lambda t: jax.vmap(lambda i: t[i])(IDS),
    "vmap of vmap": lambda t: jax.vmap(jax.vmap(lambda i: t[i]))(IDS[None, :4]),
    "vmap, columns": lambda t: jax.vmap(lambda i: t[:, i])(IDS % 6),
    "vmap, take with fill": lambda t: jax.vmap(
        lambda i: jnp.take(t, i, axis=0, mode="fill", fill_value=7.0)
    )(IDS),
    "vmap, dynamic index": lambda t: jax.vmap(
        lambda i: jax.lax.dynamic_index_in_dim(t, i, keepdims=False)
    )(IDS),
    "vmap, a window": lambda t: jax.vmap(lambda i: jax.lax.dynamic_slice(t, (i, 0), (2, 6)))(IDS),
    "take_along_axis": lambda t: jnp.take_along_axis(t, IDS[:2, None], axis=0),
    "equinox": lambda t: jax.vmap(eqx.nn.Embedding(weight=t))(IDS[:2]),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_out_of_range_give_what_the_plain_table_gives(name):
    params = adapted({"q": {"embedding": normal(10, 6)}}, {"q": "oi"})

    def fn(p):
        return LOOKUPS[name](p["q"]["embedding"])

    got, want = loha_jax.adapt(fn)(params), fn(loha_jax.merge(params))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    uses = {use.strategy for use in loha_jax.explain(fn, params).uses}
    assert uses == {"dense" if name == "vmap, a window" else "rows"}
