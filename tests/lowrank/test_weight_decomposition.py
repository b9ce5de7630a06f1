"""Weight decomposition against its formula on the dense weight, in float64.

W + m (d/‖W + ΔW‖ (W + ΔW) - W)
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from random_arrays import normal_array

import loha_jax
from loha_jax import LycorisConfig

KEY = jax.random.key(0)


def product(p, x):
    return x @ p["q"]["kernel"]


def conv(x, w, groups=1, space="HW"):
    numbers = ("N" + space + "C", space + "IO", "N" + space + "C")
    return lax.conv_general_dilated(
        x,
        jnp.asarray(w),
        (1,) * len(space),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def scanned(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


# name: (function of (w, x), kernel shape, layout, x shape, cores, whether norms per in feature have
# a factored form)
USES = {
    "dense": (lambda w, x: x @ w, (4, 6), "io", (5, 4), False, True),
    "transposed": (lambda w, x: x @ w.T, (6, 4), "oi", (5, 4), False, True),
    "left operand": (lambda w, x: w @ x, (6, 4), "oi", (4, 5), False, True),
    "out side contracted": (lambda w, x: x @ w.T, (6, 4), "io", (5, 4), False, True),
    "one out feature": (lambda w, x: x @ w, (4, 1), "io", (5, 4), False, True),
    "query": (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        (4, 2, 3),
        "ioo",
        (2, 3, 4),
        False,
        True,
    ),
    "out projection": (
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w),
        (2, 3, 4),
        "iio",
        (2, 5, 2, 3),
        False,
        True,
    ),
    "split of a cast": (
        lambda w, x: x @ (2 * w.astype(x.dtype))[:, 2:5],
        (4, 6),
        "io",
        (5, 4),
        False,
        True,
    ),
    "scan": (scanned, (3, 4, 4), "sio", (5, 4), False, True),
    "experts": (
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
        (3, 4, 5),
        "sio",
        (3, 2, 4),
        False,
        True,
    ),
    "each expert on all": (
        lambda w, x: jnp.einsum("bi,eio->ebo", x, w),
        (3, 4, 5),
        "sio",
        (2, 4),
        False,
        False,
    ),
    "lookup": (lambda w, x: w[jnp.argsort(x[:, 0])], (6, 4), "oi", (3, 1), False, False),
    "conv": (conv_2d := (lambda w, x: conv(x, w)), (3, 2, 4, 6), "kkio", (2, 5, 5, 4), False, True),
    "conv with cores": (conv_2d, (3, 2, 4, 6), "kkio", (2, 5, 5, 4), True, True),
    "conv in groups": (
        lambda w, x: conv(x, w, groups=2),
        (3, 3, 2, 6),
        "kkio",
        (2, 5, 5, 4),
        False,
        True,
    ),
    "conv1d with cores": (
        lambda w, x: conv(x, w, space="W"),
        (3, 4, 6),
        "kio",
        (2, 5, 4),
        True,
        True,
    ),
    "conv3d": (
        lambda w, x: conv(x, w, space="DHW"),
        (1, 2, 3, 4, 6),
        "kkkio",
        (2, 3, 4, 4, 4),
        False,
        True,
    ),
}


def decomposed(shape, layout, on_out, cp=False, **kwargs):
    """A tree of one kernel with every trained array drawn at random.

    An update about as large as the weight.
    """
    random = np.random.default_rng(3)
    base = {"q": {"kernel": jnp.asarray(random.standard_normal(shape))}}
    config = LycorisConfig(
        r=2,
        alpha=3,
        target_modules=["q"],
        weight_decompose=True,
        wd_on_out=on_out,
        use_effective_conv2d=cp,
        **kwargs,
    )
    layouts = {"q": layout}
    params = loha_jax.inject(base, config, key=KEY, layouts=layouts)
    mask = loha_jax.trainable_mask(params)

    def draw(x, m):
        return jnp.asarray(0.5 + random.random(x.shape)) if m else x

    return jax.tree.map(draw, params, mask)


def formula(leaf, multiplier=1.0):
    """The adapted weight by the definition, on dense arrays."""
    (f,) = leaf.adapters.values()
    layout = leaf.layout
    weight = layout.unfold(leaf.kernel)
    stack = len(layout.axes("s"))
    scale = f.scaling if f.scalar is None else f.scaling * f.scalar
    if f.is_cp:
        parts = [
            jnp.einsum("...pqk,...po,...qi->...oik", t.reshape(*t.shape[: stack + 2], -1), a, b)
            for t, a, b in (
                (f.hada_t1, f.hada_w1_a, f.hada_w1_b),
                (f.hada_t2, f.hada_w2_a, f.hada_w2_b),
            )
        ]
    else:
        parts = [f.hada_w1_a @ f.hada_w1_b, f.hada_w2_a @ f.hada_w2_b]
    delta = (parts[0] * parts[1]).reshape(weight.shape) * scale.reshape(
        *scale.shape, *(1,) * (weight.ndim - stack)
    )
    total = weight + delta
    kept = stack if f.config.wd_on_out else stack + 1
    axes = tuple(n for n in range(stack, total.ndim) if n != kept)
    norms = jnp.sqrt((total**2).sum(axes, keepdims=True))
    return layout.fold(
        weight + multiplier * (f.dora_scale / norms * total - weight), leaf.kernel.shape
    )


def value_and_gradient(fn, params, x):
    trainable, frozen = loha_jax.partition(params)

    def loss(trainable, x):
        y = fn(loha_jax.combine(trainable, frozen), x)
        return (jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(trainable, x)
    (_, y), gradient = step.compile({"xla_backend_optimization_level": 0})(
        trainable, x
    )  # compiling is all the time
    return y, gradient


def assert_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-9 * max(float(jnp.abs(w).max()), 1e-3))


@pytest.mark.parametrize(
    "on_out", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["out", "in"]
)
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients_are_those_of_the_formula(use, on_out, x64):
    function, shape, layout, x_shape, cp, in_is_factored = USES[use]
    params = decomposed(shape, layout, on_out, cp, use_scalar=use in ("dense", "scan", "conv"))
    x = jnp.asarray(np.random.default_rng(4).standard_normal(x_shape))

    def fn(p, x):
        return function(p["q"]["kernel"], x)

    want = value_and_gradient(lambda p, x: function(formula(p["q"]["kernel"]), x), params, x)
    base = fn(loha_jax.unload(params), x)
    assert np.abs(want[0] - base).max() > 0.1
    for apply in (fn, *(loha_jax.adapt(fn, strategy=s) for s in ("factored", "fused"))):
        assert_close(value_and_gradient(apply, params, x), want)
    dense = loha_jax.explain(fn, params, x, strategy="factored").dense
    assert bool(dense) == (use == "lookup" or (not on_out and not in_is_factored)), str(dense)


def test_forward_mode(x64):
    params, x = (
        decomposed((4, 6), "io", True),
        jnp.asarray(np.random.default_rng(4).standard_normal((5, 4))),
    )
    trainable, frozen = loha_jax.partition(params)
    tangents = jax.tree.map(jnp.ones_like, trainable)

    def run(apply):
        return jax.jvp(lambda t: apply(loha_jax.combine(t, frozen), x), (trainable,), (tangents,))

    want = run(lambda p, x: x @ formula(p["q"]["kernel"]))
    assert_close(run(loha_jax.adapt(product, strategy="factored", forward_mode=True)), want)


def test_a_new_decomposition_is_the_base(x64):
    """A new adapter is the base to rounding and multiplier 0 is the base exactly."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    config = LycorisConfig(r=2, target_modules=["q"], weight_decompose=True)
    params = loha_jax.inject({"q": {"kernel": kernel}}, config, key=KEY)
    np.testing.assert_allclose(loha_jax.merge(params)["q"]["kernel"], kernel, rtol=1e-14)
    params = decomposed((4, 6), "io", True)
    leaf = params["q"]["kernel"]
    for multiplier in (0.0, 0.3, 1.0):
        got = loha_jax.merge(loha_jax.scale(params, {"default": multiplier}))["q"]["kernel"]
        np.testing.assert_allclose(got, formula(leaf, multiplier), rtol=1e-12)
    np.testing.assert_array_equal(
        loha_jax.merge(loha_jax.scale(params, {"default": 0}))["q"]["kernel"], leaf.kernel
    )


