"""`adapt(fn, adapter_index=ids)` against the rows one by one, each with its adapter merged."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

NAMES = ("french", "german", "legal")
KEY = jax.random.key(0)
AXES = (None, 0, 0)  # of `apply`


def product(p, x):
    return x @ p["q"]["kernel"]


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids, image):
        x = nn.Embed(11, 12, name="embed")(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, name="attention")(x)
        seen = nn.Conv(12, (3, 3), name="conv")(image).mean((1, 2))
        return {"logits": nn.Dense(5, name="head")(x + seen[:, None]), "loss": (x**2).mean()}


MODULE = Model()


def apply(params, ids, image):
    return MODULE.apply({"params": params}, ids, image)


def inputs(batch):
    ids = jax.random.randint(jax.random.key(1), (batch, 6), 0, 11)
    return ids, normal_array(2, (batch, 5, 5, 3))


def tree(names=NAMES, r=2, **kwargs):
    params = MODULE.init(KEY, *inputs(2))["params"]
    for n, name in enumerate(names):
        config = LoHaConfig(
            r=r,
            alpha=4 * r,
            target_modules=["query", "out", "embed", "conv"],
            modules_to_save=["head"],
            init_weights=False,
            **kwargs,
        )
        params = loha_jax.inject(params, config, key=jax.random.key(n), adapter_name=name)
    noise = np.random.default_rng(0)

    def add(x, m):
        return x + jnp.asarray(0.3 * noise.standard_normal(x.shape), x.dtype) if m else x

    params = loha_jax.set_adapter(params, names)
    return jax.tree.map(add, params, loha_jax.trainable_mask(params))


def one_by_one(params, index, *args):
    rows = []
    for row, n in enumerate(index):
        plain = (
            loha_jax.unload(params)
            if n == -1
            else loha_jax.merge(loha_jax.set_adapter(params, NAMES[n]))
        )
        rows.append(apply(plain, *(a[row : row + 1] for a in args)))
    return {
        "logits": jnp.concatenate([r["logits"] for r in rows]),
        "loss": jnp.stack([r["loss"] for r in rows]),
    }


@pytest.mark.parametrize("cp", [False, True])
def test_equals_the_rows_one_by_one(cp):
    params, index, args = tree(use_effective_conv2d=cp), [2, 0, -1, 1, 2], inputs(5)
    want = one_by_one(params, index, *args)
    assert np.ptp(np.asarray(want["loss"])) > 0.01  # the adapters differ
    eager = loha_jax.adapt(apply, adapter_index=jnp.array(index), in_axes=AXES)(params, *args)
    jitted = jax.jit(lambda p, i, *a: loha_jax.adapt(apply, adapter_index=i, in_axes=AXES)(p, *a))(
        params, jnp.array(index), *args
    )
    for got in (eager, jitted):
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5 * np.abs(value).max())


def test_one_row_decoding():
    """Fewer rows than ranks take another path through the factors."""
    base = {"q": {"kernel": normal_array(0, (24, 30))}}
    params = base
    for n, name in enumerate(NAMES):
        config = LoHaConfig(r=8, target_modules=["q"], init_weights=False)
        params = loha_jax.inject(params, config, key=jax.random.key(n), adapter_name=name)
    params = loha_jax.set_adapter(params, NAMES)
    x = normal_array(1, (3, 24))

    got = loha_jax.adapt(product, adapter_index=jnp.array([1, 1, 0]))(params, x)
    for row, name in enumerate(("german", "german", "french")):
        want = x[row] @ loha_jax.merge(loha_jax.set_adapter(params, name))["q"]["kernel"]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_gradients_reach_each_rows_own_adapter():
    params, index, args = tree(), jnp.array([0, 0, 2]), inputs(3)
    trainable, frozen = loha_jax.partition(params)

    def loss(apply_rows):
        def value(t):
            logits = apply_rows(loha_jax.combine(t, frozen), *args)["logits"]
            return (jnp.cos(jnp.arange(logits.size)).reshape(logits.shape) * logits).sum()

        return jax.jit(jax.grad(value))(trainable)

    got = loss(loha_jax.adapt(apply, adapter_index=index, in_axes=AXES))
    want = loss(lambda p, *a: one_by_one(p, index.tolist(), *a))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-4 * max(np.abs(w).max(), 1e-3))


def test_an_adapter_that_lacks_a_module_leaves_it_alone():
    base = {n: {"kernel": normal_array(0, (6, 6))} for n in "ab"}
    params = base
    for name, targets in (("both", ["a", "b"]), ("one", ["a"])):
        config = LoHaConfig(r=2, target_modules=targets, init_weights=False)
        params = loha_jax.inject(params, config, key=KEY, adapter_name=name)
    params = loha_jax.set_adapter(params, ["both", "one"])

    def fn(p, x):
        return x @ p["a"]["kernel"] @ p["b"]["kernel"]

    x = normal_array(0, (2, 6))
    got = loha_jax.adapt(fn, adapter_index=jnp.array([1, 0]))(params, x)
    for row, name in enumerate(("one", "both")):
        want = fn(loha_jax.merge(loha_jax.set_adapter(params, name)), x[row])
        np.testing.assert_allclose(got[row], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_no_weight_is_built():
    """Neither one per row nor one per adapter."""
    width, batch = 64, 8
    params = {"q": {"kernel": jax.ShapeDtypeStruct((width, width + 1), jnp.float32)}}
    for name in NAMES:
        params = loha_jax.inject(
            params, LoHaConfig(r=2, target_modules=["q"]), key=KEY, adapter_name=name
        )
    params = loha_jax.set_adapter(params, NAMES)

    x = jax.ShapeDtypeStruct((batch, 3, width), jnp.float32)

    def made(strategy):
        rows = jax.jit(
            lambda p, i, x: loha_jax.adapt(product, strategy=strategy, adapter_index=i)(p, x)
        )
        text = rows.lower(params, jax.ShapeDtypeStruct((batch,), jnp.int32), x).compile().as_text()
        return re.findall(
            rf"= f32\[(?:\d+,)?(?:{width},{width + 1}|{width + 1},{width})\]\S* (?!parameter)\w",
            text,
        )

    assert not made("auto")
    assert made("dense")  # the search finds them where they are


def test_an_index_out_of_range_is_an_error_or_nan():
    params, args = tree(), inputs(2)
    with pytest.raises(
        ValueError,
        match=r"adapter_index 3 is out of range: the tree has 3 active adapters \(0 to 2\)",
    ):
        loha_jax.adapt(apply, adapter_index=jnp.array([0, 3]), in_axes=AXES)(params, *args)
    for bad in (3, -2):
        got = jax.jit(
            lambda i: loha_jax.adapt(apply, adapter_index=i, in_axes=AXES)(params, *args)
        )(jnp.array([0, bad]))
        assert np.isfinite(got["logits"][0]).all()
        assert np.isnan(got["logits"][1]).all()


def test_bad_arguments():
    params, args = tree(), inputs(2)
    with pytest.raises(ValueError, match="one integer per row of the batch, got float32 of shape"):
        loha_jax.adapt(apply, adapter_index=jnp.ones(2))(params, *args)
    with pytest.raises(ValueError, match="No argument has a row for each of the 7 entries"):
        loha_jax.adapt(apply, adapter_index=jnp.zeros(7, int))(params, *args)
    with pytest.raises(ValueError, match="explain adapt\\(fn\\) without adapter_index"):
        loha_jax.explain(loha_jax.adapt(apply, adapter_index=jnp.zeros(2, int)), params, *args)
    with pytest.raises(ValueError, match="the arguments hold none"):
        loha_jax.adapt(apply, adapter_index=jnp.zeros(2, int), in_axes=AXES)(
            loha_jax.unload(params), *args
        )
    config = LoHaConfig(r=3, target_modules=["query"])
    params = loha_jax.inject(params, config, key=KEY, adapter_name="wide")
    params = loha_jax.set_adapter(params, ["french", "wide"])
    with pytest.raises(
        ValueError, match=r"adapters of attention.query differ in shape.*french.*wide"
    ):
        loha_jax.adapt(apply, adapter_index=jnp.zeros(2, int), in_axes=AXES)(params, *args)


def small(r=2):
    params = {"q": {"kernel": normal_array(0, (4, 4))}}
    for n, name in enumerate(NAMES):
        config = LoHaConfig(r=r, target_modules=["q"], init_weights=False)
        params = loha_jax.inject(params, config, key=jax.random.key(n), adapter_name=name)
    return loha_jax.set_adapter(params, NAMES)


def by_row(fn, index, in_axes, params, *args):
    """`fn` of each row alone, with that row's adapter merged; results along axis 0."""
    results = []
    for row, n in enumerate(index):
        merged = loha_jax.merge(loha_jax.set_adapter(params, NAMES[n]))
        own = [
            a if ax is None else jnp.take(a, jnp.array([row]), ax)
            for a, ax in zip(args, in_axes, strict=True)
        ]
        results.append(fn(merged, *own))
    return results


