"""`adapt(fn)` against `fn(merge(params))`, whose weights are plain arrays, in value and gradient."""

import re
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from pullbacks import BOUNDS, assert_equals_merged_in_float64

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)


def normal(*shape, seed=0, scale=1.0, dtype=jnp.float32):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def adapted(base, layouts=None, targets="all-linear", r=3, **kwargs):
    """`base` with a LoHa whose update is about as large as the weights."""
    config = LoHaConfig(r=r, alpha=2 * r, target_modules=targets, init_weights=True, **kwargs)
    params = loha_jax.inject(base, config, key=KEY, layouts=layouts)
    mask, random = loha_jax.trainable_mask(params), np.random.default_rng(8)
    draw = lambda x, m: jnp.asarray(0.6 * random.standard_normal(x.shape), x.dtype) if m else x  # noqa: E731
    return jax.tree.map(draw, params, mask)


def assert_close(got, want, bound):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        w = np.asarray(w, np.float64)
        np.testing.assert_allclose(
            np.asarray(g, np.float64), w, rtol=0, atol=bound * max(np.abs(w).max(), 1e-6)
        )


def check(fn, params, *args, strategies=("factored", "fused"), dense=(), plain=True):
    """Values to 2e-5 and gradients to 1e-3 of their largest entry; `dense` lists the primitives that form a weight."""
    trainable, frozen = loha_jax.partition(params)

    def value_and_gradient(apply):
        def loss(trainable):
            out = apply(loha_jax.combine(trainable, frozen), *args)
            return sum(
                (jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o).sum()
                for o in jax.tree.leaves(out)
            ), out

        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(trainable)
        (_, out), gradient = step.compile({"xla_backend_optimization_level": 0})(
            trainable
        )  # compiling takes longest
        return out, gradient

    expected, expected_gradient = value_and_gradient(lambda p, *a: fn(loha_jax.merge(p), *a))
    frozen_output = jax.jit(lambda p: fn(loha_jax.unload(p), *args))(params)
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(*map(jax.tree.leaves, (expected, frozen_output)), strict=True)
    ]
    assert max(moved) > 1e-3
    applied = {strategy: loha_jax.adapt(fn, strategy=strategy) for strategy in strategies} | (
        {"": fn} if plain else {}
    )
    for apply in applied.values():
        out, gradient = value_and_gradient(apply)
        assert_close(out, expected, 2e-5)
        assert_close(gradient, expected_gradient, 1e-3)
    explanation = loha_jax.explain(fn, params, *args, strategy="factored")
    assert {use.primitive for use in explanation.dense} == set(dense), str(explanation)
    assert not explanation.unused, str(explanation)


# --- ways to use a kernel: (function of (w, x), kernel shape, layout, x shape, primitives that densify) ---

