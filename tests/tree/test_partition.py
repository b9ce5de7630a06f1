import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)
CONFIG = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["head"], init_weights=False)


def tree():
    return {
        "q": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }


def test_partition_gives_factors_and_copies_and_combine_inverts_it():
    params = loha_jax.inject(tree(), CONFIG, key=KEY)
    trainable, frozen = loha_jax.partition(params)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [
        (4, 2),
        (4, 2),
        (2, 3),
        (4, 2),
        (2, 3),
    ]
    again = loha_jax.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


def test_only_active_adapters_are_trained():
    params = loha_jax.inject(tree(), CONFIG, key=KEY)
    params = loha_jax.inject(
        params, LoHaConfig(r=1, target_modules=["q"]), key=KEY, adapter_name="other"
    )
    assert [x.shape for x in jax.tree.leaves(loha_jax.partition(params)[0])] == [
        (4, 1),
        (1, 3),
        (4, 1),
        (1, 3),
    ]
    both = loha_jax.set_adapter(params, ["default", "other"])
    assert len(jax.tree.leaves(loha_jax.partition(both)[0])) == 9
    with pytest.raises(ValueError, match="Nothing in this tree is trained"):
        loha_jax.partition(loha_jax.set_adapter(params, ()))
    with pytest.raises(ValueError, match="Adapter zzz not found"):
        loha_jax.set_adapter(params, "zzz")


def test_a_half_on_its_own_says_what_to_do():
    trainable, frozen = loha_jax.partition(loha_jax.inject(tree(), CONFIG, key=KEY))
    with pytest.raises(ValueError, match="one half of `partition`"):
        jnp.ones((2, 3)) @ trainable["q"]["kernel"]
    with pytest.raises(ValueError, match="one half of `partition`"):
        loha_jax.adapt(lambda p: p["q"]["kernel"].sum())(trainable)
    with pytest.raises(ValueError, match="Both halves hold"):
        loha_jax.combine(frozen, frozen)


def test_a_training_step_moves_every_factor_and_nothing_else():
    params = loha_jax.inject(tree(), CONFIG, key=KEY)
    trainable, frozen = loha_jax.partition(params)
    tx = optax.adamw(1e-2)

    def loss(trainable, x):
        p = loha_jax.combine(trainable, frozen)
        return ((x @ p["q"]["kernel"] + p["q"]["bias"]) @ p["head"]["kernel"]).sum()

    x = normal_array(0, (5, 3))
    updates, _ = tx.update(jax.grad(loss)(trainable, x), tx.init(trainable), trainable)
    after = loha_jax.combine(optax.apply_updates(trainable, updates), frozen)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, after)
    mask = loha_jax.trainable_mask(params)
    assert jax.tree.leaves(changed) == jax.tree.leaves(mask)


def test_the_mask_freezes_everything_else_under_optax():
    params = loha_jax.inject(tree(), CONFIG, key=KEY)
    mask = loha_jax.trainable_mask(params)
    frozen = jax.tree.map(lambda m: not m, mask)
    tx = optax.chain(
        optax.masked(optax.adamw(1e-2), mask), optax.masked(optax.set_to_zero(), frozen)
    )
    gradient = jax.grad(
        lambda p: (jnp.ones((2, 3)) @ p["q"]["kernel"] @ p["head"]["kernel"]).sum()
    )(params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    moved = jax.tree.map(lambda u, m: bool(np.abs(u).max() > 0) == m, updates, mask)
    assert all(jax.tree.leaves(moved))


def test_batch_norm_statistics_are_saved_but_not_trained():
    base = {
        "q": {"kernel": jnp.ones((3, 3))},
        "bn": {"scale": jnp.ones(3), "mean": jnp.zeros(3), "var": jnp.ones(3)},
    }
    params = loha_jax.inject(
        base, LoHaConfig(r=2, target_modules=["q"], modules_to_save=["bn"]), key=KEY
    )
    mask = loha_jax.trainable_mask(params)
    assert mask["bn"]["scale"].copies == {"default": True}
    assert mask["bn"]["mean"].copies == {"default": False}


def test_donating_the_trainable_half_leaves_the_frozen_half_alive():
    trainable, frozen = loha_jax.partition(loha_jax.inject(tree(), CONFIG, key=KEY))
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    for _ in range(2):
        trainable = step(trainable)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