def test_two_adapters_add_their_differences_from_the_base(x64):
    """As LyCORIS' wrappers do, each with its own decomposition of the base weight."""
    first, second = decomposed((4, 6), "io", True), decomposed((4, 6), "io", False)
    leaf, other = first["q"]["kernel"], second["q"]["kernel"]
    both = dataclasses.replace(
        leaf, adapters={"a": leaf.adapters["default"], "b": other.adapters["default"]}
    )
    both = {"q": {"kernel": dataclasses.replace(both, active=("a", "b"))}}
    want = formula(leaf) + formula(other) - leaf.kernel
    np.testing.assert_allclose(loha_jax.merge(both)["q"]["kernel"], want, rtol=1e-12)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 4)))

    for strategy in ("factored", "fused"):
        np.testing.assert_allclose(
            loha_jax.adapt(product, strategy=strategy)(both, x), x @ want, rtol=1e-11
        )


def test_modules_of_a_stack_that_are_not_targeted_stay_the_base():
    base = {"layers": {"q": {"kernel": normal_array(0, (3, 4, 4))}}}
    config = LycorisConfig(
        r=2, target_modules=["layers.1.q"], weight_decompose=True, init_weights=False
    )
    params = loha_jax.inject(base, config, key=KEY, layouts={"layers.q": "sio"})
    params = loha_jax.scale(params, {"default": 0.7})
    merged = loha_jax.merge(params)["layers"]["q"]["kernel"]
    for n in (0, 2):
        np.testing.assert_array_equal(merged[n], base["layers"]["q"]["kernel"][n])
    assert np.abs(merged[1] - base["layers"]["q"]["kernel"][1]).max() > 1e-3
    gradient = jax.grad(
        lambda p: loha_jax.adapt(scanned)(p["layers"]["q"]["kernel"], jnp.ones((2, 4))).sum()
    )(params)
    norms = gradient["layers"]["q"]["kernel"].adapters["default"].dora_scale
    assert not norms[0].any()
    assert norms[1].any()