einsum = jnp.einsum
USES = {
    "matmul": (lambda w, x: x @ w, (4, 6), "io", (5, 4), ()),
    "left operand": (lambda w, x: w @ x, (6, 4), "oi", (4, 5), ()),
    "vector": (lambda w, x: w @ x, (6, 4), "oi", (4,), ()),
    "batched rows": (lambda w, x: x @ w, (4, 6), "io", (2, 3, 4), ()),
    "leading contraction": (lambda w, x: einsum("ibt,io->bto", x, w), (4, 6), "io", (4, 2, 3), ()),
    "transposed": (lambda w, x: x @ w.T, (6, 4), "oi", (5, 4), ()),
    "out side contracted": (lambda w, x: x @ w.T, (6, 4), "io", (5, 4), ()),
    "query": (lambda w, x: einsum("btd,dhk->bthk", x, w), (4, 2, 3), "ioo", (2, 3, 4), ()),
    "attention output": (
        lambda w, x: einsum("bthk,hkd->btd", x, w),
        (2, 3, 4),
        "iio",
        (2, 5, 2, 3),
        (),
    ),
    "attention output, heads first": (
        lambda w, x: einsum("bhtk,hkd->btd", x, w),
        (2, 3, 4),
        "iio",
        (2, 2, 5, 3),
        (),
    ),
    "in axes in another order": (
        lambda w, x: einsum("bxy,yxo->bo", x, w),
        (3, 2, 4),
        "i1 i0 o",
        (5, 2, 3),
        (),
    ),
    "gemma query": (lambda w, x: einsum("btd,ndh->btnh", x, w), (2, 4, 3), "oio", (2, 3, 4), ()),
    "gemma fused kv": (
        lambda w, x: einsum("bsd,ckdh->cbskh", x, w),
        (2, 2, 4, 3),
        "soio",
        (2, 3, 4),
        (),
    ),
    "experts": (lambda w, x: einsum("eti,eio->eto", x, w), (3, 4, 6), "sio", (3, 5, 4), ()),
    "experts, one input": (lambda w, x: einsum("ti,eio->teo", x, w), (3, 4, 6), "sio", (5, 4), ()),
    "experts, summed": (lambda w, x: einsum("eti,eio->to", x, w), (3, 4, 6), "sio", (3, 5, 4), ()),
    "experts, all ways": (
        lambda w, x: einsum("abti,abcio->atoc", x, w),
        (2, 3, 2, 4, 6),
        "sssio",
        (2, 3, 5, 4),
        (),
    ),
    "two stack axes": (
        lambda w, x: einsum("abti,baio->abto", x, w),
        (3, 2, 4, 6),
        "ssio",
        (2, 3, 5, 4),
        (),
    ),
    "reshape joins out": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), "ioo", (5, 4), ()),
    "reshape splits out": (
        lambda w, x: einsum("td,dhk->thk", x, w.reshape(4, 2, 3)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "reshape splits in": (
        lambda w, x: einsum("thk,hkd->td", x, w.reshape(2, 2, 6)),
        (4, 6),
        "io",
        (5, 2, 2),
        (),
    ),
    "reshape joins stack": (
        lambda w, x: einsum("eti,eio->eto", x, w.reshape(6, 4, 3)),
        (2, 3, 4, 3),
        "ssio",
        (6, 5, 4),
        (),
    ),
    "reshape splits stack": (
        lambda w, x: einsum("abti,abio->abto", x, w.reshape(2, 3, 4, 3)),
        (6, 4, 3),
        "sio",
        (2, 3, 5, 4),
        (),
    ),
    "reshape mixes": (lambda w, x: x @ w.reshape(6, 4), (4, 6), "io", (5, 6), ("reshape",)),
    "slice of out": (lambda w, x: x @ w[:, 1:5:2], (4, 6), "io", (5, 4), ()),
    "slice of in": (lambda w, x: x @ w[2:], (6, 4), "io", (5, 4), ()),
    "slice of one out axis": (
        lambda w, x: einsum("td,dhk->thk", x, w[:, :, 1:]),
        (4, 2, 3),
        "ioo",
        (5, 4),
        (),
    ),
    "split in three": (
        lambda w, x: sum(x @ p for p in jnp.split(w, 3, axis=1)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "one of a stack": (lambda w, x: x @ w[1], (3, 4, 6), "sio", (5, 4), ()),
    "one of a stack, dynamic": (
        lambda w, x: x @ w[jnp.argmax(jnp.zeros(2)) + 1],
        (3, 4, 6),
        "sio",
        (5, 4),
        (),
    ),
    "dynamic slice": (
        lambda w, x: x @ jax.lax.dynamic_slice(w, (0, x.ndim), (4, 3)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "new axes": (lambda w, x: (x[None] @ w[None])[0], (4, 6), "io", (5, 4), ()),
    "broadcast over a batch": (
        lambda w, x: einsum("bti,bio->bto", x, jnp.broadcast_to(w, (2, 4, 6))),
        (4, 6),
        "io",
        (2, 5, 4),
        (),
    ),
    "cast there and back": (
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32) * 0 + x @ w,
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "scaled": (lambda w, x: x @ (0.5 * w) + x @ (w / 3.0), (4, 6), "io", (5, 4), ()),
    "used twice": (lambda w, x: (x @ w) @ w.T, (4, 6), "io", (5, 4), ()),
    "product of two": (lambda w, x: x @ (w @ w.T), (4, 6), "io", (5, 4), ("dot_general",)),
    "embedding": (lambda w, x: w[jnp.arange(5) % 3], (7, 4), "oi", (1,), ()),
    "embedding of 2-D ids": (
        lambda w, x: jnp.take(w, jnp.arange(6).reshape(2, 3), axis=0),
        (7, 4),
        "oi",
        (1,),
        (),
    ),
    "columns of an embedding": (
        lambda w, x: jnp.take(w, jnp.arange(3), axis=1),
        (4, 7),
        "io",
        (1,),
        (),
    ),
    "tied embedding": (lambda w, x: jnp.tanh(w[jnp.arange(5) % 3]) @ w.T, (7, 4), "oi", (1,), ()),
    "sum of squares": (lambda w, x: (w**2).sum() + x @ w, (4, 6), "io", (5, 4), ("integer_pow",)),
    "stop_gradient elsewhere": (
        lambda w, x: x @ w + jax.lax.stop_gradient(x @ w),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "one row in": (lambda w, x: x @ w, (1, 6), "io", (5, 1), ()),
    "one column out": (lambda w, x: x @ w, (4, 1), "io", (5, 4), ()),
    "one head": (lambda w, x: einsum("bthk,hkd->btd", x, w), (1, 3, 4), "iio", (2, 5, 1, 3), ()),
    "stack of one": (lambda w, x: einsum("eti,eio->eto", x, w), (1, 4, 6), "sio", (1, 5, 4), ()),
}


@pytest.mark.parametrize("name", USES)
def test_use(name):
    fn, shape, layout, x_shape, dense = USES[name]
    params = adapted(
        {"m": {"kernel": normal(*shape)}}, {"m": layout}, ["m"] if "s" not in layout else r".*\bm"
    )
    check(
        lambda p, x: fn(jnp.asarray(p["m"]["kernel"]), x),
        params,
        normal(*x_shape, seed=1),
        dense=dense,
    )


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_takes_one_layer_of_a_stack_per_step(remat, length):
    def fn(p, x):
        body = lambda c, w: (jnp.tanh(c @ w), c.sum())  # noqa: E731
        return jax.lax.scan(
            jax.checkpoint(body) if remat else body, x, jnp.asarray(p["layers"]["kernel"])
        )

    params = adapted({"layers": {"kernel": normal(length, 4, 4)}}, {"layers": "sio"}, r".*layers")
    check(fn, params, normal(5, 4, seed=1))


CONTROL = {
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "jit returns the weight": lambda w, x: x @ jax.jit(lambda w: w.T)(w).T,
    "scan with a constant": lambda w, x: jax.lax.scan(
        lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=3
    ),
    "scan carries the weight along": lambda w, x: jax.lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), None, length=3
    )[0][0],
    "scan over broadcast copies": lambda w, x: jax.lax.scan(
        lambda c, v: (jnp.tanh(c @ v), None), x, jnp.broadcast_to(w, (3, *w.shape))
    )[0],
    "reversed, unrolled scan": lambda w, x: jax.lax.scan(
        lambda c, t: (jnp.tanh(c @ w + t), c), x, jnp.arange(4.0), reverse=True, unroll=2
    ),
    "fori_loop": lambda w, x: jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x),
    "cond": lambda w, x: jax.lax.cond(x.sum() > 0, lambda c: c @ w, lambda c: c @ w.T * 2, x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda c: c, lambda c: c @ w], x),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "remat with a policy": lambda w, x: jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable
    )(w, x),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "vmap over the weight's columns": lambda w, x: jax.vmap(lambda c: x @ c, in_axes=1, out_axes=1)(
        w
    ),
    "grad inside": lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x),
    "jvp inside": lambda w, x: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (x,))[1],
    "hessian-vector product inside": lambda w, x: jax.grad(
        lambda x: jnp.vdot(jax.grad(lambda x: jnp.tanh(x @ w).sum())(x), x)
    )(x),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_and_transformations_inside(name):
    params = adapted({"m": {"kernel": normal(4, 4)}}, None, ["m"])
    dense = {"vmap over the weight's columns": ()}.get(name, ())
    # Reverse mode cannot go through a while loop of unknown length; fori_loop's is known, so it is a scan.
    check(
        lambda p, x: CONTROL[name](jnp.asarray(p["m"]["kernel"]), x),
        params,
        normal(5, 4, seed=1),
        dense=dense,
    )


