"""The dtype that updates are computed in: float32 as in PEFT, or the input's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from random_arrays import normal_array

import loha_jax

TOKENS, WIDTH, OUT, R = 96, 64, 80, 4
KEY = jax.random.key(1)


def conv(kernel, x):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CASES = {
    "dense": ((WIDTH, OUT), "io", (TOKENS, WIDTH), lambda w, x: x @ w),
    "transposed": ((OUT, WIDTH), "oi", (TOKENS, WIDTH), lambda w, x: x @ w.T),
    "kernel first": ((OUT, WIDTH), "oi", (WIDTH, TOKENS), lambda w, x: w @ x),
    "heads": (
        (WIDTH, 4, 20),
        "ioo",
        (2, 48, WIDTH),
        lambda w, x: jnp.einsum("btd,dnh->btnh", x, w),
    ),
    "scan": (
        (3, WIDTH, WIDTH),
        "sio",
        (TOKENS, WIDTH),
        lambda w, x: lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0],
    ),
    "convolution": ((3, 3, 16, 24), "kkio", (4, 8, 8, 16), conv),
    "core": ((3, 3, 16, 24), "kkio", (4, 8, 8, 16), conv),
    "experts": (
        (3, WIDTH, OUT),
        "sio",
        (TOKENS, WIDTH),
        lambda w, x: lax.ragged_dot(x, w, jnp.array([40, 0, 56])),
    ),
}


def case(name, dtype, *, shift=0):
    """An adapted tree, its input and the model.

    w2_b is 2^shift times as large as usual, and w2_a as small: the update is the same.
    """
    shape, word, x_shape, fn = CASES[name]
    kernel = normal_array(0, shape) / np.sqrt(WIDTH)
    config = loha_jax.LoHaConfig(
        r=R, alpha=R, target_modules=["q"], init_weights=False, use_effective_conv2d=name == "core"
    )
    base = {"q": {"kernel": kernel.astype(dtype)}}
    params = loha_jax.inject(base, config, key=KEY, layouts={"q": word})
    f = params["q"]["kernel"].adapters["default"]
    w2 = {"hada_w2_a": f.hada_w2_a / 2.0**shift, "hada_w2_b": f.hada_w2_b * 2.0**shift}
    params["q"]["kernel"] = dataclasses.replace(
        params["q"]["kernel"], adapters={"default": dataclasses.replace(f, **w2)}
    )
    x = normal_array(2, x_shape).astype(dtype)
    return params, x, lambda params, x: fn(params["q"]["kernel"], x)


def pulled(fn, params, x, **options):
    """The output, and the cotangents of the factors and of x."""
    factors, frozen = loha_jax.partition(params)
    run = loha_jax.adapt(fn, **{"strategy": "factored"} | options)
    y, pull = jax.vjp(lambda factors, x: run(loha_jax.combine(factors, frozen), x), factors, x)
    g = ((37 * jnp.arange(y.size, dtype=jnp.int32) % 17 - 8).astype(y.dtype) / 8).reshape(y.shape)
    return y, *pull(g)


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def arrays(jaxpr):
    """The types of the operands and results of all products in a jaxpr, also of inner ones."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            yield from (var.aval for var in (*eqn.invars, *eqn.outvars))
        for param in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.bfloat16) for name in CASES), ("dense", jnp.float16)]
)
def test_no_product_has_rows_in_float32(name, dtype):
    """Float32 are only operands and results without rows: the factors and their gradients."""
    params, x, fn = case(name, dtype)
    run = functools.partial(pulled, fn, compute_dtype="input")
    jaxpr = jax.make_jaxpr(run)(params, x).jaxpr
    rows = {TOKENS, 48, 2 * 48, 4 * 8 * 8}
    wide = [a for a in arrays(jaxpr) if a.dtype == jnp.float32 and rows & set(a.shape)]
    assert not wide
    y, dfactors, dx = jax.eval_shape(run, params, x)
    assert y.dtype == dx.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(dfactors)} == {jnp.dtype("float32")}


