"""Models of Flax with weight decomposition train its norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_arrays import normal_array

import loha_jax
from loha_jax import LycorisConfig

KEY = jax.random.key(0)


def test_nnx_and_linen_models_train_the_norms():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Linear(4, 6, rngs=rngs)

        def __call__(self, x):
            return self.q(x)

    config = LycorisConfig(
        r=2, target_modules=["q"], weight_decompose=True, use_scalar=True, init_weights="lycoris"
    )
    model = loha_jax.nnx.inject(Model(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    x = normal_array(0, (3, 4))
    state = nnx.state(model, loha_jax.nnx.LoHaParam)
    assert {path[-1] for path, _ in nnx.to_flat_state(state)} >= {
        "kernel_lora_dora_scale",
        "kernel_lora_scalar",
        "kernel_lora_hada_w1_a",
    }
    gradient = nnx.grad(lambda m, x: m(x).sum(), argnums=nnx.DiffState(0, loha_jax.nnx.LoHaParam))(
        model, x
    )
    flat = {path[-1]: jnp.abs(value[...]).max() for path, value in nnx.to_flat_state(gradient)}
    assert flat["kernel_lora_dora_scale"] > 0
    assert flat["kernel_lora_scalar"] > 0
    module = nn.Dense(6)
    tree = {"q": module.init(KEY, x)["params"]}
    params = loha_jax.inject(tree, config, key=KEY)
    np.testing.assert_allclose(
        loha_jax.adapt(module.apply)({"params": params["q"]}, x),
        module.apply({"params": tree["q"]}, x),
        rtol=1e-5,
    )
