"""The first steps of "calibrated" and "abba" factors move ΔW as those of a LoRA do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loha_jax
from loha_jax.lowrank.layout import Layout

SEEDS = 6
KERNELS = {
    "io": (48, 64),
    "oi": (200, 96),
    "ioo": (64, 4, 12),
    "kkio": (3, 3, 16, 64),
    "kkio, with a core": (3, 3, 16, 64),
    "sio": (3, 48, 64),
}
CASES = [
    *(("io", r) for r in (1, 8, 128)),
    ("kkio, with a core", 4),
    ("sio", 4),
    *(
        pytest.param(kernel, r, marks=pytest.mark.slow)
        for kernel in KERNELS
        for r in (1, 2, 8, 32, 128)
        if kernel != "io"
    ),
]
STEPS = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-3)}


def moved(weight, parts, gradient):
    """ΔW after one step of each optimiser, for each seed and a given gradient of the weight."""

    def one(part):
        slope = jax.grad(lambda p: (weight(p) * gradient).sum())(part)
        start, result = weight(part), {}
        for name, step in STEPS.items():
            updates, _ = step.update(slope, step.init(part), part)
            result[name] = weight(optax.apply_updates(part, updates)) - start
        return result

    return jax.jit(jax.vmap(one))(parts)


def loha_moved(base, gradient, word, r, scheme):
    config = loha_jax.LoHaConfig(
        r=r,
        alpha=r,
        target_modules=["q"],
        init_weights=scheme,
        use_effective_conv2d="core" in word,
    )
    layouts = {"q": word.split(",")[0]}
    trees = [
        loha_jax.inject(base, config, key=jax.random.key(seed), layouts=layouts)
        for seed in range(SEEDS)
    ]
    factors, rest = zip(*map(loha_jax.partition, trees), strict=True)

    def weight(part):
        return loha_jax.merge(loha_jax.combine(part, rest[0]))["q"]["kernel"]

    np.testing.assert_array_equal(weight(factors[0]), base["q"]["kernel"])
    return moved(weight, jax.tree.map(lambda *x: jnp.stack(x), *factors), gradient)


def lora_moved(gradient, word, r):
    """PEFT's LoRA: A uniform in ±1/√fan_in, B zero, and a convolution on the flattened kernel."""
    layout, shape = Layout(word.split(",")[0]), gradient.shape
    stack, (out, *rest) = (
        layout.sizes("s", shape),
        layout.torch_shape(shape)[-2 - word.count("k") :],
    )
    fan_in = math.prod(rest)
    bound = 1 / math.sqrt(fan_in)
    random = np.random.default_rng(1)
    parts = {
        "A": jnp.asarray(random.uniform(-bound, bound, (SEEDS, *stack, r, fan_in))),
        "B": jnp.zeros((SEEDS, *stack, out, r)),
    }
    return moved(lambda p: layout.fold(p["B"] @ p["A"], shape), parts, gradient)


@pytest.mark.filterwarnings("ignore:r = .* allows updates of rank")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["calibrated", "abba"])
@pytest.mark.parametrize(("kernel", "r"), CASES)
def test_the_first_step_is_that_of_a_lora_of_equal_rank(kernel, r, scheme):
    """The size of ΔW and its effect on the loss are within a factor of 2, for each optimiser."""
    random = np.random.default_rng(0)
    shape = KERNELS[kernel]
    base = {"q": {"kernel": jnp.asarray(0.02 * random.standard_normal(shape))}}
    gradient = jnp.asarray(random.standard_normal(shape))
    loha = loha_moved(base, gradient, kernel, r, scheme)
    lora = lora_moved(gradient, kernel.split(",")[0], r)
    for name in STEPS:
        ours, theirs = (np.asarray(x[name]).reshape(SEEDS, -1) for x in (loha, lora))
        size = np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        effect = ours @ np.ravel(gradient) / (theirs @ np.ravel(gradient))
        for ratios in (size, effect):
            assert 1 / 2 < np.exp(np.mean(np.log(ratios))) < 2