def relative_errors(got, want):
    """Of each array, in the mean square."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return [
        np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b)) / np.linalg.norm(np.asarray(b))
        for a, b in pairs
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "shift"), [(jnp.bfloat16, 0), (jnp.float16, -14)])
def test_the_update_is_right_to_the_input_s_precision(name, dtype, shift):
    """Against float64: outputs and gradients within 2 steps in the mean: 2^-8 of bfloat16, 2^-11.

    Also with factors whose Khatri-Rao products are too small or too large for float16.
    """
    params, x, fn = case(name, dtype, shift=shift)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    want = pulled(fn, *wide, compute_dtype="float32")
    got = pulled(fn, params, x, compute_dtype="input")
    bound = 0.03 if name == "scan" else 2**-7
    assert max(relative_errors(got, want)) < bound * (1 if dtype == jnp.bfloat16 else 2**-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shift", [0, -14, 14])
def test_errors_are_those_of_a_lora(dtype, shift):
    """A LoRA of the same two matrices, cast to the dtype as JAX's LoRA libraries do.

    LoHa's own may be far from each other: one too small for float16, and the other large.
    """
    params, x, _ = case("dense", dtype)
    f = params["q"]["kernel"].adapters["default"]
    ka = (f.hada_w1_a[:, :, None] * f.hada_w2_a[:, None, :]).reshape(OUT, -1)
    kb = (f.hada_w1_b[:, None] * f.hada_w2_b[None]).reshape(-1, WIDTH)
    g = normal_array(3, (TOKENS, OUT)).astype(x.dtype)

    def lora(pair, x):
        a, b = (m.astype(x.dtype) for m in pair)
        return (x @ b.T) @ a.T

    def loha(pair, x):
        leaf = params["q"]["kernel"]
        zero = jnp.zeros_like(leaf.kernel)
        leaf = dataclasses.replace(leaf, kernel=zero, adapters={"default": pair})
        return loha_jax.adapt(jnp.matmul, strategy="factored", compute_dtype="input")(x, leaf)

    errors = {}
    shifted = case("dense", dtype, shift=shift)[0]["q"]["kernel"].adapters["default"]
    for name, fn, pair in (("lora", lora, (ka, kb)), ("loha", loha, shifted)):
        y, pull = jax.vjp(functools.partial(fn, pair), x)
        exact = functools.partial(lora, (ka.astype(jnp.float64), kb.astype(jnp.float64)))
        want, pull_want = jax.vjp(exact, x.astype(jnp.float64))
        errors[name] = [
            *relative_errors(y, want),
            *relative_errors(pull(g), pull_want(g.astype(jnp.float64))),
        ]
    np.testing.assert_array_less(errors["loha"], np.multiply(errors["lora"], 1.1))


@pytest.mark.parametrize(
    ("init_weights", "zero"), [(True, "hada_w2_b"), ("calibrated", "hada_w2_a")]
)
def test_in_float16_zero_factors_stay_zero_and_learn(init_weights, zero):
    params, x, fn = case("dense", jnp.float16)
    config = loha_jax.LoHaConfig(r=R, target_modules=["q"], init_weights=init_weights)
    params = loha_jax.inject(loha_jax.unload(params), config, key=KEY, layouts={"q": "io"})
    got, want = (pulled(fn, params, x, compute_dtype=rule) for rule in ("input", "float32"))
    np.testing.assert_array_equal(got[0], want[0])
    got, want = (jax.tree.leaves(pulls[1]) for pulls in (got, want))
    names = sorted(params["q"]["kernel"].adapters["default"].tensors)
    for name, ours, theirs in zip(names, got, want, strict=True):
        assert theirs.any() == (name == zero)
        np.testing.assert_allclose(ours, theirs, atol=2**-8 * np.abs(theirs).max())


def test_by_default_it_is_float32_on_cpu_and_the_input_s_elsewhere(monkeypatch):
    params, x, fn = case("dense", jnp.bfloat16)

    def widest(**options):
        jaxpr = jax.make_jaxpr(functools.partial(pulled, fn, **options))(params, x).jaxpr
        return any(a.dtype == jnp.float32 and TOKENS in a.shape for a in arrays(jaxpr))

    assert widest()
    assert widest(compute_dtype="float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not widest()
    assert widest(compute_dtype="float32")


def test_a_float32_input_is_computed_in_float32_by_every_rule():
    params, x, fn = case("dense", jnp.float32)
    one, two = (pulled(fn, params, x, compute_dtype=rule) for rule in ("input", "float32"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kernel", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["dense", "kernel first", "heads", "experts"])
def test_a_product_of_a_narrow_input_and_a_wider_kernel_is_computed_in_the_wider_dtype(
    name, kernel
):
    """As the model's own product is: its result is in float32 or float64."""
    params, x, fn = case(name, kernel)
    x = x.astype(jnp.bfloat16)
    got = pulled(fn, params, x, compute_dtype="input")
    assert got[0].dtype == kernel
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    want = pulled(fn, *wide, compute_dtype="float32")
    assert max(relative_errors(got[:2], want[:2])) < 1e-6


def test_few_rows():
    """Decoding computes without Khatri-Rao factors; its results have the input's dtype, too."""
    params, x, fn = case("dense", jnp.bfloat16)
    got = pulled(fn, params, x[:2], compute_dtype="input")
    want = pulled(fn, params, x[:2], compute_dtype="float32")
    assert [a.dtype for a in jax.tree.leaves(got)] == [a.dtype for a in jax.tree.leaves(want)]
    assert max(relative_errors(got, jax.tree.map(lambda a: a.astype(jnp.float32), want))) < 2**-7


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="compute_dtype is one of auto, input, float32"):
        loha_jax.adapt(jnp.dot, compute_dtype="bfloat16")
