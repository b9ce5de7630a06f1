"""`adapt` on quantised kernels: results and gradients are those of the dequantised float tree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.transform import forms
from tests.helpers.quantised_kernels import KEY, SCHEMES, float_and_quantised, quantised


def kernel(*shape, seed=0):
    return normal_array(seed, shape) / np.sqrt(shape[-2])


X = normal_array(9, (3, 8))


def config(*targets):
    return LoHaConfig(r=2, alpha=3, target_modules=list(targets), init_weights=False)


def assert_like_float(fn, params, targets, *args, layouts=None, strategy="auto", rtol=2e-5):
    """Compare value and factor gradients with those of the float tree, under jit."""
    trees = float_and_quantised(params, config(*targets), layouts)
    run = loha_jax.adapt(fn, strategy=strategy)

    def loss(trainable, frozen):
        result = run(loha_jax.combine(trainable, frozen), *args).astype(jnp.float32)
        return jnp.vdot(result, jnp.cos(jnp.arange(result.size)).reshape(result.shape)), result

    wanted, got = (
        jax.jit(jax.value_and_grad(loss, has_aux=True))(*loha_jax.partition(tree)) for tree in trees
    )
    pairs = [
        (wanted[0][1], got[0][1]),
        *zip(*map(jax.tree.leaves, (wanted[1], got[1])), strict=True),
    ]
    for want, have in pairs:
        size = np.abs(np.asarray(want, np.float32)).max()
        np.testing.assert_allclose(have, want, rtol=rtol, atol=rtol * size)
        assert want.dtype == have.dtype
    assert any(jnp.abs(g).max() > 0 for g in jax.tree.leaves(got[1]))


def chain(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


@pytest.mark.parametrize(
    ("scheme", "strategy"),
    [*((scheme, "factored") for scheme in SCHEMES), ("int8", "fused"), ("nf4", "dense")],
)
def test_dot(scheme, strategy):
    """One adapted kernel and one that is only quantised."""
    params = {
        "a": {"kernel": quantised(kernel(8, 12), scheme)},
        "b": {"kernel": quantised(kernel(12, 4, seed=1), scheme)},
    }
    assert_like_float(chain, params, ["a"], X, strategy=strategy)


@pytest.mark.parametrize("strategy", ["factored", "fused", "dense"])
def test_eager_calls_share_one_program(strategy):
    """Equal layers and later calls compile nothing more."""
    params = {
        name: {"kernel": quantised(kernel(8, 8, seed=seed), "int8")}
        for seed, name in enumerate("ab")
    }
    plain, packed = float_and_quantised(params, config("a", "b"))
    run = loha_jax.adapt(chain, strategy=strategy)
    wanted, before = run(plain, X), forms._compiled._cache_size()
    for _ in range(2):
        np.testing.assert_allclose(run(packed, X), wanted, rtol=2e-5, atol=2e-5)
    assert forms._compiled._cache_size() == before + 1


@pytest.mark.parametrize("scheme", ["int4", "nf4", "scaled_int8", "aqt"])
def test_scan_over_a_stack(scheme):
    """Two stacks, of which one is adapted, and a layer of a stack by its index."""

    def fn(p, x):
        def body(h, layer):
            return h + jnp.tanh(h @ layer["a"]["kernel"]) @ layer["b"]["kernel"], None

        h = jax.lax.scan(body, x, p)[0]
        return h @ p["a"]["kernel"][1]

    params = {
        "a": {"kernel": quantised(kernel(3, 8, 8), scheme, stacked=True)},
        "b": {"kernel": quantised(kernel(3, 8, 8, seed=1), scheme, stacked=True)},
    }
    assert_like_float(fn, params, ["a"], X, layouts={"a": "sio"})


def test_a_scale_that_all_layers_share():
    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["a"]["kernel"])[0]

    values = jnp.round(kernel(3, 8, 8) * 50).astype(jnp.int8)
    params = {"a": {"kernel": loha_jax.ScaledArray(values, jnp.full((1, 1, 1), 0.02))}}
    assert_like_float(fn, params, ["a"], X, layouts={"a": "sio"})


def test_einsum_with_several_axes():
    """The kernels of an attention, with more than one in or out axis."""
    params = {
        "q": {"kernel": quantised(kernel(8, 2, 4), "int8")},
        "o": {"kernel": quantised(kernel(2, 4, 8, seed=1), "int8")},
    }

    def fn(p, x):
        h = jnp.einsum("bi,inh->bnh", x, p["q"]["kernel"])
        return jnp.einsum("bnh,nho->bo", h, p["o"]["kernel"].astype(x.dtype))

    assert_like_float(fn, params, ["q", "o"], X, layouts={"q": "ioo", "o": "iio"})


def test_transposed_reshaped_scaled_and_split():
    params = {"a": {"kernel": quantised(kernel(8, 12), "int8")}}

    def fn(p, x):
        w = p["a"]["kernel"]
        q, k, v = jnp.split(w * 0.5, 3, axis=1)
        return (
            (x @ q) * (x @ k.T.T) + x @ v[::, ::-1] + (x @ w.reshape(8, 3, 4).reshape(8, 12))[:, :4]
        )

    assert_like_float(fn, params, ["a"], X)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "scaled_int8"])
def test_an_axis_with_blocks_is_cut(scheme):
    params = {"a": {"kernel": quantised(kernel(8, 4), scheme)}}
    assert_like_float(lambda p, x: x[:, 1:7] @ p["a"]["kernel"][1:7], params, ["a"], X)


def test_convolution():
    params = {"conv": {"kernel": quantised(kernel(3, 3, 4, 8), "int8"), "bias": jnp.ones(8)}}
    images = jax.random.normal(KEY, (2, 5, 5, 4))

    def fn(p, x):
        return nn.Conv(8, (3, 3)).apply({"params": p["conv"]}, x)

    assert_like_float(fn, params, ["conv"], images)


@pytest.mark.parametrize("scheme", ["int8", "scaled_int8"])
def test_embedding_lookup(scheme):
    table = quantised(kernel(10, 8), scheme)
    ids = jnp.array([[1, 3, 9], [0, 2, 2]])

    def fn(p, ids):
        return jnp.take(p["embed"]["embedding"], ids, axis=0) @ p["embed"]["embedding"].T

    assert_like_float(fn, {"embed": {"embedding": table}}, ["embed"], ids)


def test_vmap_remat_and_inner_jit():
    params = {
        "a": {"kernel": quantised(kernel(2, 8, 8), "int8", stacked=True)},
        "b": {"kernel": quantised(kernel(8, 8, seed=1), "int4")},
    }

    @jax.jit
    def inner(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        experts = jax.vmap(lambda w: x @ w)(p["a"]["kernel"])
        return jax.checkpoint(inner)(p["b"]["kernel"], experts.sum(0)) + inner(p["b"]["kernel"], x)

    assert_like_float(fn, params, ["a", "b"], X, layouts={"a": "sio"})


def test_while_and_cond():
    params = {"a": {"kernel": quantised(kernel(8, 8), "int8")}}

    def fn(p, x):
        def body(n, h):
            return jax.lax.cond(n % 2 == 0, lambda: jnp.tanh(h @ w), lambda: h @ w.T)

        w = p["a"]["kernel"]
        return jax.lax.fori_loop(0, 3, body, x)

    trees = float_and_quantised(params, config("a"))
    want, have = (jax.jit(loha_jax.adapt(fn))(tree, X) for tree in trees)
    np.testing.assert_allclose(have, want, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "scaled_int8"])
def test_bfloat16_input(scheme):
    """Linen's layers cast the kernel; the scale is float32, or bfloat16."""
    w = kernel(8, 12)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"a": {"kernel": quantised(w.astype(dtype), scheme)}}

        def fn(p, x):
            return nn.Dense(12, use_bias=False, dtype=jnp.bfloat16).apply({"params": p["a"]}, x)

        assert_like_float(fn, params, ["a"], X.astype(jnp.bfloat16), rtol=1e-2)


