import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_trees import KEY, OPTIMIZERS, assert_same_bits, base, bits, dense, trained

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, checkpoint
from loha_jax.checkpoint import Checkpoints


@functools.cache
def everything():
    """Stacks of unequal rank, cores, a weight decomposition, a scalar, copies, two adapters.

    One of the adapters is scaled.
    """
    config = LycorisConfig(
        r=2,
        alpha=3,
        target_modules=["q", "conv"],
        use_effective_conv2d=True,
        weight_decompose=True,
        use_scalar=True,
        rank_pattern={"layers.1.q": 3},
        modules_to_save=["head"],
    )
    layouts = {"layers.q": "sio"}
    params = loha_jax.inject(base(), config, key=KEY, layouts=layouts, adapter_name="first")
    second = LoHaConfig(r=1, target_modules=["q", "sub"], init_weights=False)
    params = loha_jax.inject(
        params, second, key=jax.random.key(1), layouts=layouts, adapter_name="second"
    )
    return loha_jax.scale(loha_jax.set_adapter(params, ("first", "second")), {"second": 0.25})


TREES = {"dense": dense, "everything": everything}


KEYS = {
    "typed": jax.random.key(7),
    "raw": jax.random.PRNGKey(7),
    "several": jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "none": None,
}


@pytest.mark.parametrize(
    ("kind", "optimizer"), [*(("dense", name) for name in OPTIMIZERS), ("everything", "adamw")]
)
def test_everything_comes_back_bit_for_bit(tmp_path, kind, optimizer):
    fresh = TREES[kind]()
    tx = OPTIMIZERS[optimizer]
    params, opt_state = trained(fresh, tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            5,
            params,
            opt_state,
            data={"file": "a", "at": [1, 2.5, None]},
            metrics={"loss": jnp.float32(0.5)},
        )
        restored = checkpoints.restore(fresh, tx.init(loha_jax.partition(fresh)[0]))
    assert (restored.step, restored.data, restored.metrics) == (
        5,
        {"file": "a", "at": [1, 2.5, None]},
        {"loss": 0.5},
    )
    assert_same_bits(restored.params, params)
    assert_same_bits(restored.opt_state, opt_state)
    for leaf, given in zip(jax.tree.leaves(restored.params), jax.tree.leaves(fresh), strict=True):
        if any(given is x for x in jax.tree.leaves(base_of(fresh))):
            assert leaf is given


def base_of(params):
    return [
        leaf.kernel if isinstance(leaf, loha_jax.LoHaWeight) else getattr(leaf, "original", leaf)
        for leaf in jax.tree.leaves(
            params, is_leaf=lambda x: isinstance(x, loha_jax.LoHaWeight | loha_jax.SavedWeight)
        )
    ]


@pytest.mark.parametrize("kind", KEYS)
def test_keys_give_the_same_draws(tmp_path, kind):
    checkpoint.save(tmp_path, dense(), key=KEYS[kind])
    restored = checkpoint.restore(tmp_path, dense()).key
    if KEYS[kind] is None:
        assert restored is None
    else:
        assert bits(restored) == bits(KEYS[kind])


def test_odd_arrays_in_an_optimizer_state(tmp_path):
    """Arrays of numpy numbers and empty arrays in an optimizer state."""
    state = {
        "numpy": np.arange(3.0),
        "int": 3,
        "float": math.nan,
        "bool": True,
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }
    state |= {
        "scalar": np.float64(0.1),
        "narrow": jnp.arange(3, dtype=jnp.int4),
        "key": jax.random.key(3),
    }
    checkpoint.save(tmp_path, dense(), state)
    fresh = {**state, "numpy": np.zeros(3), "int": 0, "narrow": jnp.zeros(3, jnp.int4), "key": KEY}
    restored = checkpoint.restore(tmp_path, dense(), fresh).opt_state
    assert math.isnan(restored.pop("float"))
    assert math.isnan(state.pop("float"))
    assert_same_bits(restored, state)


def test_the_given_tree_says_the_dtype_and_may_be_shapes(tmp_path):
    params, _ = trained(dense(), OPTIMIZERS["adamw"])
    checkpoint.save(tmp_path, params)
    trainable, frozen = loha_jax.partition(dense())
    half = loha_jax.combine(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), trainable), frozen
    )
    restored = loha_jax.partition(checkpoint.restore(tmp_path, half).params)[0]
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loha_jax.partition(params)[0])
    assert_same_bits(jax.tree.leaves(restored), jax.tree.leaves(expected))


def test_the_base_is_never_written(tmp_path):
    width, r = 1024, 4
    draw = np.random.default_rng(0).normal
    params = {
        f"layer{n}": {"kernel": draw(size=(width, width)).astype(np.float32)} for n in range(4)
    }
    params = loha_jax.inject(params, LoHaConfig(r=r, target_modules="all-linear"), key=KEY)
    trainable, frozen = loha_jax.partition(params)
    trainable, mu, nu = (
        jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), trainable)
        for _ in range(3)
    )
    params, opt_state = (
        loha_jax.combine(trainable, frozen),
        optax.ScaleByAdamState(jnp.int32(3), mu, nu),
    )
    checkpoint.save(tmp_path, params, opt_state)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    factors = 4 * 4 * width * r * 4  # layers, factors, floats
    assert (
        0.7 * 3 * factors < on_disk < 3 * factors + 4 * 15_000
    )  # they and Adam's two moments, and a description
    assert sum(x.nbytes for x in base_of(params)) > 16 * factors