def test_while_loop_forward():
    def fn(p, x):
        w = jnp.asarray(p["m"]["kernel"])
        return jax.lax.while_loop(
            lambda c: (c[0] < 3) & (jnp.abs(c[1] @ w).max() < 1e6),
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)),
            (0, x),
        )[1]

    params = adapted({"m": {"kernel": normal(4, 4)}}, None, ["m"])
    x = normal(5, 4, seed=1)
    assert_close(jax.jit(loha_jax.adapt(fn))(params, x), fn(loha_jax.merge(params), x), 2e-5)
    assert not loha_jax.explain(fn, params, x).dense


@jax.custom_vjp
def doubled_gradient(w, x):
    return jnp.tanh(x @ w)


def _doubled_forward(w, x):
    return doubled_gradient(w, x), (w, x)


def _doubled_backward(residuals, g):
    w, x = residuals
    g = 2 * g * (1 - jnp.tanh(x @ w) ** 2)
    return x.T @ g, g @ w.T


doubled_gradient.defvjp(_doubled_forward, _doubled_backward)


@jax.custom_jvp
def straight_through(w, x):
    return jnp.tanh(x @ w)


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return straight_through(w, x), dx @ w + x @ dw


@pytest.mark.parametrize("fn", [doubled_gradient, straight_through])
def test_custom_derivatives_of_the_user_are_kept(fn):
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(lambda p, x: fn(jnp.asarray(p["m"]["kernel"]), x), params, normal(5, 4, seed=1))
    plain = jax.grad(lambda x: fn(jnp.asarray(loha_jax.merge(params)["m"]["kernel"]), x).sum())(
        normal(5, 4, seed=1)
    )
    ours = jax.grad(
        lambda x: loha_jax.adapt(lambda p, x: fn(p["m"]["kernel"], x))(params, x).sum()
    )(normal(5, 4, seed=1))
    assert_close(ours, plain, 2e-5)


