"""Several adapters in one tree, against sums of updates computed by the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, LoHaWeight, interop

KEY = jax.random.key(0)


def base():
    return {
        "q": {"kernel": normal_array(0, (3, 4)), "bias": jnp.zeros(4)},
        "conv": {"kernel": normal_array(1, (3, 2, 4, 5))},
        "layers": {"v": {"kernel": normal_array(2, (3, 4, 5))}},
        "head": {"kernel": jnp.ones((4, 2))},
    }


LAYOUTS = {"layers.v": "sio"}
CONFIGS = {
    "a": LoHaConfig(
        r=2, alpha=3, target_modules=["q", "conv"], modules_to_save=["head"], init_weights=False
    ),
    "b": LoHaConfig(
        r=3, alpha=6, target_modules=["conv", "v"], use_effective_conv2d=True, init_weights=False
    ),
    "c": LoHaConfig(
        r=1,
        alpha=2,
        target_modules=["q", "v"],
        rank_pattern={"layers.1.v": 2},
        exclude_modules=["layers.0.v"],
        init_weights=False,
    ),
}


def tree():
    params = base()
    for n, (name, config) in enumerate(CONFIGS.items()):
        params = loha_jax.inject(
            params, config, key=jax.random.key(n), adapter_name=name, layouts=LAYOUTS
        )
    random = np.random.default_rng(0)
    params = loha_jax.set_adapter(params, list(CONFIGS))
    mask = loha_jax.trainable_mask(params)
    # Products with what stands there: the padding of unequal ranks stays zero.
    return jax.tree.map(
        lambda x, m: x * random.normal(4, 1, x.shape).astype(np.float32) if m else x, params, mask
    )


def update(leaf, name):
    """ΔW of one adapter in the kernel's axes, by the formula."""
    f = leaf.adapters[name]
    a1, b1, a2, b2 = (
        np.asarray(x, np.float64) for x in (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
    )
    if f.is_cp:
        t1, t2 = np.asarray(f.hada_t1, np.float64), np.asarray(f.hada_t2, np.float64)
        one, two = (
            np.einsum("ijkl,jr,ip->klrp", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2))
        )
        return one * two * f.alphas[0] / f.ranks[0]
    delta = (a1 @ b1) * (a2 @ b2)
    ratio = np.array([a / r if r else 0 for a, r in zip(f.alphas, f.ranks, strict=True)])
    if leaf.ndim == 3:
        return np.swapaxes(delta, -1, -2) * ratio[:, None, None]
    delta = delta * ratio[0]
    return np.moveaxis(delta.reshape(5, 4, 3, 2), (0, 1), (3, 2)) if leaf.ndim == 4 else delta.T


def leaves(params):
    return {
        "q": params["q"]["kernel"],
        "conv": params["conv"]["kernel"],
        "v": params["layers"]["v"]["kernel"],
    }


def assert_weights(params, weights, bound=1e-5):
    """The merged kernels are the base's plus the weighted sum of the updates of `tree()`."""
    reference = tree()
    for key, leaf in leaves(reference).items():
        want = np.asarray(leaf.kernel, np.float64) + sum(
            w * update(leaf, n) for n, w in weights.items() if n in leaf.adapters
        )
        got = leaves(loha_jax.merge(params))[key]
        np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max(), err_msg=key)


@pytest.mark.parametrize("active", [(), ("a",), ("b", "c"), ("c", "a", "b"), ("a", "a")])
def test_active_adapters_are_summed_and_others_are_not(active):
    assert_weights(loha_jax.set_adapter(tree(), active), dict.fromkeys(active, 1))


def test_weights_scale_from_alpha_over_r_each_time():
    params = loha_jax.scale(tree(), {"a": 0.5, "c": -2})
    assert_weights(params, {"a": 0.5, "b": 1, "c": -2})
    assert_weights(loha_jax.scale(params, {"a": 3.0}), {"a": 3, "b": 1, "c": -2})
    back = loha_jax.scale(params, {"a": 1, "c": 1.0})
    jax.tree.map(np.testing.assert_array_equal, back, tree())


def test_weights_may_be_traced():
    x = jnp.ones((2, 3))
    run = jax.jit(
        lambda p, s: loha_jax.adapt(lambda p, x: x @ p["q"]["kernel"])(
            loha_jax.scale(p, {"a": s}), x
        )
    )
    want = x @ loha_jax.merge(loha_jax.scale(tree(), {"a": 0.25}))["q"]["kernel"]
    np.testing.assert_allclose(run(tree(), 0.25), want, rtol=1e-4, atol=1e-4)


