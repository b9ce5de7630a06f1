"""`LoHaProvider` on NNX models: what an adapted model computes, and what training changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from qwix_models import BASES, Attention, Images, adapted, arrays, images, quantised, tokens
from random_arrays import normal_array

import loha_jax
from loha_jax.lowrank.layout import Layout
from loha_jax.nnx.graph import is_variable

LAYERS = {
    "linear": (lambda rngs: nnx.Linear(16, 24, rngs=rngs), "io", (3, 5, 16)),
    "general": (lambda rngs: nnx.LinearGeneral(16, (2, 8), rngs=rngs), "ioo", (3, 5, 16)),
    "einsum": (
        lambda rngs: nnx.Einsum("btnh,nhd->btd", (2, 8, 16), rngs=rngs),
        "iio",
        (3, 5, 2, 8),
    ),
    "experts": (lambda rngs: nnx.Einsum("teh,ehd->ted", (3, 8, 16), rngs=rngs), "sio", (5, 3, 8)),
    "conv": (lambda rngs: nnx.Conv(8, 12, (3, 3), strides=2, rngs=rngs), "kkio", (2, 9, 8, 8)),
    "groups": (
        lambda rngs: nnx.Conv(8, 12, (3,), feature_group_count=2, rngs=rngs),
        "kio",
        (2, 9, 8),
    ),
}
"""A layer, its kernel's layout, and the shape of its input."""
CASES = [
    (layer, base)
    for layer in LAYERS
    for base in BASES
    if LAYERS[layer][1][0] != "k" or base in ("float", "int8 activations")
]


@pytest.mark.parametrize("base", BASES)
def test_new_adapter_changes_nothing(base):
    """The first output is that of the base, to the bit; base parameters keep their places."""
    model, x = Attention(nnx.Rngs(0)), tokens()
    plain = quantised(model, x, **BASES[base])
    new = adapted(model, x, trained=False, **BASES[base])
    np.testing.assert_array_equal(new(x), plain(x))
    ours, theirs = arrays(new, nnx.Not(nnx.LoRAParam)), arrays(plain, nnx.Variable)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path])


@pytest.mark.parametrize("base", ["float", "int8"])
def test_abba_starts_from_the_singular_vectors_of_the_kernel(base):
    model = adapted(
        Attention(nnx.Rngs(0)), tokens(), trained=False, init_weights="abba", **BASES[base]
    )
    factors = (model.mlp.kernel_lora_hada_w1_a, model.mlp.kernel_lora_hada_w1_b)
    got = np.matmul(*(np.asarray(x.get_value()) for x in factors))
    u, s, vt = np.linalg.svd(np.asarray(Attention(nnx.Rngs(0)).mlp.kernel.get_value()).T)
    want = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(got, want / np.sqrt(np.mean(want**2)), atol=0.05)


def test_factors_are_lora_params_beside_the_kernel():
    """Exactly nnx.LoRAParam, under the kernel's name."""
    model = adapted(Attention(nnx.Rngs(0)), tokens())
    shapes = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    }
    assert shapes["query.kernel_lora_hada_w1_a"] == (16, 2)
    assert shapes["out.kernel_lora_hada_w1_b"] == (2, 16)
    assert shapes["mlp.kernel_lora_hada_w2_a"] == (24, 2)
    assert len(shapes) == 12
    assert type(model.mlp.kernel_lora_hada_w1_a) is nnx.LoRAParam


def delta(layer, word):
    """ΔW of a layer in its kernel's shape, by PEFT's formula."""
    w = {
        name: getattr(layer, f"kernel_lora_hada_{name}").get_value()
        for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
        if hasattr(layer, f"kernel_lora_hada_{name}")
    }
    if "t1" in w:
        pairs = [(w[f"t{n}"], w[f"w{n}_a"], w[f"w{n}_b"]) for n in (1, 2)]
        one, two = (jnp.einsum("ij...,ip,jq->pq...", *pair) for pair in pairs)
    else:
        one, two = w["w1_a"] @ w["w1_b"], w["w2_a"] @ w["w2_b"]
    return Layout(word).fold(one * two * 2.0, layer.kernel.shape)  # alpha/r = 4/2


