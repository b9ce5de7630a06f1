"""`adapt` on convolutions: every kind against the merged layer, in value and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from pullbacks import BOUNDS, assert_equals_merged_in_float64, value_and_pullback
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

STRATEGIES = ("factored", "fused", "auto")

# The bound on values and gradients against float64, relative to the largest entry; in bfloat16,
# where the base product, the sum and (fused) W + ΔW are rounded by up to 2^-9 each, to the largest
# entry of the same sums without cancellation.


def normal(*shape, seed=0, dtype=jnp.float32):
    return normal_array(seed, shape, dtype)


def adapted(base, layout, cp, r=3, names=("conv",)):
    """`base` with random factors of an update about as large as the weights."""
    config = LoHaConfig(r=r, alpha=2 * r, target_modules=list(names), use_effective_conv2d=cp)
    layouts = {".*": layout} if layout else None
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts=layouts)
    mask, random = loha_jax.trainable_mask(params), np.random.default_rng(3)
    return jax.tree.map(
        lambda x, m: jnp.asarray(random.standard_normal(x.shape) * 0.7, x.dtype) if m else x,
        params,
        mask,
    )


def assert_equals_merged(fn, params, x, value=2e-5, gradient=1e-4, strategies=STRATEGIES, dense=()):
    want = value_and_pullback(lambda p, x: fn(loha_jax.merge(p), x), params, x)
    base = fn(loha_jax.unload(params), x)
    assert np.abs(np.asarray(want[0]) - base).max() > 1e-3 * np.abs(base).max()
    for strategy in strategies:
        got = value_and_pullback(loha_jax.adapt(fn, strategy=strategy), params, x)
        for bound, g, w in zip((value, gradient), got, want, strict=True):
            for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(w), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(np.abs(b).max(), 1e-30))
    explanation = loha_jax.explain(fn, params, x, strategy="factored")
    assert {use.primitive for use in explanation.dense} == set(dense), str(explanation)
    assert not explanation.unused


# (arguments of nn.Conv, shape of x)
LINEN = {
    "1d": ({"features": 6, "kernel_size": (3,)}, (2, 9, 4)),
    "1d, kernel of 1": ({"features": 6, "kernel_size": (1,)}, (2, 9, 4)),
    "1d causal": ({"features": 6, "kernel_size": (3,), "padding": "CAUSAL"}, (2, 9, 4)),
    "2d same": ({"features": 6, "kernel_size": (3, 3)}, (2, 6, 5, 4)),
    "2d valid": ({"features": 6, "kernel_size": (3, 2), "padding": "VALID"}, (2, 6, 5, 4)),
    "2d strided": ({"features": 6, "kernel_size": (3, 3), "strides": (2, 1)}, (2, 6, 5, 4)),
    "2d explicit padding": (
        {"features": 6, "kernel_size": (3, 3), "padding": ((0, 2), (1, 0))},
        (2, 6, 5, 4),
    ),
    "2d circular": ({"features": 6, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 6, 5, 4)),
    "2d reflected": ({"features": 6, "kernel_size": (3, 3), "padding": "REFLECT"}, (2, 6, 5, 4)),
    "2d kernel dilation": (
        {"features": 6, "kernel_size": (3, 3), "kernel_dilation": 2},
        (2, 7, 7, 4),
    ),
    "2d input dilation": (
        {
            "features": 6,
            "kernel_size": (3, 3),
            "input_dilation": (2, 1),
            "padding": ((1, 2), (0, 1)),
        },
        (2, 4, 5, 4),
    ),
    "2d kernel of 1": ({"features": 6, "kernel_size": (1, 1)}, (2, 4, 5, 4)),
    "2d kernel of (3, 1)": ({"features": 6, "kernel_size": (3, 1)}, (2, 4, 5, 4)),
    "2d grouped": ({"features": 6, "kernel_size": (3, 3), "feature_group_count": 2}, (2, 5, 5, 4)),
    "2d depthwise": (
        {"features": 8, "kernel_size": (3, 3), "feature_group_count": 4},
        (2, 5, 5, 4),
    ),
    "2d one channel": ({"features": 1, "kernel_size": (3, 3)}, (2, 5, 5, 1)),
    "2d, several batch axes": ({"features": 6, "kernel_size": (3, 3)}, (2, 2, 5, 5, 4)),
    "3d": ({"features": 6, "kernel_size": (2, 3, 2)}, (2, 4, 4, 3, 4)),
    "3d grouped, strided": (
        {"features": 6, "kernel_size": (2, 3, 2), "feature_group_count": 2, "strides": 2},
        (2, 4, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("cp", [False, True], ids=["flat", "cp"])
@pytest.mark.parametrize("case", LINEN)
def test_linen_conv(case, cp):
    arguments, x_shape = LINEN[case]
    module, x = nn.Conv(**arguments), normal(*x_shape, seed=1)
    base = {"conv": module.init(jax.random.key(2), x)["params"]}
    layout = "k" * len(arguments["kernel_size"]) + "io"
    params = adapted(base, layout, cp)
    ones = set(arguments["kernel_size"]) == {1}
    assert params["conv"]["kernel"].adapters["default"].is_cp == (
        cp and not ones
    )  # PEFT: 1-kernels are always flat
    assert_equals_merged(lambda p, x: module.apply({"params": p["conv"]}, x), params, x)


@pytest.mark.parametrize("cp", [False, True], ids=["flat", "cp"])
def test_nnx_conv(cp):
    model = nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = adapted({"conv": nnx.to_pure_dict(state)}, None, cp)
    x = normal(2, 7, 7, 4, seed=1)

    def fn(params, x):
        state = nnx.state(nnx.merge(graph, jax.tree.map(jnp.asarray, nnx_state)))
        nnx.replace_by_pure_dict(state, params["conv"])
        return nnx.merge(graph, state)(x)

    nnx_state = state
    assert_equals_merged(fn, params, x)


@st.composite
def convolutions(draw):
    """A `conv_general_dilated` and the layout of its kernel.

    Its dimension numbers, window and groups are any.
    """
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    in_, out = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel_size = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    orders = [
        draw(st.permutations(range(axes + 2))) for _ in range(3)
    ]  # (batch, feature, *space) or (out, in, *space)

    def sizes(order, values):
        return [values[order.index(axis)] for axis in range(axes + 2)]

    def per_axis(low, high):
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    space = [k * 2 + n for k, n in zip(kernel_size, per_axis(0, 2), strict=True)]
    window = {
        "window_strides": per_axis(1, 2),
        "padding": list(zip(per_axis(0, 2), per_axis(0, 1), strict=True)),
        "lhs_dilation": per_axis(1, 2),
        "rhs_dilation": per_axis(1, 2),
        "feature_group_count": groups,
    }
    numbers = lax.ConvDimensionNumbers(*map(tuple, orders))
    # A kernel's in and out letters by axis; the spatial ones stand in the order in which torch has
    # them.
    letters = {orders[1][0]: "o", orders[1][1]: "i"} | {
        axis: f"k{n}" for n, axis in enumerate(orders[1][2:])
    }
    word = " ".join(letters[axis] if axes > 1 else letters[axis][0] for axis in range(axes + 2))
    word = word.replace("o", "o0").replace("i", "i0") if axes > 1 else word
    kernel_shape = sizes(orders[1], [out, in_, *kernel_size])
    x_shape = sizes(orders[0], [2, groups * in_, *space])
    return (
        word,
        kernel_shape,
        x_shape,
        numbers,
        window,
        draw(st.booleans()),
        draw(st.integers(1, 3)),
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(convolutions(), st.sampled_from(list(BOUNDS)), st.sampled_from(["factored", "fused"]))
def test_any_convolution_with_any_layout(case, dtype, strategy):
    word, kernel_shape, x_shape, numbers, window, cp, r = case
    with jax.enable_x64(True):
        params = adapted({"conv": {"kernel": normal(*kernel_shape, dtype=dtype)}}, word, cp, r)
        x = normal(*x_shape, seed=1, dtype=dtype)

        def fn(p, x):
            return lax.conv_general_dilated(
                x, jnp.asarray(p["conv"]["kernel"]), **window, dimension_numbers=numbers
            )

        assert_equals_merged_in_float64(fn, params, x, dtype, strategy)


@pytest.mark.parametrize("cp", [False, True], ids=["flat", "cp"])
@pytest.mark.parametrize("groups", [1, 2])
def test_stacked_kernels_under_vmap(groups, cp):
    params = adapted({"conv": {"kernel": normal(3, 3, 3, 4 // groups, 6)}}, "skkio", cp)
    x = normal(3, 2, 5, 5, 4, seed=1)

    def one(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def vmapped(p, x):
        return jax.vmap(one)(jnp.asarray(p["conv"]["kernel"]), x)

    def scanned(p, x):
        return lax.scan(lambda _, xs: (0, one(*xs)), 0, (jnp.asarray(p["conv"]["kernel"]), x))[1]

    assert_equals_merged(scanned, params, x)
    assert_equals_merged(vmapped, params, x)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("cp", [False, True], ids=["flat", "cp"])
def test_transposed_convolution(cp, transpose_kernel):
    module = nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=transpose_kernel)
    x = normal(2, 4, 4, 4, seed=1)
    base = {"conv": module.init(jax.random.key(2), x)["params"]}
    params = adapted(base, "kkoi" if transpose_kernel else "kkio", cp)
    assert_equals_merged(lambda p, x: module.apply({"params": p["conv"]}, x), params, x)


def test_what_has_no_factored_form_is_dense():
    kernel = normal(3, 3, 4, 4)
    numbers = ("NHWC", "HWIO", "NHWC")

    def swapped(p, x):  # the kernel's out axis is contracted
        return lax.conv_general_dilated(
            x,
            jnp.asarray(p["conv"]["kernel"]),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWOI", "NHWC"),
        )

    def batch_groups(p, x):
        return lax.conv_general_dilated(
            x,
            jnp.asarray(p["conv"]["kernel"]),
            (1, 1),
            "SAME",
            dimension_numbers=numbers,
            batch_group_count=2,
        )

    def slid_over(p, x):
        return lax.conv_general_dilated(
            jnp.asarray(p["conv"]["kernel"]),
            x,
            (1, 1),
            "SAME",
            dimension_numbers=("HWNC", "HWIO", "NHWC"),
        )

    x = normal(2, 5, 5, 4, seed=1)
    for fn in (swapped, batch_groups):
        assert_equals_merged(
            fn,
            adapted({"conv": {"kernel": kernel}}, "kkio", False),
            x,
            dense=("conv_general_dilated",),
        )
    x = normal(2, 2, 4, 3, seed=1)
    assert_equals_merged(
        slid_over,
        adapted({"conv": {"kernel": kernel}}, "kkio", True),
        x,
        dense=("conv_general_dilated",),
    )


def test_a_patch_embedding_as_a_product():
    params = adapted({"conv": {"kernel": normal(2, 2, 3, 8)}}, "kkio", True)

    def fn(p, x):  # [n, 4, 4, 3] in 2x2 patches
        patches = x.reshape(-1, 2, 2, 2, 2, 3).swapaxes(2, 3).reshape(-1, 4, 2 * 2 * 3)
        return patches @ jnp.asarray(p["conv"]["kernel"]).reshape(2 * 2 * 3, 8)

    assert_equals_merged(fn, params, normal(2, 4, 4, 3, seed=1))


def test_two_adapters_of_both_forms():
    params = adapted({"conv": {"kernel": normal(3, 3, 4, 6)}}, "kkio", False)
    config = LoHaConfig(
        r=2, alpha=8, target_modules=["conv"], use_effective_conv2d=True, init_weights=False
    )
    params = loha_jax.inject(params, config, key=jax.random.key(4), adapter_name="cp")
    params = loha_jax.set_adapter(params, ["default", "cp"])

    def fn(p, x):
        return nn.Conv(6, (3, 3), use_bias=False).apply({"params": p["conv"]}, x)

    assert_equals_merged(fn, params, normal(2, 5, 5, 4, seed=1))


def test_bfloat16_accumulates_in_float32():
    params = adapted({"conv": {"kernel": normal(3, 3, 16, 16, dtype=jnp.bfloat16)}}, "kkio", False)
    conv = nn.Conv(16, (3, 3), use_bias=False, dtype=jnp.bfloat16)

    def fn(p, x):
        return conv.apply({"params": p["conv"]}, x)

    x = normal(2, 6, 6, 16, seed=1, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, params)
    want = nn.Conv(16, (3, 3), use_bias=False).apply(
        {"params": loha_jax.merge(wide)["conv"]}, x.astype(jnp.float32)
    )
    got = loha_jax.adapt(fn, strategy="factored")(params, x)
    assert got.dtype == jnp.bfloat16
    # Rounding the base product and the sum: two halves of a unit in the last place (2^-8 of the
    # largest value each).
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, rtol=0, atol=2**-7 * float(np.abs(want).max())
    )


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("size", "in_", "out", "groups", "r", "cp", "expected"),
    [
        (8, 256, 256, 1, 4, False, "factored"),
        (8, 256, 256, 1, 4, True, "factored"),
        (32, 256, 256, 1, 8, False, "fused"),
        (4, 64, 64, 1, 16, False, "fused"),
        (16, 64, 64, 64, 8, False, "fused"),  # depthwise: ΔW is tiny
    ],
)
def test_auto_is_the_cheaper_by_xlas_count(size, in_, out, groups, r, cp, expected):
    kernel = jax.ShapeDtypeStruct((3, 3, in_ // groups, out), jnp.float32)
    config = LoHaConfig(r=r, target_modules=["conv"], use_effective_conv2d=cp)
    params = loha_jax.inject(
        {"conv": {"kernel": kernel}}, config, key=jax.random.key(0), layouts={"conv": "kkio"}
    )
    trainable, frozen = loha_jax.partition(params)
    x = jax.ShapeDtypeStruct((2, size, size, in_), jnp.float32)
    conv = nn.Conv(out, (3, 3), use_bias=False, feature_group_count=groups)

    def fn(p, x):
        return conv.apply({"params": p["conv"]}, x)

    def step(strategy):
        apply = loha_jax.adapt(fn, strategy=strategy)

        def loss(t, x, f):
            return apply(loha_jax.combine(t, f), x).sum()

        return flops(jax.value_and_grad(loss, argnums=(0, 1)), trainable, x, frozen)

    costs = {strategy: step(strategy) for strategy in ("factored", "fused")}
    (use,) = loha_jax.explain(fn, params, x).uses
    assert use.strategy == expected == min(costs, key=costs.__getitem__), costs
    assert use.primitive == "conv_general_dilated"


def test_an_empty_batch():
    params = adapted({"conv": {"kernel": normal(3, 3, 4, 6)}}, "kkio", True)
    conv = nn.Conv(6, (3, 3), use_bias=False)

    def fn(p, x):
        return conv.apply({"params": p["conv"]}, x)

    assert loha_jax.adapt(fn, strategy="factored")(params, jnp.zeros((0, 5, 5, 4))).shape == (
        0,
        5,
        5,
        6,
    )
