"""The cost of a training step over the frozen base, by XLA's own counts.

Nothing is run.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import loha_jax

WIDTH, LAYERS, RANK = 2048, 4, 8


def forward(params, x):
    for name in sorted(params, key=int):
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def base_shapes():
    return {
        str(n): {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)} for n in range(LAYERS)
    }


def compiled_step(tokens, strategy=None, base=None):
    """Value and gradient of the trained arrays and the input.

    Of the input alone for the frozen base.
    """
    base = base or base_shapes()
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.float32)
    if strategy is None:

        def step(params, x):
            return jax.value_and_grad(lambda x: forward(params, x).sum())(x)

        return jax.jit(step).lower(base, x).compile()
    config = loha_jax.LoHaConfig(r=RANK, target_modules=list(base))
    trainable, frozen = loha_jax.partition(loha_jax.inject(base, config, key=jax.random.key(0)))
    apply = loha_jax.adapt(forward, strategy=strategy)

    def step(trainable, frozen, x):
        return jax.value_and_grad(
            lambda t, x: apply(loha_jax.combine(t, frozen), x).sum(), argnums=(0, 1)
        )(trainable, x)

    return jax.jit(step).lower(trainable, frozen, x).compile()


def kernel_shaped_arrays(compiled):
    """Arrays of a kernel's shape that the program makes, anywhere in it."""
    made = re.findall(rf"= f32\[{WIDTH},{WIDTH}\]\S* (\w[\w-]*)\(", compiled.as_text())
    return [operation for operation in made if operation not in ("parameter", "get-tuple-element")]


@pytest.mark.parametrize("strategy", ["auto", "factored"])
def test_flops_of_dense_layers(strategy):
    """Flops of four dense layers stay within 12 percent of the frozen base."""
    frozen, adapted = compiled_step(2048), compiled_step(2048, strategy)
    assert adapted.cost_analysis()["flops"] <= 1.12 * frozen.cost_analysis()["flops"]
    extra = (
        adapted.memory_analysis().temp_size_in_bytes - frozen.memory_analysis().temp_size_in_bytes
    )
    assert extra < 4 * WIDTH * WIDTH  # less than one ΔW; PEFT keeps one per layer


def test_the_factored_step_makes_no_array_of_a_kernels_shape():
    assert not kernel_shaped_arrays(compiled_step(1024, "auto"))
    assert kernel_shaped_arrays(
        compiled_step(1024, "dense")
    )  # the search finds them where they are


