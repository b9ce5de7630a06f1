"""Linen in NNX and NNX in Linen (`flax.nnx.bridge`), as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
from flax import nnx
from flax.nnx import bridge
from framework_training import check_base_and_products, trained

import loha_jax
from loha_jax import LoHaConfig, interop

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 64))
CONFIG = LoHaConfig(r=2, alpha=8, target_modules=["up", "down"], init_weights=False)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.relu(nn.Dense(128, name="up")(x)))


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def peft_outputs(folder, kernels):
    """Return the outputs of the file that PEFT opens on a twin, with and without it."""
    twin = Twin()
    for name, layer in kernels.items():
        getattr(twin, name).weight.data = torch.tensor(np.array(layer["kernel"]).T.copy())
        getattr(twin, name).bias.data = torch.tensor(np.array(layer["bias"]))
    base = twin(torch.tensor(np.array(X))).detach().numpy()
    opened = peft.PeftModel.from_pretrained(twin, folder)
    return opened(torch.tensor(np.array(X))).detach().numpy(), base


def test_to_nnx(tmp_path):
    model = bridge.lazy_init(bridge.ToNNX(LinenMLP(), rngs=nnx.Rngs(0)), X)
    names = ("up", "down")
    kernels = {
        n: {p: np.array(getattr(model, n)[p].get_value()) for p in ("kernel", "bias")}
        for n in names
    }
    base = model(X)
    loha_jax.nnx.inject(model, CONFIG, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return jnp.mean((model(X) - 1.0) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    for name in names:
        for part, before in kernels[name].items():
            np.testing.assert_array_equal(getattr(model, name)[part].get_value(), before)
    uses = str(loha_jax.explain(lambda model, x: model(x), model, X))
    assert "factored" in uses
    assert "dense" not in uses
    interop.save_peft(tmp_path / "adapter", model)
    theirs, plain = peft_outputs(tmp_path / "adapter", kernels)
    np.testing.assert_allclose(base, plain, atol=1e-5)
    np.testing.assert_allclose(model(X), theirs, atol=1e-5)
    assert np.abs(theirs - plain).max() > 0.01
    merged = loha_jax.merge(nnx.clone(model))
    np.testing.assert_allclose(merged(X), theirs, atol=1e-5)
    other = bridge.lazy_init(bridge.ToNNX(LinenMLP(), rngs=nnx.Rngs(0)), X)
    np.testing.assert_allclose(interop.load_peft(tmp_path / "adapter", other)(X), theirs, atol=1e-5)


def test_to_linen(tmp_path):
    module = bridge.to_linen(NNXMLP)
    variables = module.init(KEY, X)
    before = jax.tree.map(np.array, variables)
    adapted = loha_jax.inject(variables, CONFIG, key=KEY)
    apply = loha_jax.adapt(module.apply)
    adapted = trained(adapted, lambda t: jnp.mean((apply(t, X) - 1.0) ** 2))
    check_base_and_products(module.apply, adapted, before, X)
    interop.save_peft(tmp_path / "adapter", adapted)
    theirs, plain = peft_outputs(tmp_path / "adapter", before["params"])
    np.testing.assert_allclose(module.apply(variables, X), plain, atol=1e-5)
    np.testing.assert_allclose(apply(adapted, X), theirs, atol=1e-5)
    np.testing.assert_allclose(module.apply(loha_jax.merge(adapted), X), theirs, atol=1e-5)
    again = interop.load_peft(tmp_path / "adapter", variables)
    np.testing.assert_allclose(apply(again, X), theirs, atol=1e-5)