def test_a_direct_lax_call_works_under_adapt():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(lambda p, x: jax.lax.dot(x, p["m"]["kernel"]), params, normal(5, 4, seed=1), plain=False)


def test_two_adapters_share_one_product():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    more = loha_jax.inject(
        params, LoHaConfig(r=2, target_modules=["m"], init_weights=False), key=KEY, adapter_name="b"
    )
    both = loha_jax.set_adapter(more, ["default", "b"])
    check(lambda p, x: x @ p["m"]["kernel"], both, normal(5, 4, seed=1))


def test_unequal_ranks_in_a_scanned_stack():
    params = adapted(
        {"layers": {"kernel": normal(3, 4, 4)}},
        {"layers": "sio"},
        r"layers\.[02]|[02]\.layers",
        rank_pattern={"2.layers": 5},
    )
    assert params["layers"]["kernel"].adapters["default"].ranks == (3, 0, 5)
    check(
        lambda p, x: jax.lax.scan(
            lambda c, w: (c @ w, None), x, jnp.asarray(p["layers"]["kernel"])
        )[0],
        params,
        normal(5, 4),
    )


# --- whole models ---


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(
            nn.silu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        ), None


class Transformer(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            scanned = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scanned(name="layers")(x, None)
        else:
            for n in range(3):
                x, _ = Block(name=f"layers_{n}")(x)
        return nn.Dense(5, name="head")(x)


@pytest.mark.parametrize("scan", [False, True])
def test_linen_transformer(scan):
    model = Transformer(scan)
    x = normal(2, 6, 8, seed=3)
    base = model.init(KEY, x)
    params = adapted(base, loha_jax.infer_layouts(model.apply, base, x))
    check(model.apply, params, x)


def test_scanned_transformer_equals_the_unrolled_one_with_the_same_factors():
    """One config and key give both the same factors, because the stacked modules' names are the unrolled ones'."""
    x = normal(2, 6, 8, seed=3)
    scanned, unrolled = Transformer(True), Transformer(False)
    stacked = scanned.init(KEY, x)["params"]
    apart = {
        f"layers_{n}": jax.tree.map(lambda v, n=n: v[n], stacked["layers"]) for n in range(3)
    } | {"head": stacked["head"]}
    config = LoHaConfig(r=2, target_modules=["query", "up"], init_weights=False)
    one = loha_jax.inject(stacked, config, key=KEY, layouts={"layers.up": "sio"})
    two = loha_jax.inject(apart, config, key=KEY, names={r"layers_(\d)\.(.*)": r"layers.\1.\2"})
    np.testing.assert_allclose(
        loha_jax.adapt(scanned.apply)({"params": one}, x),
        loha_jax.adapt(unrolled.apply)({"params": two}, x),
        atol=1e-5,
    )


def test_equinox_mlp():
    model = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
    x = normal(5, 4, seed=1)
    arrays, static = eqx.partition(model, eqx.is_array)

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static, is_leaf=loha_jax.tree.leaves.is_adapted))(x)

    layouts = loha_jax.infer_layouts(fn, arrays, x)
    assert set(layouts.values()) == {"oi"}
    check(fn, adapted(arrays, layouts), x)


