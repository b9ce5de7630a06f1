"""The cost of a training step over the frozen base, by XLA's own counts.

Nothing is run.
"""

import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import loha_jax
from loha_jax.transform.options import OBSERVER, Options
from loha_jax.transform.update_alone import update_alone

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


# Million cycles of a Linear layer's step, factored and fused, by the compilers of TPUs: device,
# width, tokens, r (benchmarks/README.md).
CYCLES = {
    ("TPU v5 lite", 4096, 4096, 8): (2.519, 3.271),
    ("TPU v5 lite", 4096, 4096, 16): (2.776, 3.474),
    ("TPU v5 lite", 4096, 4096, 32): (4.044, 4.426),
    ("TPU v5 lite", 4096, 4096, 64): (11.423, 5.098),
    ("TPU v5 lite", 1024, 4096, 16): (0.329, 0.278),
    ("TPU v5 lite", 1024, 4096, 64): (2.026, 0.261),
    ("TPU v5 lite", 4096, 512, 16): (0.430, 0.584),
    ("TPU v5 lite", 4096, 512, 32): (0.760, 0.839),
    ("TPU v5 lite", 2048, 2048, 16): (0.472, 0.478),
    ("TPU v5 lite", 2048, 2048, 32): (0.824, 0.526),
    ("TPU v5 lite", 4096, 16384, 32): (15.730, 16.431),
    ("TPU v5 lite", 1024, 512, 16): (0.0756, 0.0723),
    ("TPU v5 lite", 512, 64, 8): (0.0231, 0.0180),
    ("TPU v5 lite", 512, 128, 8): (0.0252, 0.0196),
    ("TPU v5 lite", 768, 64, 8): (0.0269, 0.0225),
    ("TPU v5 lite", 1024, 64, 4): (0.0329, 0.0301),
    ("TPU v5 lite", 1024, 128, 8): (0.0346, 0.0322),
    ("TPU v5 lite", 1024, 255, 8): (0.0457, 0.0397),
    ("TPU v5 lite", 1280, 256, 8): (0.0444, 0.0472),
    ("TPU v5 lite", 1280, 256, 16): (0.0725, 0.0716),
    ("TPU v5 lite", 1280, 512, 8): (0.0733, 0.0718),
    ("TPU v5 lite", 1280, 1024, 8): (0.1161, 0.1094),
    ("TPU v5 lite", 1280, 4096, 8): (0.3579, 0.3290),
    ("TPU v5 lite", 1536, 256, 8): (0.0559, 0.0659),
    ("TPU v5 lite", 1536, 256, 24): (0.1242, 0.1022),
    ("TPU v5 lite", 1536, 512, 16): (0.1257, 0.1208),
    ("TPU v5 lite", 1536, 512, 22): (0.1588, 0.1286),
    ("TPU v5 lite", 1536, 1024, 8): (0.1426, 0.1583),
    ("TPU v5 lite", 1536, 1024, 16): (0.1871, 0.1941),
    ("TPU v5 lite", 1664, 4096, 8): (0.5368, 0.5062),
    ("TPU v5 lite", 1664, 16384, 8): (2.017, 1.797),
    ("TPU v5 lite", 1773, 256, 8): (0.0643, 0.0826),
    ("TPU v5 lite", 1773, 256, 16): (0.0963, 0.1096),
    ("TPU v5 lite", 1773, 512, 16): (0.1479, 0.1554),
    ("TPU v5 lite", 1773, 1024, 8): (0.1757, 0.2058),
    ("TPU v5 lite", 1773, 1024, 16): (0.2253, 0.2477),
    ("TPU v5 lite", 1773, 4096, 8): (0.5941, 0.8560),
    ("TPU v5 lite", 1773, 16384, 8): (3.381, 2.815),
    ("TPU v5 lite", 2048, 512, 24): (0.2312, 0.2436),
    ("TPU v5", 512, 128, 8): (0.0299, 0.0296),
    ("TPU v5", 1024, 256, 16): (0.0568, 0.0631),
    ("TPU v5", 1536, 512, 22): (0.1102, 0.1283),
    ("TPU v6 lite", 1536, 512, 22): (0.0710, 0.0705),
    ("TPU v5", 4096, 4096, 32): (2.527, 2.360),
    ("TPU v5", 1024, 4096, 16): (0.214, 0.183),
    ("TPU v5", 1024, 512, 16): (0.0688, 0.0716),
    ("TPU v5", 2048, 2048, 16): (0.266, 0.312),
    ("TPU v6 lite", 4096, 4096, 16): (0.949, 1.494),
    ("TPU v6 lite", 4096, 4096, 32): (1.381, 1.875),
    ("TPU v6 lite", 4096, 512, 32): (0.301, 0.367),
    ("TPU v6 lite", 1024, 4096, 16): (0.134, 0.137),
    ("TPU v6 lite", 1024, 512, 16): (0.0423, 0.0501),
    ("TPU v6 lite", 2048, 2048, 16): (0.178, 0.212),
    # Over the frozen layer's.
    ("TPU v5 lite", 1024, 256, 8): (2.307, 1.886),
    ("TPU v5 lite", 1024, 512, 8): (2.045, 1.637),
    ("TPU v5 lite", 1024, 1024, 4): (1.646, 1.628),
    ("TPU v5 lite", 1024, 4096, 4): (1.600, 1.406),
    ("TPU v5 lite", 1024, 4096, 8): (1.614, 1.396),
    ("TPU v5 lite", 1024, 16384, 8): (1.623, 1.210),
    ("TPU v5 lite", 512, 4096, 8): (1.723, 1.366),
    ("TPU v5 lite", 1536, 4096, 8): (1.446, 1.364),
    ("TPU v5 lite", 1536, 16384, 8): (1.417, 1.224),
    ("TPU v5 lite", 2048, 4096, 8): (1.337, 1.328),
    ("TPU v5 lite", 2048, 16384, 8): (1.436, 1.482),
    ("TPU v5", 1024, 256, 8): (3.235, 3.654),
    ("TPU v5", 1024, 512, 8): (2.779, 2.799),
    ("TPU v5", 1024, 2048, 8): (2.081, 2.100),
    ("TPU v5", 1024, 4096, 4): (1.948, 1.890),
    ("TPU v5", 1024, 4096, 8): (1.862, 1.769),
    ("TPU v5", 1024, 16384, 8): (1.780, 1.458),
    ("TPU v5", 512, 4096, 8): (2.350, 1.802),
    ("TPU v5", 1536, 4096, 8): (1.572, 1.591),
    ("TPU v5", 1536, 16384, 8): (1.744, 1.888),
    ("TPU v5", 2048, 4096, 8): (1.419, 1.539),
    ("TPU v5", 2048, 16384, 8): (1.506, 1.807),
    ("TPU v5 lite", 8192, 4096, 8): (1.105, 1.740),
    ("TPU v5 lite", 8192, 4096, 32): (1.425, 1.981),
    ("TPU v5", 8192, 4096, 8): (1.199, 1.825),
    ("TPU v5", 8192, 4096, 32): (1.561, 1.813),
    ("TPU v6 lite", 8192, 4096, 8): (1.217, 2.208),
    ("TPU v6 lite", 8192, 4096, 32): (1.672, 2.441),
    ("TPU v6 lite", 512, 4096, 8): (1.556, 1.625),
    ("TPU v6 lite", 1024, 4096, 8): (1.418, 1.465),
    ("TPU v6 lite", 1024, 16384, 8): (1.470, 1.359),
    ("TPU v6 lite", 1024, 16384, 16): (1.627, 1.580),
    ("TPU v6 lite", 2048, 4096, 8): (1.517, 1.873),
    ("TPU v6 lite", 2048, 16384, 8): (1.789, 2.025),
}


