"""The `repr` of adapted leaves and of adapters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig

CONFIG = LoHaConfig(r=2, alpha=8, target_modules=["q"], modules_to_save=["head"])


def tree():
    base = {
        "q": {"kernel": jnp.ones((4, 8))},
        "head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)},
    }
    return loha_jax.inject(base, CONFIG, key=jax.random.key(0))


def test_tree_on_one_line_per_leaf():
    assert repr(tree()) == (
        "{'head': {'bias': SavedWeight(f32[3], default: f32[3]), "
        "'kernel': SavedWeight(f32[8,3] io, default: f32[8,3])}, "
        "'q': {'kernel': LoHaWeight(f32[4,8] io, default: r=2 alpha=8)}}"
    )


def test_factors_with_their_arrays():
    assert repr(tree()["q"]["kernel"].adapters["default"]) == (
        "Factors(r=2 alpha=8, hada_w1_a=f32[8,2], hada_w1_b=f32[2,4], hada_w2_a=f32[8,2], "
        "hada_w2_b=f32[2,4])"
    )


def test_inactive_and_scaled_adapters():
    config = LycorisConfig(
        r=4, alpha=0.5, target_modules=["q"], use_scalar=True, weight_decompose=True
    )
    params = loha_jax.inject(tree(), config, key=jax.random.key(1), adapter_name="style")
    leaf = loha_jax.scale(params, {"style": 0.25})["q"]["kernel"]
    assert repr(leaf) == (
        "LoHaWeight(f32[4,8] io, default: r=2 alpha=8 (inactive), style: r=4 alpha=0.5 scaled by "
        "0.25 + scalar + norms)"
    )


def test_ranks_that_differ_in_a_stack():
    config = LoHaConfig(
        r=2, target_modules=["q"], rank_pattern={"1.q": 5}, alpha_pattern={"1.q": 2}
    )
    params = {"layers": {"q": {"kernel": jnp.ones((3, 4, 8), jnp.bfloat16)}}}
    params = loha_jax.inject(params, config, key=jax.random.key(0), layouts={".*": "sio"})
    assert (
        repr(params["layers"]["q"]["kernel"])
        == "LoHaWeight(bf16[3,4,8] sio, default: r=2-5 alpha=2-8)"
    )


@pytest.mark.parametrize("kind", ["shapes", "tracers"])
def test_no_values_are_needed(kind):
    seen = []
    function = jax.jit(lambda params: seen.append(repr(params["q"]["kernel"])))
    if kind == "shapes":
        seen.append(repr(jax.eval_shape(tree)["q"]["kernel"]))
    else:
        function(tree())
    assert seen == ["LoHaWeight(f32[4,8] io, default: r=2 alpha=8)"]


def test_halves_of_a_partition_masks_and_boxes():
    trainable, frozen = loha_jax.partition(tree())
    assert repr(trainable["q"]["kernel"]) == "LoHaWeight(None io, default: r=2 alpha=8)"
    assert repr(frozen["head"]["bias"]) == "SavedWeight(f32[3], default: None)"
    mask = loha_jax.trainable_mask(tree())
    assert repr(mask["head"]["bias"]) == "SavedWeight(False, default: True)"
    box = nn.Partitioned(jnp.ones((4, 8)), ("in", "out"))
    boxed = loha_jax.inject(
        {"q": {"kernel": box}}, LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0)
    )
    assert (
        repr(boxed["q"]["kernel"]) == "LoHaWeight(Partitioned(f32[4,8]) io, default: r=2 alpha=8)"
    )


def test_a_stack_of_which_some_modules_are_adapted():
    config = LoHaConfig(
        r=2, target_modules=["q"], layers_to_transform=[1, 2], layers_pattern="layers"
    )
    base = {"layers": {"attn": {"q": {"kernel": jnp.ones((4, 8, 8))}}}}
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={".*q": "sio"})
    assert loha_jax.summary(params).rows[0].r == "2 in 2 of 4"
    assert "r=2 in 2 of 4 alpha=8" in repr(params["layers"]["attn"]["q"]["kernel"])