def test_equinox_module_with_its_functions_in_the_tree():
    model = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
    x = normal(5, 4, seed=1)
    params = adapted(model, {".*": "oi"})
    expected = jax.vmap(loha_jax.merge(params))(x)
    assert_close(loha_jax.adapt(lambda m, x: jax.vmap(m)(x))(params, x), expected, 2e-5)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.einsum = nnx.Einsum("btd,dhk->bthk", (8, 2, 3), (2, 3), rngs=rngs)

    def __call__(self, x):
        x = self.attn(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.einsum(x)


def test_nnx_state():
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    x = normal(2, 5, 8, seed=1)
    layouts = loha_jax.infer_layouts(fn, state, x)
    assert layouts["attn.out"] == "iio"
    assert layouts["einsum"] == "ioo"
    params = adapted(state, layouts)
    check(fn, params, x)


def test_bfloat16_follows_pefts_dtype_rule():
    params = adapted({"m": {"kernel": normal(64, 48, dtype=jnp.bfloat16)}}, None, ["m"])
    x = normal(32, 64, seed=1, dtype=jnp.bfloat16)
    y = jax.jit(loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"], strategy="factored"))(params, x)
    assert y.dtype == jnp.bfloat16
    # PEFT: (base(x)[bf16] + F.linear(x.float(), dW fp32)).to(bf16)
    f = params["m"]["kernel"].adapters["default"]
    delta = (
        (np.asarray(f.hada_w1_a) @ np.asarray(f.hada_w1_b))
        * (np.asarray(f.hada_w2_a) @ np.asarray(f.hada_w2_b))
        * 2
    )
    base = np.asarray(x, np.float64) @ np.asarray(params["m"]["kernel"].kernel, np.float64)
    expected = base + np.asarray(x, np.float64) @ delta.T
    # Two roundings to bfloat16, of the base's product (XLA may skip that one) and of the sum: half of 2**-7 each.
    assert (
        np.abs(np.asarray(y, np.float64) - expected)
        <= 2**-8 * (np.abs(base) + np.abs(expected)) + 1e-4
    ).all()


def test_forward_mode():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    x = normal(5, 4, seed=1)
    fn = lambda p, x: x @ p["m"]["kernel"]  # noqa: E731
    trainable, frozen = loha_jax.partition(params)
    for strategy in ("factored", "fused", "dense"):
        run = loha_jax.adapt(fn, strategy=strategy, forward_mode=True)
        tangent = jax.jvp(
            lambda t, run=run: run(loha_jax.combine(t, frozen), x), (trainable,), (trainable,)
        )[1]
        delta = fn(loha_jax.merge(params), x) - fn(loha_jax.unload(params), x)
        assert_close(tangent, 4 * delta, 2e-5)  # the update is of degree 4 in the factors
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda t: loha_jax.adapt(fn)(loha_jax.combine(t, frozen), x), (trainable,), (trainable,)
        )


def test_vmap_over_adapters_outside():
    base = {"m": {"kernel": normal(4, 6)}}
    several = [
        adapted(base, None, ["m"], r=2),
        jax.tree.map(lambda x: x * 1.1, adapted(base, None, ["m"], r=2)),
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    x = normal(5, 4, seed=1)
    run = loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"])
    out = jax.vmap(run, in_axes=(0, None))(stacked, x)
    assert_close(out, jnp.stack([x @ loha_jax.merge(p)["m"]["kernel"] for p in several]), 2e-5)


def test_arguments_that_are_no_arrays_stay_as_they_are():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])

    def fn(p, x, *, training, mode, scale):
        assert training is True
        assert mode == "sum"
        assert scale == 2
        return {"out": x @ p["m"]["kernel"] * scale, "mode": mode, "none": None}

    out = loha_jax.adapt(fn)(params, normal(5, 4), training=True, mode="sum", scale=2)
    assert out["mode"] == "sum"
    assert out["none"] is None
    assert_close(out["out"], 2 * normal(5, 4) @ loha_jax.merge(params)["m"]["kernel"], 2e-5)


def test_parameters_that_are_returned_are_returned_adapted():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    _, same = loha_jax.adapt(lambda p, x: (x @ p["m"]["kernel"], p))(params, normal(5, 4))
    assert same["m"]["kernel"] is params["m"]["kernel"]
    transposed = loha_jax.adapt(lambda p: p["m"]["kernel"].T)(params)
    assert_close(transposed, loha_jax.merge(params)["m"]["kernel"].T, 2e-5)