def test_outer_vmap_and_grad_of_the_input():
    params = {"a": {"kernel": quantised(kernel(8, 12), "int8")}}
    want, have = (
        jax.vmap(
            jax.grad(
                lambda x, tree=tree: (
                    loha_jax.adapt(lambda p, x: x @ p["a"]["kernel"])(tree, x) ** 2
                ).sum()
            )
        )(X)
        for tree in float_and_quantised(params, config("a"))
    )
    np.testing.assert_allclose(have, want, rtol=1e-5)


def test_forward_mode():
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "int8")},
        "b": {"kernel": quantised(kernel(12, 4), "int8")},
    }
    want, have = (
        jax.jvp(lambda x, tree=tree: loha_jax.adapt(chain, forward_mode=True)(tree, x), (X,), (X,))[
            1
        ]
        for tree in float_and_quantised(params, config("a"))
    )
    np.testing.assert_allclose(have, want, rtol=1e-5)


def test_an_adapter_per_row():
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "int8")},
        "b": {"kernel": quantised(kernel(12, 4), "int8")},
    }
    results = []
    for tree in float_and_quantised(params, config("a"), adapter_name="one"):
        both = loha_jax.inject(tree, config("a"), key=jax.random.key(5), adapter_name="two")
        both = loha_jax.set_adapter(both, ["one", "two"])
        index = jnp.array([1, -1, 0])
        results.append(loha_jax.adapt(chain, adapter_index=index)(both, X))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_tree_without_active_adapters():
    """adapt runs a float function on quantised kernels alone."""
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "int8")},
        "b": {"kernel": quantised(kernel(12, 4), "int4")},
    }
    want = chain(loha_jax.dequantise(params), X)
    np.testing.assert_allclose(loha_jax.adapt(chain)(params, X), want, rtol=1e-5)
    adapted = loha_jax.set_adapter(loha_jax.inject(params, config("a"), key=KEY), [])
    np.testing.assert_allclose(loha_jax.adapt(chain)(adapted, X), want, rtol=1e-5)


