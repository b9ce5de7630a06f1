"""The training that the tests of other frameworks share."""

import jax
import numpy as np
import optax

import loha_jax


def trained(params, loss_fn):
    """Train an adapted tree by five steps of Adam, in which its loss falls and its base stays."""
    trainable, frozen = loha_jax.partition(params)
    tx = optax.adam(1e-2)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(lambda t: loss_fn(loha_jax.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    losses = []
    for _ in range(5):
        trainable, state, loss = step(trainable, state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    return loha_jax.combine(trainable, frozen)


def check_base_and_products(fn, params, before, *arguments, arrays_of=lambda tree: tree):
    """Assert that a tree has its base unchanged, and that `fn` runs on the factors."""
    jax.tree.map(np.testing.assert_array_equal, arrays_of(loha_jax.unload(params)), before)
    uses = str(loha_jax.explain(fn, params, *arguments))
    assert "factored" in uses
    assert "dense" not in uses