def test_values_closed_over_from_an_outer_trace():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    outer = lambda x: loha_jax.adapt(lambda p: (x @ p["m"]["kernel"]).sum())(params)  # noqa: E731
    gradient = jax.jit(jax.grad(outer))(normal(5, 4))
    assert_close(gradient, jnp.ones((5, 6)) @ loha_jax.merge(params)["m"]["kernel"].T, 2e-5)


def test_saved_modules_are_used_and_trained():
    base = {"q": {"kernel": normal(4, 4)}, "head": {"kernel": normal(4, 2), "bias": normal(2)}}
    params = adapted(base, None, ["q"], modules_to_save=["head"])
    check(
        lambda p, x: (x @ p["q"]["kernel"]) @ p["head"]["kernel"] + p["head"]["bias"],
        params,
        normal(5, 4),
    )


def test_inactive_adapters_cost_nothing():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    off = loha_jax.set_adapter(params, ())
    run = loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"])
    assert_close(run(off, normal(5, 4)), normal(5, 4) @ loha_jax.unload(params)["m"]["kernel"], 0)
    assert str(jax.make_jaxpr(run)(off, normal(5, 4))).count("dot_general") == 1


def test_the_frozen_base_gets_no_gradient_and_costs_none():
    params = adapted({"m": {"kernel": normal(64, 64)}}, None, ["m"])
    for run in (
        loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"]),
        lambda p, x: x @ p["m"]["kernel"],
    ):
        gradient = jax.grad(lambda p, run=run: run(p, normal(5, 64)).sum())(params)
        assert not gradient["m"]["kernel"].kernel.any()
        assert gradient["m"]["kernel"].adapters["default"].hada_w1_a.any()


def test_sharding_constraints_and_named_scopes_pass_through():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))

    def fn(p, x):
        with jax.named_scope("mine"):
            return x @ jax.lax.with_sharding_constraint(jnp.asarray(p["m"]["kernel"]), spec)

    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(fn, params, normal(5, 4))
    assert "mine" in jax.jit(loha_jax.adapt(fn)).lower(params, normal(5, 4)).as_text(
        debug_info=True
    )


def test_strategies_by_module_name_and_unknown_ones():
    base = {"a": {"kernel": normal(4, 6)}, "b": {"kernel": normal(6, 4)}}
    params = adapted(base, None, ["a", "b"])
    fn = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]  # noqa: E731
    uses = loha_jax.explain(fn, params, normal(5, 4), strategy={"a": "fused", "b": "factored"}).uses
    assert {use.module: use.strategy for use in uses} == {"a": "fused", "b": "factored"}
    check(partial(fn), params, normal(5, 4))
    with pytest.raises(
        ValueError, match="strategy is one of auto, factored, fused, dense, got 'quick'"
    ):
        loha_jax.adapt(fn, strategy="quick")


def test_shapes_alone_can_be_explained():
    params = jax.eval_shape(lambda: adapted({"m": {"kernel": jnp.ones((64, 64))}}, None, ["m"]))
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    (use,) = loha_jax.explain(lambda p, x: x @ p["m"]["kernel"], params, x).uses
    assert (use.strategy, use.rows, use.flops) == ("factored", 128, 2 * 2 * 128 * 64 * 64)


LETTERS = "abcdefgh"


@st.composite
def einsums(draw):
    """A product of x with a kernel of any layout, and the einsum that says so."""
    n_in, n_out, n_stack = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    kinds = draw(st.permutations("i" * n_in + "o" * n_out + "s" * n_stack))
    size = dict(
        zip(LETTERS, draw(st.lists(st.integers(1, 3), min_size=8, max_size=8)), strict=True)
    )
    kernel = LETTERS[: len(kinds)]
    shared, free = [], []
    swap = draw(st.booleans())
    for letter, kind in zip(kernel, kinds, strict=True):
        part = draw(st.sampled_from(["batch", "sum", "free"])) if kind == "s" else None
        contracted = kind == ("o" if swap else "i") or part == "sum"
        if contracted or part == "batch":
            shared.append(letter)
        if not contracted:
            free.append(letter)
    rows = list("yz"[: draw(st.integers(0, 2))])
    size |= {"y": 2, "z": 3}
    x = "".join(draw(st.permutations(shared + rows)))
    out = "".join(draw(st.permutations(free + rows)))
    equation = f"{x},{kernel}->{out}"
    return "".join(kinds), [size[c] for c in kernel], [size[c] for c in x], equation


