import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)


def params_with(out=8, stack=(), **kwargs):
    config = LoHaConfig(r=2, target_modules=["q", "v"], init_weights=False, **kwargs)
    base = {name: {"kernel": jnp.zeros((*stack, 3, out))} for name in ("q", "v")}
    layouts = {"[qv]": "s" * len(stack) + "io"} if stack else None
    return loha_jax.inject(base, config, key=KEY, layouts=layouts)


def delta(params, name="q"):
    return np.asarray(loha_jax.merge(params)[name]["kernel"])


def test_without_dropout_the_tree_is_unchanged():
    params = params_with()
    dropped = loha_jax.dropout(params, KEY)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(dropped), strict=True)
    )


def test_rank_dropout():
    """Rank dropout drops outputs and scales the rest by out over kept."""
    params = params_with(rank_dropout=0.4)
    whole = delta(params)
    for seed in range(20):
        factor = delta(loha_jax.dropout(params, jax.random.key(seed))) / whole
        columns = factor[0]
        np.testing.assert_allclose(factor, np.broadcast_to(columns, factor.shape), rtol=1e-5)
        kept = (columns != 0).sum()
        np.testing.assert_allclose(columns[columns != 0], 8 / kept, rtol=1e-5)


def test_when_all_outputs_are_dropped_the_update_is_zero_not_nan():
    params = params_with(out=2, rank_dropout=0.9)
    results = [delta(loha_jax.dropout(params, jax.random.key(seed))) for seed in range(50)]
    assert np.isfinite(results).all()
    assert sum(not r.any() for r in results) > 25  # 0.81 of them


def test_module_dropout():
    """Module dropout drops everything or nothing without rescaling."""
    params = params_with(module_dropout=0.3)
    whole = delta(params)
    results = [delta(loha_jax.dropout(params, jax.random.key(seed))) for seed in range(200)]
    dropped = [not r.any() for r in results]
    assert all(d or np.array_equal(r, whole) for d, r in zip(dropped, results, strict=True))
    assert stats.binomtest(sum(dropped), 200, 0.3).pvalue > 1e-3


def test_rates_and_independence_over_steps_and_layers():
    params = params_with(out=500, rank_dropout=0.2)
    kept = {
        (name, seed): (delta(loha_jax.dropout(params, jax.random.key(seed)), name) != 0)[0]
        for name in "qv"
        for seed in (0, 1)
    }
    for mask in kept.values():
        assert stats.binomtest(int(mask.sum()), 500, 0.8).pvalue > 1e-3
    for a, b in ((("q", 0), ("v", 0)), (("q", 0), ("q", 1))):
        assert abs(np.corrcoef(kept[a], kept[b])[0, 1]) < 4 / np.sqrt(500)


def test_each_module_of_a_stack_has_its_own_draw():
    params = params_with(stack=(64,), module_dropout=0.5)
    dropped = ~delta(loha_jax.dropout(params, KEY)).any(axis=(1, 2))
    assert stats.binomtest(int(dropped.sum()), 64, 0.5).pvalue > 1e-3


def test_masks_are_reproducible_whatever_the_order_of_the_tree():
    params = params_with(rank_dropout=0.5)
    one = loha_jax.dropout(params, KEY)
    two = loha_jax.dropout({"v": params["v"], "q": params["q"]}, KEY)
    np.testing.assert_array_equal(delta(one), delta(two))


@pytest.mark.parametrize("cp", [False, True])
def test_convolutions_drop_output_channels_in_both_forms(cp):
    config = LoHaConfig(
        r=2, target_modules=["c"], init_weights=False, rank_dropout=0.5, use_effective_conv2d=cp
    )
    params = loha_jax.inject(
        {"c": {"kernel": jnp.zeros((3, 3, 4, 6))}}, config, key=KEY, layouts={"c": "kkio"}
    )
    factor = delta(loha_jax.dropout(params, KEY), "c") / delta(params, "c")
    np.testing.assert_allclose(factor, np.broadcast_to(factor[0, 0, 0], factor.shape), rtol=1e-4)
    assert 0 < (factor[0, 0, 0] != 0).sum() < 6