def test_files_hold_alpha_and_not_the_weight(tmp_path):
    """PEFT's file has no place for the number of `scale`, as in PEFT; saving says so."""
    with pytest.warns(UserWarning, match=r"'a' is scaled by 0\.5.*add_weighted_adapter"):
        interop.save_peft(tmp_path, loha_jax.scale(tree(), {"a": 0.5}), adapters=["a"])
    loaded = interop.load_peft(tmp_path / "a", base(), layouts=LAYOUTS)
    assert loaded["q"]["kernel"].adapters["default"].scaling == 1.5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"zzz": 1.0}, "Adapter zzz not found. The tree has: a, b, c"),
        ({"a": float("nan")}, "the weight of a should be a finite number but is nan"),
        ({"a": "1"}, "the weight of a should be a finite number but is '1'"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        loha_jax.scale(tree(), weights)


def test_a_deleted_adapter_leaves_the_others_and_plain_arrays():
    params = tree()
    without = loha_jax.delete_adapter(params, "a")
    assert loha_jax.adapter_names(without) == ("b", "c")
    assert without["q"]["kernel"].active == ("b", "c")
    assert without["head"]["kernel"] is params["head"]["kernel"].original
    assert_weights(without, {"b": 1, "c": 1})
    plain = loha_jax.delete_adapter(loha_jax.delete_adapter(without, "b"), "c")
    assert jax.tree.structure(plain) == jax.tree.structure(base())
    assert all(
        x is y
        for x, y in zip(
            jax.tree.leaves(plain), jax.tree.leaves(loha_jax.unload(params)), strict=True
        )
    )
    with pytest.raises(ValueError, match="Adapter a not found"):
        loha_jax.delete_adapter(without, "a")


def test_deleting_the_only_active_adapter_leaves_the_base_active():
    without = loha_jax.delete_adapter(loha_jax.set_adapter(tree(), "b"), "b")
    assert_weights(without, {})
    with pytest.raises(ValueError, match="Nothing in this tree is trained"):
        loha_jax.partition(without)


@pytest.mark.parametrize(
    "weights", [{"a": 1.0, "b": 1.0}, {"c": -2.0, "a": 0.5}, {"c": 1.0, "a": 2.0, "b": 3.0}]
)
def test_a_weighted_sum_is_one_exact_adapter(weights, tmp_path):
    mixed = loha_jax.add_weighted_adapter(tree(), list(weights), list(weights.values()), "mix")
    assert_weights(mixed, weights)
    # It is an adapter like any other: PEFT's form holds it, and it comes back.
    interop.save_peft(tmp_path, mixed, adapters=["mix"])
    loaded = interop.load_peft(tmp_path / "mix", base(), layouts=LAYOUTS)
    assert_weights(loaded, weights)
    for mine, theirs in zip(leaves(mixed).values(), leaves(loaded).values(), strict=True):
        if isinstance(theirs, LoHaWeight):
            one, two = mine.adapters["mix"], theirs.adapters["default"]
            jax.tree.map(np.testing.assert_array_equal, one.tensors, two.tensors)
            assert one.config == two.config


def test_a_weighted_sum_takes_scaled_adapters_and_saved_modules():
    params = loha_jax.scale(tree(), {"a": 2.0})
    mixed = loha_jax.add_weighted_adapter(params, ["a", "c"], [0.5, 1.0], "mix")
    assert_weights(mixed, {"a": 1, "c": 1})
    assert mixed["head"]["kernel"].copies["mix"] is params["head"]["kernel"].copies["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "zzz"], [1, 1], "mix"), "Adapter zzz not found"),
        ((["a"], [1], "b"), "Adapter with name 'b' already exists"),
        ((["a"], [1], "x.y"), "An adapter's name is a string"),
        ((["a", "b"], [1], "mix"), "One weight per adapter"),
        (([], [], "mix"), "One weight per adapter"),
        ((["a", "a"], [1, 1], "mix"), "each adapter once"),
        ((["a"], [float("inf")], "mix"), "the weight of a should be a finite number"),
    ],
)
def test_bad_sums_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        loha_jax.add_weighted_adapter(tree(), *arguments)


def test_two_active_copies_of_one_module():
    """Two active copies of one module are an error where it is used."""
    params = loha_jax.inject(tree(), CONFIGS["a"], key=KEY, adapter_name="d", layouts=LAYOUTS)
    both = loha_jax.set_adapter(params, ["a", "d"])
    message = "Only one adapter at a time can replace head.weight, but a, d each hold a copy"
    for use in (
        lambda: loha_jax.merge(both),
        lambda: loha_jax.merge(params, ["a", "d"]),
        lambda: jnp.ones((1, 4)) @ both["head"]["kernel"],
        lambda: loha_jax.adapt(lambda p, x: x @ p["head"]["kernel"])(both, jnp.ones((1, 4))),
        lambda: loha_jax.add_weighted_adapter(params, ["a", "d"], [1, 1], "mix"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    loha_jax.merge(loha_jax.set_adapter(params, ["a", "b"]))  # b holds none


def test_merging_some_keeps_the_others_if_asked():
    params = tree()
    merged = loha_jax.merge(params, ["a"], unload=False)
    assert loha_jax.adapter_names(merged) == ("b", "c")
    assert merged["q"]["kernel"].active == (
        "b",
        "c",
    )  # PEFT's layers would drop the active ones here
    assert_weights(merged, {"a": 1, "b": 1, "c": 1})
    assert_weights(loha_jax.set_adapter(merged, "b"), {"a": 1, "b": 1})
    np.testing.assert_array_equal(merged["head"]["kernel"], params["head"]["kernel"].copies["a"])
    everything = loha_jax.merge(params, unload=False)
    assert jax.tree.structure(everything) == jax.tree.structure(base())
    jax.tree.map(np.testing.assert_array_equal, everything, loha_jax.merge(params))