# The bound on values and gradients against float64, relative to the largest entry; in bfloat16, where the base product,
# the sum and (fused) W + ΔW are rounded by up to 2^-9 each, to the largest entry of the same sums without cancellation.


@pytest.mark.slow
@settings(max_examples=60)
@given(
    einsums(),
    st.sampled_from(list(BOUNDS)),
    st.sampled_from(["factored", "fused", "fused in blocks"]),
)
def test_any_einsum_with_any_layout(case, dtype, strategy):
    layout, kernel_shape, x_shape, equation = case
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        if strategy == "fused in blocks":  # one after the other, of three elements each
            patch.setattr(loha_jax.transform.forms, "_BLOCK_ELEMENTS", 3)
            strategy = "fused"
        params = adapted(
            {"m": {"kernel": normal(*kernel_shape, dtype=dtype)}}, {"m": layout}, r".*\bm", r=2
        )
        x = normal(*x_shape, seed=1, dtype=dtype)

        def fn(p, x):
            return jnp.einsum(equation, x, jnp.asarray(p["m"]["kernel"]))

        assert_equals_merged_in_float64(fn, params, x, dtype, strategy)


def test_a_report_names_what_is_dense_and_why():
    params = adapted(
        {"m": {"kernel": normal(4, 6)}, "idle": {"kernel": normal(4, 4)}}, None, ["m", "idle"]
    )
    explanation = loha_jax.explain(
        lambda p, x: jnp.sort(jnp.asarray(p["m"]["kernel"])), params, normal(5, 4)
    )
    assert explanation.unused == ("idle",)
    (use,) = explanation.dense
    assert (use.module, use.primitive, use.note) == ("m", "sort", "no rule for this primitive")
    assert re.search(r"m\s+sort\s+4x6\s+-\s+dense", str(explanation))
    assert "never read: idle" in str(explanation)


# --- lookups, constants, closures ---

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
    fn = lambda p: LOOKUPS[name](p["q"]["embedding"])  # noqa: E731
    got, want = loha_jax.adapt(fn)(params), fn(loha_jax.merge(params))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    uses = {use.strategy for use in loha_jax.explain(fn, params).uses}
    assert uses == {"dense" if name == "vmap, a window" else "rows"}


def test_constants_come_back_as_jax_returns_them():
    params, array = adapted({"q": {"kernel": normal(4, 4)}}), np.arange(3.0)

    def fn(p, x):
        numbers = [1, 2.0, True, np.float32(3), np.int64(2), x.shape]
        return [*numbers, array, jnp.zeros(2), None, "s", x, p["q"]["kernel"] @ x]

    x = np.ones(4, np.float32)
    got = loha_jax.adapt(fn)(params, x)
    assert got[9] == "s"
    del got[9]
    want = jax.jit(lambda p, x: [o for o in fn(p, x) if not isinstance(o, str)])(
        loha_jax.merge(params), x
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(g, jax.Array)
        assert (g.dtype, g.weak_type) == (w.dtype, w.weak_type)
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-4)


def test_a_function_that_closes_over_its_weights_is_told_so():
    params, x = adapted({"q": {"kernel": normal(4, 4)}}), normal(2, 4)
    closed = lambda x: x @ params["q"]["kernel"]  # noqa: E731
    for fn, args in ((closed, (x,)), (partial(lambda p, x: x @ p["q"]["kernel"], params), (x,))):
        with pytest.warns(
            UserWarning, match=r"closes over adapted kernels .*Pass the adapted tree"
        ) as caught:
            got = loha_jax.adapt(fn)(*args)
        assert caught[0].filename == __file__
        np.testing.assert_allclose(
            got, x @ loha_jax.merge(params)["q"]["kernel"], rtol=0, atol=1e-5
        )
        explanation = loha_jax.explain(fn, x)
        assert not explanation.uses
        assert "No argument holds a kernel with an active adapter; the function closes over" in str(
            explanation
        )
    plain = loha_jax.explain(lambda p, x: x @ p["q"]["kernel"], loha_jax.unload(params), x)
    assert str(plain).endswith(
        "No argument holds a kernel with an active adapter. Pass the adapted tree as an argument."
    )
