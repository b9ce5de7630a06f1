"""JAX's stricter modes, empty batches and unknown sizes.

The core of the library works under all of them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig

KEY = jax.random.key(0)
OWN = {"r": 2, "alpha": 4, "target_modules": ["q"], "init_weights": False}
DORA = LycorisConfig(**OWN, weight_decompose=True)
STRATEGIES = ("auto", "factored", "fused", "dense")


def conv(p, x):
    return jax.lax.conv_general_dilated(
        x, p["q"]["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scan(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["q"]["w"])[0]


# function, kernel's shape and layout, config, x's shape, x's shape with unknown sizes
CASES = {
    "product": (
        lambda p, x: jax.nn.gelu(x) @ p["q"]["w"],
        (8, 6),
        "io",
        LoHaConfig(**OWN),
        (2, 3, 8),
        "b, t, 8",
    ),
    "one row": (
        lambda p, x: x @ p["q"]["w"],
        (8, 6),
        "io",
        LoHaConfig(**OWN),
        (1, 1, 8),
        "b, 1, 8",
    ),
    "experts": (
        lambda p, x: jnp.einsum("eti,eio->eto", x, p["q"]["w"]),
        (3, 8, 6),
        "sio",
        LoHaConfig(**OWN),
        (3, 5, 8),
        "3, t, 8",
    ),
    "scan": (scan, (2, 8, 8), "sio", LoHaConfig(**OWN), (4, 8), "b, 8"),
    "norms": (lambda p, x: x @ p["q"]["w"], (8, 6), "io", DORA, (2, 3, 8), "b, t, 8"),
    "convolution": (conv, (3, 3, 4, 5), "kkio", LoHaConfig(**OWN), (2, 5, 6, 4), "b, h, 6, 4"),
    "cores": (
        conv,
        (3, 3, 4, 5),
        "kkio",
        LoHaConfig(**OWN, use_effective_conv2d=True),
        (2, 5, 6, 4),
        "b, h, 6, 4",
    ),
    "lookup": (
        lambda p, x: jnp.take(p["q"]["w"], x, axis=0),
        (10, 6),
        "oi",
        LoHaConfig(**OWN),
        (2, 3),
        "b, t",
    ),
    "lookup, vmap": (
        lambda p, x: jax.vmap(lambda i: p["q"]["w"][i])(x),
        (10, 6),
        "oi",
        LoHaConfig(**OWN),
        (4,),
        "b",
    ),
}


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def made(case, dtype=jnp.float32):
    fn, shape, layout, config, x_shape, _ = CASES[case]
    random = np.random.default_rng(0)
    base = {"q": {"w": jnp.asarray(random.standard_normal(shape), dtype)}}
    params = loha_jax.inject(base, config, key=KEY, layouts={"q": layout})

    def draw(x, m):
        return jnp.asarray(random.uniform(0.3, 0.9, x.shape), x.dtype) if m else x

    params = jax.tree.map(draw, params, loha_jax.trainable_mask(params))
    x = random.integers(0, 10, x_shape) if "lookup" in case else random.standard_normal(x_shape)
    return fn, params, jnp.asarray(x, jnp.int32 if "lookup" in case else dtype)


def weight(params):
    """W + ΔW in float64 from the formula (of a weight decomposition.

    Rescaled), for kernels that are one module.
    """
    leaf = params["q"]["w"]
    f, w = leaf.adapters["default"], np.asarray(leaf.kernel, np.float64)
    a1, b1, a2, b2 = (
        np.asarray(x, np.float64) for x in (f.hada_w1_a, f.hada_w1_b, f.hada_w2_a, f.hada_w2_b)
    )
    if f.is_cp:
        t1, t2 = np.asarray(f.hada_t1, np.float64), np.asarray(f.hada_t2, np.float64)

        def pair(t, a, b):
            return np.einsum("pqhw,po,qi->oihw", t, a, b)

        delta = pair(t1, a1, b1) * pair(t2, a2, b2)
    else:
        delta = (a1 @ b1) * (a2 @ b2)
    order = {"io": (1, 0), "oi": (0, 1), "sio": (0, 2, 1), "kkio": (3, 2, 0, 1)}[leaf.layout.word]
    whole = w.transpose(order) + 2 * delta.reshape(w.transpose(order).shape)
    if f.dora_scale is not None:
        whole *= np.asarray(f.dora_scale, np.float64) / np.linalg.norm(whole, axis=1, keepdims=True)
    return whole.transpose(np.argsort(order))


def expected(fn, params, x):
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(x, np.float64 if x.dtype != jnp.int32 else np.int32))
        return np.asarray(fn({"q": {"w": jnp.asarray(weight(params))}}, wide))


def loss(apply, params, x):
    trainable, frozen = loha_jax.partition(params)
    return jax.grad(lambda t: apply(loha_jax.combine(t, frozen), x).astype(jnp.float32).sum())(
        trainable
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_strategy_in_strict_modes(case, dtype):
    with strict():
        fn, params, x = made(case, dtype)
        outputs = [loha_jax.adapt(fn, strategy=s)(params, x) for s in STRATEGIES[1:]]
        outputs.append(fn(loha_jax.merge(params), x))
    want, bound = expected(fn, params, x), 2e-5 if dtype == jnp.float32 else 0.06
    for got in outputs:
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=0, atol=bound * np.abs(want).max()
        )


@pytest.mark.parametrize("case", ["product", "norms", "convolution"])
def test_gradients_in_strict_modes(case):
    fn, params, x = made(case)
    want = loss(lambda p, x: fn(loha_jax.merge(p), x), params, x)
    with strict():
        late = jax.jit(
            loha_jax.adapt(fn, strategy="factored")
        )  # derivatives of what is traced already
        found = [loss(late, params, x), loss(loha_jax.adapt(fn, strategy="fused"), params, x)]
    for got in found:
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-3 * np.abs(w).max())


def test_functions_of_trees_in_strict_modes():
    with strict():
        config = LoHaConfig(**OWN, rank_dropout=0.3, module_dropout=0.2)
        params = loha_jax.inject({"q": {"w": jnp.ones((8, 6), jnp.bfloat16)}}, config, key=KEY)
        dropped = loha_jax.dropout(params, jax.random.key(1))
        loha_jax.merge(
            loha_jax.apply_max_norm(loha_jax.scale(dropped, {"default": np.float32(0.5)}), 0.1)
        )
        two = loha_jax.inject(params, config, key=jax.random.key(2), adapter_name="two")
        mixed = loha_jax.add_weighted_adapter(
            two, ["default", "two"], np.array([0.5, 0.5], np.float32), "mix"
        )
        both = loha_jax.set_adapter(two, ["default", "two"])
        x = jnp.ones((3, 8), jnp.bfloat16)

        def fn(p, x):
            return x @ p["q"]["w"]

        rows = loha_jax.adapt(fn, adapter_index=jnp.array([1, -1, 0]))(both, x)
        loha_jax.explain(fn, both, x)
        assert loha_jax.adapt(fn)(mixed, x).shape == rows.shape == (3, 6)
    want = np.stack(
        [
            np.asarray(fn(loha_jax.merge(loha_jax.set_adapter(two, n)), x[0]))
            for n in ("two", "default")
        ]
    )
    np.testing.assert_allclose(
        np.asarray(rows, np.float32)[[0, 2]], np.asarray(want, np.float32), rtol=0.03
    )
    np.testing.assert_array_equal(np.asarray(rows[1], np.float32), 8)


@pytest.mark.parametrize("case", CASES)
def test_empty_batches(case):
    fn, params, x = made(case)
    x = x[:, :0] if case == "experts" else x[:0]
    shape = fn(loha_jax.unload(params), x).shape
    for strategy in STRATEGIES:
        assert jax.eval_shape(loha_jax.adapt(fn, strategy=strategy), params, x).shape == shape
        str(loha_jax.explain(fn, params, x, strategy=strategy))
    for leaf in jax.tree.leaves(loss(loha_jax.adapt(fn), params, x)):
        assert not np.asarray(leaf).any()
    if case == "product":
        assert loha_jax.adapt(fn, adapter_index=jnp.zeros(0, int))(params, x).shape == shape


@pytest.mark.parametrize("case", CASES)
def test_exported_with_unknown_sizes(case):
    fn, params, x = made(case)
    unknown = jax.ShapeDtypeStruct(export.symbolic_shape(CASES[case][-1]), x.dtype)
    want = expected(fn, params, x)
    for strategy in STRATEGIES[1:]:
        exported = export.export(jax.jit(loha_jax.adapt(fn, strategy=strategy)))(params, unknown)
        np.testing.assert_allclose(
            exported.call(params, x), want, rtol=0, atol=2e-5 * np.abs(want).max()
        )
    str(loha_jax.explain(fn, params, unknown))


def test_exported_functions_are_written_and_read():
    """Exported functions are written and read with the tree as argument."""
    pytest.importorskip("flatbuffers")  # jax.export writes with it
    base = {name: {"w": normal_array(n, (8, 8))} for n, name in enumerate(("q", "k", "head"))}
    config = LoHaConfig(
        r=2,
        target_modules=["q"],
        modules_to_save=["head"],
        rank_pattern={"q": 3},
        init_weights=False,
    )
    params = loha_jax.inject(base, config, key=KEY)
    other = LycorisConfig(
        r=2, target_modules=["k"], metadata={"ss_note": "x"}, weight_decompose=True
    )
    params = loha_jax.inject(params, other, key=KEY, adapter_name="two")
    params = loha_jax.set_adapter(params, ["default", "two"])

    def fn(p, x):
        return (x @ p["q"]["w"] + x @ p["k"]["w"]) @ p["head"]["w"]

    unknown = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8"), jnp.float32)
    written = export.export(jax.jit(loha_jax.adapt(fn)))(params, unknown).serialize()
    read, x = export.deserialize(written), normal_array(0, (3, 8))
    assert read.in_tree == jax.tree.structure(((params, x), {}))
    want = fn(loha_jax.merge(params), x)
    np.testing.assert_allclose(read.call(params, x), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_numpys_numbers_are_numbers():
    given = {
        "r": np.int64(4),
        "alpha": np.float32(8),
        "rank_dropout": jnp.float32(0.25),
        "rank_pattern": {"q": np.int32(2)},
        "layers_to_transform": [np.int64(0), np.int64(1)],
        "use_effective_conv2d": np.bool_(True),
    }
    plain = {"r": 4, "alpha": 8.0, "rank_dropout": 0.25, "rank_pattern": {"q": 2}}
    plain |= {"layers_to_transform": [0, 1], "use_effective_conv2d": True}
    assert LoHaConfig(**given).to_json() == LoHaConfig(**plain).to_json()
    assert LoHaConfig(layers_to_transform=np.arange(2)) == LoHaConfig(layers_to_transform=[0, 1])
    _, params, _ = made("product")
    for half in (0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        scaled = loha_jax.scale(params, {"default": half})["q"]["w"].dense()
        kernel = params["q"]["w"].kernel
        np.testing.assert_allclose(
            scaled, kernel + (params["q"]["w"].dense() - kernel) / 2, rtol=0, atol=1e-6
        )


def test_an_integer_is_no_key():
    base, config = (
        {"q": {"w": jnp.ones((4, 4))}},
        LoHaConfig(r=2, target_modules=["q"], rank_dropout=0.5),
    )
    params = loha_jax.inject(base, config, key=jax.random.PRNGKey(0))
    for key, advice in (
        (0, r"got 0: use jax.random.key\(0\)"),
        (None, "got None"),
        (jnp.ones(2), "float32"),
        (jax.random.split(jax.random.key(0)), "key\\[0\\]"),
    ):
        with pytest.raises(TypeError, match=advice):
            loha_jax.inject(base, config, key=key)
        with pytest.raises(TypeError, match=advice):
            loha_jax.dropout(params, key)