def test_as_an_array():
    """Without adapt, an adapted leaf is W + ΔW as for a float kernel."""
    want, have = float_and_quantised(
        {"a": {"kernel": quantised(kernel(8, 12), "nf4")}}, config("a")
    )
    np.testing.assert_allclose(X @ have["a"]["kernel"], X @ want["a"]["kernel"], rtol=1e-5)


def test_a_function_that_returns_its_parameters():
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "int8")},
        "b": {"kernel": quantised(kernel(12, 4), "int8")},
    }
    adapted = loha_jax.inject(params, config("a"), key=KEY)
    same = loha_jax.adapt(lambda p: p)(adapted)
    assert same["b"]["kernel"] is params["b"]["kernel"]
    assert jax.tree.structure(same) == jax.tree.structure(adapted)


def test_a_weight_decomposition():
    params = {"a": {"kernel": quantised(kernel(8, 12), "int8")}}
    options = loha_jax.LycorisConfig(
        r=2, target_modules=["a"], weight_decompose=True, init_weights=False
    )
    trees = float_and_quantised(params, options)
    want, have = (loha_jax.adapt(lambda p, x: x @ p["a"]["kernel"])(tree, X) for tree in trees)
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_layouts_and_explain():
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "int8")},
        "b": {"kernel": quantised(kernel(12, 4), "int8")},
    }
    assert loha_jax.infer_layouts(chain, params, X) == {"a": "io", "b": "io"}
    adapted = loha_jax.inject(params, config("a"), key=KEY)
    (use,) = loha_jax.explain(chain, adapted, X).uses
    assert (use.module, use.strategy) == ("a", "factored")


# --- memory ---------------------------------------------------------------------------------------

WIDTH, ROWS = 128, 4


def layers(count, scheme, scanned):
    if scheme is None:

        def make(w, stacked=False):
            return w
    else:

        def make(w, stacked=False):
            return quantised(w, scheme, stacked)

    if scanned:
        return {n: {"kernel": make(kernel(count, WIDTH, WIDTH), stacked=True)} for n in "ab"}
    return {f"{i}": {n: {"kernel": make(kernel(WIDTH, WIDTH))} for n in "ab"} for i in range(count)}


def temporary_bytes(count, scheme, scanned, strategy, dequantised=False):
    """Bytes that a training step holds besides its arguments and results."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["a"]["kernel"]) @ p["b"]["kernel"], None

    def fn(p, x):
        if scanned:
            return jax.lax.scan(layer, x, p)[0]
        for name in sorted(p):
            x, _ = layer(x, p[name])
        return x

    layouts = {".*": "sio"} if scanned else None
    params = loha_jax.inject(layers(count, scheme, scanned), config("a"), key=KEY, layouts=layouts)
    run = loha_jax.adapt(fn, strategy=strategy)

    def loss(trainable, frozen, x):
        params = loha_jax.combine(trainable, frozen)
        return (run(loha_jax.dequantise(params) if dequantised else params, x) ** 2).sum()

    step = jax.jit(jax.grad(loss)).lower(*loha_jax.partition(params), jnp.ones((ROWS, WIDTH)))
    return step.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("strategy", ["factored", "fused"])
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_one_layer_is_dequantised_at_a_time(scanned, strategy):
    """More layers add what they add on a float base, and never a float kernel."""
    kernel_bytes = 4 * WIDTH * WIDTH
    had, needed = (
        [temporary_bytes(count, scheme, scanned, strategy) for count in (1, 2, 8)]
        for scheme in (None, "scaled_int8")
    )
    for plain, quantised_base in zip(had, needed, strict=True):
        assert quantised_base < plain + 2 * kernel_bytes
    naive = temporary_bytes(8, "scaled_int8", scanned, strategy, dequantised=True)
    assert naive > needed[2] + 8 * kernel_bytes
