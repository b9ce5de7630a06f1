"""LoRA arrays in the model's own layout against the merged kernels, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_arrays import normal

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop

pytestmark = pytest.mark.usefixtures("x64")

# layout: (shape, einsum of the kernel from lora_a and lora_b)
KERNELS = {
    "io": ((6, 5), "ik,ko->io"),
    "oi": ((6, 5), "ik,ko->oi"),
    "ioo": ((6, 2, 3), "ik,kab->iab"),
    "iio": ((2, 3, 6), "abk,ko->abo"),
    "i1 i0 o": ((2, 3, 6), "abk,ko->abo"),
    "i o1 o2 o0": ((6, 2, 2, 3), "ik,kabc->iabc"),
    "i1 s i0 o": ((2, 4, 2, 6), "asbk,kso->asbo"),
    "sio": ((4, 6, 5), "sik,sko->sio"),
    "isoo": ((6, 4, 2, 3), "isk,ksab->isab"),
    "iios": ((2, 3, 6, 4), "abks,kos->abos"),
    "sios": ((4, 6, 5, 3), "sikt,skot->siot"),
    "i o s1 s0": ((6, 5, 4, 3), "ikts,kots->iots"),
}


def adapted(word):
    shape = KERNELS[word][0]
    config = LoHaConfig(r=2, alpha=5, target_modules=r".*\bq", init_weights=False)
    base = {"block": {"q": {"kernel": jnp.asarray(normal(0, *shape))}, "bias": jnp.ones(3)}}
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={".*q": word})
    return base, loha_jax.scale(params, {"default": 0.7})


def update(base, params):
    return loha_jax.merge(params)["block"]["q"]["kernel"] - base["block"]["q"]["kernel"]


@pytest.mark.parametrize("word", KERNELS)
def test_the_product_is_the_update(word):
    base, params = adapted(word)
    lora = jax.jit(interop.as_lora)(params)
    assert list(lora) == ["block"]
    a, b = (lora["block"]["q"][f"kernel_lora_{side}"] for side in "ab")
    found = jnp.einsum(KERNELS[word][1], a, b)
    np.testing.assert_allclose(found, update(base, params), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
@pytest.mark.parametrize("word", ["oi", "sio"])
def test_a_smaller_rank_is_the_best(word, rank):
    base, params = adapted(word)
    lora = jax.jit(lambda params: interop.as_lora(params, rank=rank))(params)
    a, b = (lora["block"]["q"][f"kernel_lora_{side}"] for side in "ab")
    assert a.shape[-1] == min(rank, 4)
    want = np.asarray(update(base, params))
    missing = jnp.einsum(KERNELS[word][1], a, b) - want
    values = np.linalg.svd(want, compute_uv=False)
    lost = np.linalg.norm(values[..., rank:], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(missing, axis=(-2, -1)), lost, atol=1e-6)


def test_ranks_that_differ_in_a_stack():
    shape = KERNELS["sio"][0]
    base = {"layers": {"q": {"kernel": jnp.asarray(normal(0, *shape))}}}
    config = LoHaConfig(
        r=2, target_modules=["q"], rank_pattern={r"layers\.1\.q": 3}, init_weights=False
    )
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={".*q": "sio"})
    lora = interop.as_lora(params)["layers"]["q"]
    want = loha_jax.merge(params)["layers"]["q"]["kernel"] - base["layers"]["q"]["kernel"]
    np.testing.assert_allclose(lora["kernel_lora_a"] @ lora["kernel_lora_b"], want, atol=1e-6)


def test_an_nnx_model():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    before = model.kernel.get_value()
    config = LoHaConfig(r=2, target_modules=r".*", init_weights=False)
    loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(1))
    lora = interop.as_lora(model)
    change = loha_jax.merge(nnx.clone(model)).kernel.get_value() - before
    np.testing.assert_allclose(lora["kernel_lora_a"] @ lora["kernel_lora_b"], change, atol=1e-6)


def test_what_is_no_lora_is_refused():
    _, params = adapted("io")
    with pytest.raises(ValueError, match="`rank` should be a positive integer"):
        interop.as_lora(params, rank=0)
    with pytest.raises(ValueError, match="other"):
        interop.as_lora(params, "other")
    base = {"q": {"kernel": jnp.ones((3, 3, 4, 4))}, "k": {"kernel": jnp.ones((4, 4))}}
    config = LoHaConfig(r=2, target_modules=["q"])
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={"q": "kkio"})
    with pytest.raises(ValueError, match="q is a convolution"):
        interop.as_lora(params)
    config = LoHaConfig(r=2, target_modules=["k"], modules_to_save=["q"])
    params = loha_jax.inject(base, config, key=jax.random.key(0), layouts={"q": "kkio"})
    with pytest.raises(ValueError, match=r"trained copies of q\.weight \(modules_to_save\)"):
        interop.as_lora(params)
    config = LycorisConfig(r=2, target_modules=["k"], weight_decompose=True)
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="k has a weight decomposition"):
        interop.as_lora(params)