@pytest.mark.filterwarnings("ignore:r = .* allows updates of rank")
@pytest.mark.parametrize(("kind", "width", "tokens", "r"), CYCLES)
def test_auto_is_near_the_cheaper_on_tpus(kind, width, tokens, r, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    config = loha_jax.LoHaConfig(r=r, target_modules=["q"])
    params = {"q": jax.ShapeDtypeStruct((width, width), jnp.bfloat16)}
    params = loha_jax.inject(params, config, key=jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    (use,) = loha_jax.explain(lambda p, x: x @ p["q"], params, x).uses
    factored, fused = CYCLES[kind, width, tokens, r]
    chosen = {"factored": factored, "fused": fused}[use.strategy]
    assert chosen <= 1.1 * min(factored, fused)


def test_small_kernels_are_fused_on_tpus_with_their_base_alone(monkeypatch):
    """Others took more cycles, or were not asked for: float32, convolutions, updates alone."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device])

    def adapted(kernel, layout, dtype=jnp.bfloat16):
        config = loha_jax.LoHaConfig(r=8, target_modules=["q"])
        kernel = {"q": jax.ShapeDtypeStruct(kernel, dtype)}
        return loha_jax.inject(kernel, config, key=jax.random.key(0), layouts={"q": layout})

    def strategy(fn, kernel, x, layout="io", dtype=jnp.bfloat16, **options):
        x = jax.ShapeDtypeStruct(x, dtype)
        (use,) = loha_jax.explain(fn, adapted(kernel, layout, dtype), x, **options).uses
        return use.strategy

    def strategy_alone(kernel, x):
        observer = mock.Mock()
        token = OBSERVER.set(observer)
        jax.eval_shape(
            lambda p, x: update_alone(jnp.dot, x, p["q"], Options()),
            adapted(kernel, "io"),
            jax.ShapeDtypeStruct(x, jnp.bfloat16),
        )
        OBSERVER.reset(token)
        return observer.computed.call_args.args[2]

    def convolution(p, x):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["q"], (1, 1), "SAME", dimension_numbers=axes)

    def product(p, x):
        return x @ p["q"]

    shapes = (1024, 1024), (4096, 1024)
    assert strategy(product, *shapes) == "fused"
    assert strategy(product, *shapes, forward_mode=True) == "factored"
    in_float32 = loha_jax.adapt(product, compute_dtype="float32")  # on v5p up to 1.137 x factored
    assert strategy(in_float32, *shapes) == "factored"
    # By the compiler in float32: 1.282 x the frozen layer's cycles factored, 1.587 x fused.
    assert strategy(product, *shapes, dtype=jnp.float32) == "factored"
    assert strategy_alone((1024, 1024), (4096, 1024)) == "factored"
    assert strategy(convolution, (3, 3, 320, 320), (4, 64, 64, 320), "kkio") == "factored"
