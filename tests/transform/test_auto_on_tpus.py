"""The choice of "auto" on TPUs, by what their compilers say (benchmarks/README.md).

Nothing is compiled here: JAX is made to believe in a TPU.
"""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import loha_jax
from loha_jax.transform.options import OBSERVER, Options
from loha_jax.transform.update_alone import update_alone

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
    ("TPU v5 lite", 1280, 256, 8): (0.0489, 0.0520),
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
    ("TPU v6 lite", 1024, 512, 22): (0.0532, 0.0479),
    ("TPU v6 lite", 1024, 1024, 20): (0.0662, 0.0608),
    ("TPU v6 lite", 1536, 512, 22): (0.0710, 0.0705),
    ("TPU v6 lite", 1536, 1024, 24): (0.1047, 0.0929),
    ("TPU v6 lite", 2048, 512, 24): (0.0936, 0.1196),
    ("TPU v6 lite", 2048, 512, 28): (0.1146, 0.1035),
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
    device.device_kind = "TPU v5e"  # another name of the same
    assert strategy(product, (1024, 1024), (64, 1024)) == "fused"
    device.device_kind = "TPU v5 lite"
    # By the compiler in float32: 1.282 x the frozen layer's cycles factored, 1.587 x fused.
    assert strategy(product, *shapes, dtype=jnp.float32) == "factored"
    assert strategy_alone((1024, 1024), (4096, 1024)) == "factored"
    assert strategy(convolution, (3, 3, 320, 320), (4, 64, 64, 320), "kkio") == "factored"
