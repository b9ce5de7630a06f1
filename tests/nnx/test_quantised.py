"""NNX models whose variables hold quantised kernels, computed by `adapt`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, ScaledArray, interop

X = normal_array(0, (5, 8))
CONFIG = LoHaConfig(r=2, alpha=3, target_modules=["up"], init_weights=False)


class MLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def models():
    """A model with int8 kernels, adapted and only quantised, and the same on a float base."""
    packed, floats = MLP(), MLP()
    for name in ("up", "down"):
        kernel = getattr(packed, name).kernel.get_value()
        scale = abs(kernel).max(0, keepdims=True) / 127
        values = jnp.round(kernel / scale).astype(jnp.int8)
        getattr(packed, name).kernel = nnx.Param(ScaledArray(values, scale))
        getattr(floats, name).kernel.set_value(values * scale)
    for model in (packed, floats):
        loha_jax.nnx.inject(model, CONFIG, rngs=nnx.Rngs(1))
    return packed, floats


def test_calls_and_gradients_are_those_of_the_float_base():
    packed, floats = models()
    np.testing.assert_allclose(packed(X), floats(X), atol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(packed, X), floats(X), atol=1e-6)
    factors = nnx.DiffState(0, nnx.LoRAParam)
    gradients = [nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=factors)(m) for m in models()]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    uses = [loha_jax.explain(lambda m: m(X), model).uses for model in (packed, floats)]
    assert uses[0] == uses[1]
    assert loha_jax.summary(packed).rows[0].kind == "loha (int8)"


def test_training_keeps_the_base():
    model, _ = models()
    before = np.asarray(model.up.kernel.get_value().values)
    optimizer = nnx.Optimizer(model, optax.adam(1e-1), wrt=nnx.LoRAParam)
    factors = nnx.DiffState(0, nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: (m(X) ** 2).mean(), argnums=factors)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(model.up.kernel.get_value().values, before)


@pytest.mark.filterwarnings("ignore:Quantising the merged weights again")
def test_merge_unload_and_files(tmp_path):
    packed, floats = models()
    interop.save_peft(tmp_path, packed)
    tensors = interop.to_peft_state_dict(floats)
    for name, tensor in interop.to_peft_state_dict(packed).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    bare = loha_jax.unload(nnx.clone(packed))
    assert isinstance(bare.up.kernel.get_value(), ScaledArray)
    np.testing.assert_array_equal(interop.load_peft(tmp_path, bare)(X), packed(X))
    merged = loha_jax.merge(nnx.clone(packed))
    assert isinstance(merged.down.kernel.get_value(), ScaledArray)
    np.testing.assert_allclose(loha_jax.dequantise(merged)(X), floats(X), atol=1e-5)
    again = loha_jax.merge(nnx.clone(packed), requantise=True)
    assert again.up.kernel.get_value().values.dtype == jnp.int8
    difference = abs(loha_jax.dequantise(again)(X) - floats(X)).max()
    assert 0 < difference < 0.05 * abs(floats(X)).max()