def test_each_row_through_its_own_adapter():
    first, second = decomposed((4, 6), "io", True), decomposed((4, 6), "io", True)
    leaf, other = first["q"]["kernel"], second["q"]["kernel"]
    changed = dataclasses.replace(
        other.adapters["default"], dora_scale=other.adapters["default"].dora_scale * 2
    )
    both = dataclasses.replace(
        leaf, adapters={"a": leaf.adapters["default"], "b": changed}, active=("a", "b")
    )
    x = normal_array(0, (3, 4))
    apply = loha_jax.adapt(lambda p, x: x @ p["q"]["kernel"], adapter_index=jnp.array([1, -1, 0]))
    got = apply({"q": {"kernel": both}}, x)
    other = dataclasses.replace(other, adapters={"default": changed})
    want = [x[0] @ formula(other), x[1] @ leaf.kernel, x[2] @ formula(leaf)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-4)


@pytest.mark.parametrize("on_out", [True, False], ids=["out", "in"])
def test_nothing_of_the_kernels_shape_is_made_but_its_squares(on_out):
    """ΔW is not built for the norms either.

    The compiled step squares W and multiplies with r² columns.
    """
    width = 512
    base = {str(n): {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)} for n in range(2)}
    config = LycorisConfig(r=3, target_modules=["0", "1"], weight_decompose=True, wd_on_out=on_out)

    def forward(params, x):
        for name in "01":
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    params = loha_jax.inject(base, config, key=KEY)
    trainable, frozen = loha_jax.partition(params)

    def loss(t, f, x):
        return loha_jax.adapt(forward)(loha_jax.combine(t, f), x).sum()

    x = jax.ShapeDtypeStruct((64, width), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, x).compile()
    entry = re.split(r"\n\s*ENTRY ", compiled.as_text())[
        1
    ]  # inside a fusion, an array is a value on its way
    made = re.findall(rf"= f32\[{width},{width}\]\S* (\w[\w-]*)\(", entry)
    assert {
        operation for operation in made if operation not in ("parameter", "get-tuple-element")
    } == set()


def test_bfloat16_bases_and_kernels_are_decomposed_in_float32():
    """LyCORIS refuses a bfloat16 base beside float32 norms."""
    params = decomposed((4, 6), "io", True)
    exact = formula(params["q"]["kernel"])
    leaf = params["q"]["kernel"]
    half = {"q": {"kernel": dataclasses.replace(leaf, kernel=leaf.kernel.astype(jnp.bfloat16))}}
    merged = loha_jax.merge(half)["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), exact, rtol=0.02, atol=0.02)
    x = jnp.ones((2, 4), jnp.bfloat16)
    y = loha_jax.adapt(lambda p, x: x @ p["q"]["kernel"])(half, x)
    np.testing.assert_allclose(
        y.astype(jnp.float32), x.astype(jnp.float32) @ exact, rtol=0.03, atol=0.1
    )


def test_dropout_of_decomposed_weights():
    """Dropped modules are the base and dropped rows the base's at the trained norm."""
    params = decomposed((4, 6), "io", True, module_dropout=0.5)
    leaf = params["q"]["kernel"]
    seen = set()
    for seed in range(12):
        merged = loha_jax.merge(loha_jax.dropout(params, jax.random.key(seed)))["q"]["kernel"]
        dropped = bool((merged == leaf.kernel).all())
        seen.add(dropped)
        if not dropped:
            np.testing.assert_allclose(merged, formula(leaf), rtol=1e-5)
    assert seen == {True, False}
    params = decomposed((4, 6), "io", True, rank_dropout=0.5)
    leaf = params["q"]["kernel"]
    (f,) = leaf.adapters.values()
    kept, rows = (
        formula(leaf),
        leaf.kernel / jnp.linalg.norm(leaf.kernel, axis=0) * f.dora_scale[:, 0],
    )
    merged = loha_jax.merge(loha_jax.dropout(params, KEY))["q"]["kernel"]
    is_kept = np.isclose(merged, kept, rtol=1e-4).all(0)
    np.testing.assert_allclose(merged, jnp.where(is_kept, kept, rows), rtol=1e-4)
    assert 0 < is_kept.sum() < 6
