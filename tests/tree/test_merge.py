import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)


def two_adapters():
    base = {"q": {"kernel": normal_array(0, (3, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
    one = LoHaConfig(
        r=2, alpha=3, target_modules=["q"], modules_to_save=["head"], init_weights=False
    )
    two = LoHaConfig(r=1, alpha=5, target_modules=["q"], init_weights=False)
    params = loha_jax.inject(base, one, key=KEY, adapter_name="one")
    return base, loha_jax.inject(params, two, key=jax.random.key(1), adapter_name="two")


def update(leaf, name):
    f = leaf.adapters[name]
    w1 = np.asarray(f.hada_w1_a, np.float64) @ np.asarray(f.hada_w1_b, np.float64)
    w2 = np.asarray(f.hada_w2_a, np.float64) @ np.asarray(f.hada_w2_b, np.float64)
    return (w1 * w2).T * f.alphas[0] / f.ranks[0]


def test_merge_adds_the_active_or_the_named_adapters():
    base, params = two_adapters()
    kernel = np.asarray(base["q"]["kernel"], np.float64)
    leaf = params["q"]["kernel"]
    for adapters, active, wanted in (
        (None, ("two",), ("two",)),
        (None, ("one", "two"), ("one", "two")),
        (None, (), ()),
        (["one"], ("two",), ("one",)),
        ([], ("two",), ()),
    ):
        merged = loha_jax.merge(loha_jax.set_adapter(params, active), adapters)["q"]["kernel"]
        np.testing.assert_allclose(
            merged, kernel + sum(update(leaf, n) for n in wanted), rtol=1e-5, atol=1e-6
        )


def test_merge_takes_the_trained_copy_and_unload_the_original():
    base, params = two_adapters()
    params = loha_jax.set_adapter(params, "one")
    trained = jax.tree.map(lambda x, m: x + 1 if m else x, params, loha_jax.trainable_mask(params))
    np.testing.assert_array_equal(
        loha_jax.merge(trained)["head"]["kernel"], base["head"]["kernel"] + 1
    )
    plain = loha_jax.unload(trained)
    assert plain["q"]["kernel"] is base["q"]["kernel"]
    assert plain["head"]["kernel"] is base["head"]["kernel"]
    assert (
        jax.tree.structure(plain)
        == jax.tree.structure(base)
        == jax.tree.structure(loha_jax.merge(trained))
    )


def test_safe_merge_names_the_broken_module():
    _, params = two_adapters()
    broken = jax.tree.map(
        lambda x, m: x * jnp.nan if m else x, params, loha_jax.trainable_mask(params)
    )
    with pytest.raises(ValueError, match="NaNs or infinities detected in the merged weights of q"):
        loha_jax.merge(broken, safe=True)
    assert loha_jax.merge(params, safe=True)


def test_merge_checks_names():
    _, params = two_adapters()
    with pytest.raises(TypeError, match="adapters should be a list of strings, got 'one'"):
        loha_jax.merge(params, "one")
    with pytest.raises(ValueError, match=r"Adapter zzz not found\. The tree has: one, two"):
        loha_jax.merge(params, ["zzz"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_bases_are_rounded_once(dtype):
    base = {"q": {"kernel": normal_array(0, (16, 16), dtype)}}
    params = loha_jax.inject(
        base, LoHaConfig(r=4, target_modules=["q"], init_weights=False), key=KEY
    )
    leaf = params["q"]["kernel"]
    exact = np.asarray(base["q"]["kernel"], np.float32) + np.asarray(
        update(leaf, "default"), np.float32
    )
    merged = np.asarray(loha_jax.merge(params)["q"]["kernel"], np.float32)
    step = np.float32(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(merged, exact, rtol=step / 2 * 1.001, atol=1e-7)


def test_summary_counts_as_peft_does():
    _, params = two_adapters()
    text = str(loha_jax.summary(loha_jax.set_adapter(params, "one")))
    # base 12 + 8, adapter one 2*2*(3+4) and its copy 8, adapter two 2*1*7
    assert "trainable params: 36 || all params: 70 || trainable%: 51.4286" in text
    assert "3x4" in text


def test_merging_into_float8_says_what_rounding_loses():
    kernel = (4 * normal_array(0, (16, 16))).astype(jnp.float8_e4m3fn)
    config = LoHaConfig(r=2, alpha=4, target_modules=["q"], init_weights=False)
    params = loha_jax.inject({"q": {"kernel": kernel}}, config, key=KEY)
    with pytest.warns(
        UserWarning, match=r"merged weight of q to float8 loses \d+% of the update"
    ) as warned:
        merged = loha_jax.merge(params, force=True)["q"]["kernel"]
    exact = update(params["q"]["kernel"], "default")
    lost = np.linalg.norm(np.asarray(merged, np.float64) - np.asarray(kernel, np.float64) - exact)
    assert f"loses {lost / np.linalg.norm(exact):.0%} of" in str(warned[0].message)