def attention(params, x):
    """Add attention of four heads and a gated product to x: `[sequences, tokens, features]`."""

    def normalised(x):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    h = normalised(x)
    q, k, v = ((h @ params[name]["kernel"]).reshape(*x.shape[:2], 4, -1) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ params["o"]["kernel"]
    h = normalised(x)
    gated = jax.nn.silu(h @ params["gate"]["kernel"]) * (h @ params["up"]["kernel"])
    return x + gated @ params["down"]["kernel"]


def test_a_transformer_stores_no_second_array_of_an_activation():
    """Readers of a cotangent do not recompute it, which would store the terms of its sum."""
    features, wide, tokens, layers = 256, 704, 256, 2
    shapes = dict.fromkeys("qkvo", (features, features))
    shapes |= {"gate": (features, wide), "up": (features, wide), "down": (wide, features)}
    base = {
        str(n): {
            name: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for name, s in shapes.items()
        }
        for n in range(layers)
    }
    config = loha_jax.LoHaConfig(r=RANK, target_modules=list(shapes))
    trainable, frozen = loha_jax.partition(loha_jax.inject(base, config, key=jax.random.key(0)))
    x = jax.ShapeDtypeStruct((2, tokens // 2, features), jnp.float32)

    def loss(x, params):
        for n in range(layers):
            x = attention(params[str(n)], x)
        return x.sum()

    def adapted_loss(x, trainable, frozen):
        return loha_jax.adapt(loss)(x, loha_jax.combine(trainable, frozen))

    plain = jax.jit(jax.grad(loss)).lower(x, base).compile()
    adapted = jax.jit(jax.grad(adapted_loss, (0, 1))).lower(x, trainable, frozen).compile()
    extra = (
        adapted.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    )
    # h of each product, KA and KB.
    needed = 4 * layers * RANK**2 * sum(tokens + i + o for i, o in shapes.values())
    assert extra <= needed


def extra_kernels(strategy, layers):
    """Temporary memory over the frozen step's, in kernels, for a few tokens."""
    shapes = {
        str(n): {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)} for n in range(layers)
    }
    adapted = compiled_step(64, strategy, shapes).memory_analysis().temp_size_in_bytes
    frozen = compiled_step(64, None, shapes).memory_analysis().temp_size_in_bytes
    return (adapted - frozen) / (4 * WIDTH * WIDTH)


def test_the_fused_step_forms_one_update_at_a_time():
    """Up to four arrays of a kernel's shape live at once, in one layer.

    They are the two Hadamard factors, their sum and the gradient.
    """
    assert extra_kernels("fused", 2) <= 4
    assert extra_kernels("fused", 6) - extra_kernels("fused", 2) < 0.5
    assert (
        extra_kernels("dense", 6) - extra_kernels("dense", 2) >= 4
    )  # W + ΔW is kept in each layer
    # Khatri-Rao factors and their gradients, [r², 2048] each: no array of a kernel's shape.
    assert extra_kernels("factored", 6) <= 6 * 8 * RANK**2 / WIDTH


def test_fused_inference_makes_no_array_of_a_kernels_shape():
    """On one CPU it forms ΔW in blocks, one after the other."""
    base = base_shapes()
    config = loha_jax.LoHaConfig(r=RANK, target_modules=list(base))
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    made = {}
    for strategy in ("fused", "dense"):
        compiled = (
            jax.jit(loha_jax.adapt(forward, strategy=strategy, training=False))
            .lower(params, x)
            .compile()
        )
        made[strategy] = kernel_shaped_arrays(compiled)
    assert not made["fused"]
    assert made["dense"]


def conv_step(strategy, layers, cp, width=512):
    kernels = {
        str(n): {"kernel": jax.ShapeDtypeStruct((3, 3, width, width), jnp.float32)}
        for n in range(layers)
    }
    x = jax.ShapeDtypeStruct((1, 4, 4, width), jnp.float32)

    def forward(params, x):
        for n in range(layers):
            kernel = jnp.asarray(params[str(n)]["kernel"])
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jnp.tanh(
                jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            )
        return x

    if strategy is None:
        return (
            jax.jit(jax.value_and_grad(lambda x, p: forward(p, x).sum()))
            .lower(x, kernels)
            .compile()
        )
    config = loha_jax.LoHaConfig(r=2, target_modules=list(kernels), use_effective_conv2d=cp)
    trainable, frozen = loha_jax.partition(
        loha_jax.inject(kernels, config, key=jax.random.key(0), layouts={r"\d": "kkio"})
    )
    apply = loha_jax.adapt(forward, strategy=strategy)

    def loss(t, x, f):
        return apply(loha_jax.combine(t, f), x).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(trainable, x, frozen).compile()


@pytest.mark.parametrize("cp", [False, True], ids=["flat", "cp"])
def test_convolutions_hold_no_more_than_products(cp):
    kernel_bytes = 4 * 9 * 512 * 512

    def extra(strategy, layers):
        sizes = [
            conv_step(s, layers, cp).memory_analysis().temp_size_in_bytes for s in (strategy, None)
        ]
        return (sizes[0] - sizes[1]) / kernel_bytes

    assert extra("factored", 4) < 0.5
    assert extra("fused", 4) - extra("fused", 2) < 0.5
    assert extra("dense", 4) - extra("dense", 2) > 1.5  # a ΔW per layer
    kernel_shaped = r"= f32\[(?:3,3,512,512|512,512,3,3|512,4608|4608,512)\]\S* (\w[\w-]*)\("
    made, frozen = (
        sorted(re.findall(kernel_shaped, conv_step(s, 2, cp).as_text())) for s in ("factored", None)
    )
    assert made == frozen


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_decoding_costs_at_most_10_percent_more(tokens):
    """PEFT builds ΔW again at every call: as many bytes as the kernel, several times."""
    kernel = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    params = loha_jax.inject(
        {"q": {"kernel": kernel}},
        loha_jax.LoHaConfig(r=8, target_modules=["q"]),
        key=jax.random.key(0),
    )
    x = jax.ShapeDtypeStruct((tokens, 4096), jnp.float32)

    def fn(p, x):
        return x @ p["q"]["kernel"]

    frozen = jax.jit(fn).lower({"q": {"kernel": kernel}}, x).compile().cost_analysis()
    adapted = jax.jit(loha_jax.adapt(fn, training=False)).lower(params, x).compile().cost_analysis()
    assert adapted["flops"] <= 1.1 * frozen["flops"]
    assert adapted["bytes accessed"] <= 1.1 * frozen["bytes accessed"]


def test_auto_is_the_cheaper():
    """Auto is the cheaper of factored and fused by XLA's count."""
    config = loha_jax.LoHaConfig(r=32, target_modules=["0"])
    kernel = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    params = loha_jax.inject({"0": {"kernel": kernel}}, config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)
    x = jax.ShapeDtypeStruct((2048, 768), jnp.float32)

    def flops(strategy):
        apply = loha_jax.adapt(lambda p, x: x @ p["0"]["kernel"], strategy=strategy)

        def step(t, f, x):
            return jax.value_and_grad(
                lambda t, x: apply(loha_jax.combine(t, f), x).sum(), argnums=(0, 1)
            )(t, x)

        return jax.jit(step).lower(trainable, frozen, x).compile().cost_analysis()["flops"]

    costs = {strategy: flops(strategy) for strategy in ("auto", "factored", "fused")}
    assert costs["auto"] == costs["fused"] < costs["factored"]