def positions(p, x, at):
    return (x * jnp.cos(at)[:, None]) @ p["q"]["kernel"]


def masked(p, x, mask):
    return jnp.einsum("ts,bsd->btd", mask, x) @ p["q"]["kernel"]


def noisy(p, x, key):
    return (x + jax.random.normal(key, x.shape)) @ p["q"]["kernel"]


B3 = normal_array(5, (3, 3, 4))
COINCIDENCES = {  # one of the arguments is as long as the batch by chance
    "positions": (positions, B3, jnp.arange(3.0)),
    "a square mask": (masked, B3, jnp.tril(jnp.ones((3, 3)))),
    "a raw key": (noisy, B3[:2], jnp.array([1, 2], jnp.uint32)),
    "a bias": (lambda p, x, b: x @ p["q"]["kernel"] + b, jnp.ones((4, 4)), jnp.arange(4.0)),
}


@pytest.mark.parametrize("case", COINCIDENCES)
def test_what_is_as_long_as_the_batch_by_chance(case):
    """An array that is as long as the batch by chance is refused or reported."""
    fn, x, other = COINCIDENCES[case]
    params, index = small(), [2, 0, 1, 2][: len(x)]
    with pytest.raises(ValueError, match=r"It is open which arguments.*in_axes=\(None, 0, 0\)"):
        loha_jax.adapt(fn, adapter_index=jnp.array(index))(params, x, other)
    _, first, second = fn.__code__.co_varnames[:3]
    for in_axes in ((None, 0, None), {first: 0, second: None}):
        got = loha_jax.adapt(fn, adapter_index=jnp.array(index), in_axes=in_axes)(params, x, other)
        want = jnp.concatenate(by_row(fn, index, (0, None), params, x, other))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_other_axes_trees_and_keyword_arguments():
    params, index = small(), [2, 0, 1]
    x = normal_array(7, (5, 3, 4))  # time first

    def fn(p, inputs, *, scale, flag=True):
        return {
            "y": inputs["x"] @ p["q"]["kernel"] * scale[None, :, None] + inputs["shift"],
            "n": scale.sum(),
        }

    scale, shift = jnp.array([1.0, 2.0, 3.0]), jnp.arange(4.0)
    rows = loha_jax.adapt(
        fn,
        adapter_index=np.array(index, np.uint8),
        in_axes={"inputs": {"x": 1, "shift": None}, "scale": np.int64(0)},
        out_axes={"y": -2, "n": 0},
    )
    got = rows(params, {"x": x, "shift": shift}, scale=scale, flag=True)
    want = by_row(
        lambda p, x, scale: fn(p, {"x": x, "shift": shift}, scale=scale),
        index,
        (1, 0),
        params,
        x,
        scale,
    )
    np.testing.assert_allclose(
        got["y"], jnp.concatenate([w["y"] for w in want], 1), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(got["n"], scale)


def test_one_array_with_the_batchs_size_needs_no_in_axes():
    params, index, x = small(), jnp.array([1, 0, 2]), B3[0]
    got = loha_jax.adapt(positions, adapter_index=index)(params, x[:, None], jnp.ones(1))
    assert got.shape == (3, 1, 4)
    assert loha_jax.adapt(positions, adapter_index=index[:0])(
        params, x[:0, None], jnp.ones(1)
    ).shape == (0, 1, 4)


def test_in_axes_that_do_not_fit():
    params, index = small(), jnp.array([1, 0, 2])

    def run(in_axes, *args, **kw):
        return loha_jax.adapt(positions, adapter_index=index, in_axes=in_axes, **kw)(*args)

    x, at = B3, jnp.arange(3.0)
    for in_axes, message in {
        (0, 0, None): r"p\['q'\]\['kernel'\] is adapted: it has no rows",
        (
            None,
            2,
            None,
        ): r"in_axes says 2 for x of shape \(3, 3, 4\): that axis does not hold the 3 rows",
        (None, 0): "one entry for each of the 3 positional arguments",
        (None, "x", None): "in_axes for x holds 'x'",
        (None, (0, 0), None): "in_axes for x: .* is no prefix of its tree",
        (None, None, None): "No argument has a row",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(in_axes, params, x, at)
    with pytest.raises(ValueError, match="in_axes names 'y', which is no argument"):
        run({"y": 0}, params, x, at)
    with pytest.raises(ValueError, match=r"out_axes says 3 for a result of shape \(1, 3, 4\)"):
        run((None, 0, None), params, x, at, out_axes=3)


def test_a_decomposed_stack_of_several_ranks():
    """A stack of modules with decomposed weights of several ranks."""
    config = loha_jax.LycorisConfig(
        r=2,
        alpha=4,
        rank_pattern={"l.1": 4},
        alpha_pattern={"l.1": 8},
        target_modules=["0", "1"],
        init_weights=False,
        weight_decompose=True,
    )
    base = {"l": {"kernel": normal_array(0, (2, 6, 6))}}
    params = loha_jax.inject(base, config, key=KEY, layouts={"l": "sio"}, names=lambda name: "l.{}")

    def fn(params, x):
        return jnp.einsum("bi,sio->bso", x, params["l"]["kernel"])

    x = normal_array(0, (3, 6))
    got = loha_jax.adapt(fn, adapter_index=[0, -1, 0], in_axes=(None, 0))(params, x)
    want = np.stack(
        [fn(p, x)[n] for n, p in enumerate((loha_jax.merge(params), base, loha_jax.merge(params)))]
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["variables", "tuple"])
def test_a_cache_beside_the_adapted_tree_is_no_weight(given):
    cache, x = jnp.arange(9.0).reshape(3, 3), jnp.ones((3, 2))
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    params = loha_jax.inject({"q": {"kernel": jnp.ones((2, 3))}}, config, key=KEY)

    def fn(state, x):
        params, cache = (state["params"], state["cache"]) if given == "variables" else state
        return x @ params["q"]["kernel"] + cache

    state, axes = (params, cache), (None, 0)
    if given == "variables":
        state, axes = {"params": params, "cache": cache}, {"params": None, "cache": 0}
    with pytest.raises(ValueError, match=rf"in_axes=\({re.escape(repr(axes))}, 0\)"):
        loha_jax.adapt(fn, adapter_index=[0, -1, 0])(state, x)
    got = loha_jax.adapt(fn, adapter_index=[0, -1, 0], in_axes=(axes, 0))(state, x)
    merged = loha_jax.merge(params)["q"]["kernel"]
    want = np.stack([x[0] @ merged, x[1] @ jnp.ones((2, 3)), x[2] @ merged]) + cache
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_keyword_arguments_are_proposed_by_name():
    params = loha_jax.inject(
        {"q": {"kernel": jnp.ones((2, 3))}}, LoHaConfig(r=2, target_modules=["q"]), key=KEY
    )
    fn = loha_jax.adapt(
        lambda p, x, y=0: x @ p["q"]["kernel"] + y, adapter_index=[0, -1], in_axes=(None, 0)
    )
    with pytest.raises(ValueError, match=r"in_axes=\{'p': None, 'x': 0, 'y': 0\}"):
        fn(params, jnp.ones((2, 2)), y=jnp.ones((2, 3)))
