"""Linen models with LoHa layers of their own, beside the real PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from random_arrays import normal_array

from loha_jax import interop, linen
from loha_jax.linen import LoHaConv, LoHaDense

KEY = jax.random.key(0)


class ToPeft(nn.Module):
    """Convolutions and linear layers with ranks and alphas of their own."""

    cores: bool = True

    @nn.compact
    def __call__(self, x):
        conv = {"use_effective_conv2d": self.cores, "init_weights": False, "r": 2}
        x = nn.relu(LoHaConv(6, (3, 3), padding="VALID", alpha=4, name="conv", **conv)(x))
        x = nn.relu(LoHaConv(6, (1, 1), alpha=4, name="point", **conv)(x)).mean((1, 2))
        x = LoHaDense(5, r=3, alpha=2, init_weights=False, name="mid")(x)
        return nn.Dense(3, name="head")(nn.tanh(x))


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.point = torch.nn.Conv2d(6, 6, 1)
        self.mid = torch.nn.Linear(6, 5)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.conv(x)))).mean((2, 3))
        return self.head(torch.tanh(self.mid(x)))


def twin_of(params):
    twin = Twin()
    state = {}
    for name, p in params.items():
        kernel = np.asarray(p["kernel"])
        state[f"{name}.weight"] = torch.tensor(
            kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        )
        state[f"{name}.bias"] = torch.tensor(np.asarray(p["bias"]))
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.slow
@pytest.mark.parametrize("cores", [False, True], ids=["flat", "cores"])
def test_adapters_of_linen_models_both_ways(cores, tmp_path):
    """The real PEFT opens a Linen model's adapter and its own comes back."""
    model, x = ToPeft(cores), normal_array(0, (2, 5, 5, 4))
    image = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    params = model.init(KEY, x)["params"]
    adapted = linen.to_adapted(params, model.init, KEY, x)
    interop.save_peft(tmp_path / "out", adapted)
    opened = peft.PeftModel.from_pretrained(twin_of(params), tmp_path / "out", is_trainable=True)
    with torch.no_grad():
        got = opened(image).numpy()
    np.testing.assert_allclose(got, model.apply({"params": params}, x), rtol=1e-4, atol=1e-5)
    saved = peft.get_peft_model_state_dict(opened)
    assert {k.removeprefix("base_model.model.") for k in saved} == {
        f"{layer}.{name}" for layer, p in params.items() for name in p if name.startswith("hada")
    }

    generator = torch.Generator().manual_seed(3)  # trained elsewhere
    with torch.no_grad():
        for name, parameter in opened.named_parameters():
            if "hada" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        want = opened(image).numpy()
    opened.save_pretrained(tmp_path / "back")
    loaded = interop.load_peft(tmp_path / "back", adapted, adapter_name="loaded")
    back = linen.from_adapted(loaded, model.init, KEY, x)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(model.apply({"params": back}, x), want, rtol=1e-4, atol=1e-4)