def with_kernel(make, kernel):
    """A new layer with this kernel, and no bias to speak of."""
    layer = make(nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    if layer.bias is not None:
        layer.bias.set_value(jnp.zeros_like(layer.bias.get_value()))
    return layer


def float_twin(make, layer):
    """The float layer with the kernel that a quantised one has."""
    twin = make(nnx.Rngs(0))
    kernel = jax.tree.map(lambda x: x.get_value(), layer.kernel.array, is_leaf=is_variable)
    twin.kernel.set_value(qwix.dequantize(kernel))
    return twin


@pytest.mark.parametrize("strategy", ["auto", "factored", "fused"])
@pytest.mark.parametrize(("layer", "base"), CASES)
def test_value_and_gradients_are_the_formula_s(layer, base, strategy):
    """They equal autodiff of the base's product plus the product with the materialised ΔW."""
    make, word, shape = LAYERS[layer]
    x = normal_array(0, shape)
    new = adapted(make(nnx.Rngs(0)), x, strategy=strategy, **BASES[base])
    plain = quantised(make(nnx.Rngs(0)), x, **BASES[base])
    dequantised = plain if base == "float" else float_twin(make, plain)
    graph, lora, rest = nnx.split(new, nnx.LoRAParam, ...)

    def loss(lora, x):
        return jnp.sin(nnx.merge(graph, lora, rest)(x)).mean()

    def expected(lora, x):
        update = with_kernel(make, delta(nnx.merge(graph, lora, rest), word))
        float_product = dequantised(x)  # has the gradient, the quantised product the value
        rounded = jax.lax.stop_gradient(plain(x) - float_product)
        return jnp.sin(float_product + rounded + update(x)).mean()

    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, x)
    want = jax.jit(jax.value_and_grad(expected, (0, 1)))(lora, x)
    for ours, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(abs(reference).max())
        np.testing.assert_allclose(ours, reference, atol=2e-5 * scale)


def test_gradients_in_float64():
    """On a float64 base the factors are float64, and so are their gradients."""
    with jax.enable_x64(True):
        x = normal_array(0, (3, 5, 16), jnp.float64)
        layer = nnx.Linear(16, 24, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        new = adapted(layer, x)
        graph, lora, rest = nnx.split(new, nnx.LoRAParam, ...)

        def expected(lora):
            kernel = layer.kernel.get_value() + delta(nnx.merge(graph, lora, rest), "io")
            return jnp.sin(x @ kernel).mean()

        got = jax.grad(lambda lora: jnp.sin(nnx.merge(graph, lora, rest)(x)).mean())(lora)
        for ours, want in zip(
            jax.tree.leaves(got), jax.tree.leaves(jax.grad(expected)(lora)), strict=True
        ):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, want, rtol=1e-10)


@pytest.mark.parametrize("base", ["float", "int8 activations"])
def test_cp_cores(base):
    """`use_effective_conv2d` gives convolutions PEFT's cores."""
    make, word, shape = LAYERS["conv"]
    x = normal_array(0, shape)
    new = adapted(make(nnx.Rngs(0)), x, use_effective_conv2d=True, **BASES[base])
    assert new.kernel_lora_hada_t1.get_value().shape == (2, 2, 3, 3)
    plain = quantised(make(nnx.Rngs(0)), x, **BASES[base])
    want = plain(x) + with_kernel(make, delta(new, word))(x)
    np.testing.assert_allclose(new(x), want, atol=2e-4)


@pytest.mark.parametrize("base", BASES)
def test_training_changes_only_the_adapter(base):
    """After steps over nnx.LoRAParam all base arrays are as they were, to the bit."""
    x = tokens()
    model = adapted(Attention(nnx.Rngs(0)), x, trained=False, **BASES[base])
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    before, start = arrays(model, nnx.Not(nnx.LoRAParam)), arrays(model, nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return ((model(x) - 1) ** 2).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    for path, value in arrays(model, nnx.Not(nnx.LoRAParam)).items():
        np.testing.assert_array_equal(value, before[path])
    changed = arrays(model, nnx.LoRAParam)
    assert sum(not np.array_equal(changed[path], start[path]) for path in start) == len(start)


def test_equals_inject_on_the_float_base():
    """Given the same factors, a float base with the provider is `loha_jax.nnx.inject`'s model."""
    x = tokens()
    ours = adapted(Attention(nnx.Rngs(0)), x)
    config = loha_jax.LoHaConfig(r=2, alpha=4, target_modules=["query", "out", "mlp"])
    theirs = loha_jax.nnx.inject(Attention(nnx.Rngs(0)), config, rngs=nnx.Rngs(3))
    values = nnx.state(ours, nnx.LoRAParam)
    nnx.update(theirs, values)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)
    loss = nnx.value_and_grad(
        lambda model: jnp.sin(model(x)).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )
    for got, want in zip(*(jax.tree.leaves(loss(m)[1]) for m in (ours, theirs)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_bfloat16():
    """In bfloat16 the update is added in float32: the sum is rounded once."""
    x = tokens(jnp.bfloat16)
    layer = nnx.Linear(16, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    new = adapted(layer, x, weight_qtype="int8")
    plain = quantised(layer, x, weight_qtype="int8")
    update = x.astype(jnp.float32) @ delta(new, "io")
    want = plain(x).astype(jnp.float32) + update
    assert new(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(new(x).astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_images():
    """A model of convolutions, in the quantised and in the float form."""
    for fields in ({}, BASES["int8 activations"]):
        x = images()
        new = adapted(Images(nnx.Rngs(0)), x, trained=False, **fields)
        plain = quantised(Images(nnx.Rngs(0)), x, **fields)
        np.testing.assert_array_equal(new(x), plain(x))
