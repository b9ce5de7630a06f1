"""What a training step costs over the frozen base, by XLA's own counts. Nothing is run."""

import re

import jax
import jax.numpy as jnp
import pytest

import loha_jax

WIDTH, LAYERS, RANK = 2048, 4, 8


def forward(params, x):
    for n in range(LAYERS):
        x = jnp.tanh(x @ params[str(n)]["kernel"])
    return x


def base_shapes():
    return {str(n): {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)} for n in range(LAYERS)}


def compiled_step(tokens, strategy=None):
    """Value and gradient of the trained arrays and the input; of the input alone for the frozen base."""
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.float32)
    if strategy is None:
        step = lambda params, x: jax.value_and_grad(lambda x: forward(params, x).sum())(x)  # noqa: E731
        return jax.jit(step).lower(base_shapes(), x).compile()
    config = loha_jax.LoHaConfig(r=RANK, target_modules=[str(n) for n in range(LAYERS)])
    trainable, frozen = loha_jax.partition(loha_jax.inject(base_shapes(), config, key=jax.random.key(0)))
    apply = loha_jax.adapt(forward, strategy=strategy)

    def step(trainable, frozen, x):
        return jax.value_and_grad(lambda t, x: apply(loha_jax.combine(t, frozen), x).sum(), argnums=(0, 1))(
            trainable, x
        )

    return jax.jit(step).lower(trainable, frozen, x).compile()


def kernel_shaped_arrays(compiled):
    """Arrays of a kernel's shape that the program makes, anywhere in it."""
    made = re.findall(rf"= f32\[{WIDTH},{WIDTH}\]\S* (\w[\w-]*)\(", compiled.as_text())
    return [operation for operation in made if operation != "parameter"]


@pytest.mark.parametrize("strategy", ["auto", "factored"])
def test_flops_of_four_dense_layers_stay_within_12_percent_of_the_frozen_base(strategy):
    frozen, adapted = compiled_step(2048), compiled_step(2048, strategy)
    assert adapted.cost_analysis()["flops"] <= 1.12 * frozen.cost_analysis()["flops"]
    extra = adapted.memory_analysis().temp_size_in_bytes - frozen.memory_analysis().temp_size_in_bytes
    assert extra < 4 * WIDTH * WIDTH  # less than one ΔW; PEFT keeps one per layer


def test_the_factored_step_makes_no_array_of_a_kernels_shape():
    assert not kernel_shaped_arrays(compiled_step(1024, "auto"))
    assert kernel_shaped_arrays(compiled_step(1024, "dense"))  # the search finds them where they are


def test_auto_is_the_cheaper_of_factored_and_fused_by_xlas_count():
    config = loha_jax.LoHaConfig(r=32, target_modules=["0"])
    kernel = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    params = loha_jax.inject({"0": {"kernel": kernel}}, config, key=jax.random.key(0))
    trainable, frozen = loha_jax.partition(params)
    x = jax.ShapeDtypeStruct((2048, 768), jnp.float32)

    def flops(strategy):
        apply = loha_jax.adapt(lambda p, x: x @ p["0"]["kernel"], strategy=strategy)

        def step(t, f, x):
            return jax.value_and_grad(lambda t, x: apply(loha_jax.combine(t, f), x).sum(), argnums=(0, 1))(t, x)

        return jax.jit(step).lower(trainable, frozen, x).compile().cost_analysis()["flops"]

    costs = {strategy: flops(strategy) for strategy in ("auto", "factored", "fused")}
    assert costs["auto"] == costs["fused"] < costs["factored"]
