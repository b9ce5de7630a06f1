"""Embedding tables: neither PEFT nor LyCORIS has a LoHa of one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lycoris
import peft
import pytest
import torch
from flax import nnx

import loha_jax
from loha_jax import LoHaConfig, interop

KEY = jax.random.key(0)
CONFIG = LoHaConfig(r=2, target_modules=["embed"], init_weights=False)


class NnxModel(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(6, 4, rngs=nnx.Rngs(0))


MODELS = {
    "linen's names": lambda: {"embed": {"embedding": jnp.ones((6, 4))}},
    "torch's names": lambda: {"embed.weight": jnp.ones((6, 4))},
    "nnx": NnxModel,
    "equinox": lambda: {"embed": eqx.nn.Embedding(6, 4, key=KEY)},
}


def torchs():
    return torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(6, 4), "q": torch.nn.Linear(4, 4, bias=False)}
    )


def test_peft_refuses_them_and_lycoris_passes_them_by(monkeypatch):
    with pytest.raises(TypeError, match=r"Embedding.* not supported"):
        peft.get_peft_model(torchs(), peft.LoHaConfig(r=2, target_modules=["embed"]))
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_NAME", ["embed", "q"])
    network = lycoris.create_lycoris(torchs(), linear_dim=2, algo="loha")
    assert [adapter.lora_name for adapter in network.loras] == ["lycoris_q"]


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_is_written_with_a_warning(name, tmp_path):
    params = loha_jax.inject(MODELS[name](), CONFIG, key=KEY)
    with pytest.warns(UserWarning, match=r"PEFT.*embedding tables \(embed\).*`load_peft`"):
        interop.save_peft(tmp_path / "adapter", params)
    with pytest.warns(UserWarning, match=r"LyCORIS.*embedding tables \(embed\).*`load_lycoris`"):
        interop.save_lycoris(tmp_path / "a.safetensors", params)


def test_a_head_that_is_tied_to_a_table_is_written_in_silence(tmp_path):
    config = LoHaConfig(r=2, target_modules=["lm_head"], init_weights=False)
    base, names = {"embed": {"embedding": jnp.ones((6, 4))}}, {"embed": "lm_head"}
    params = loha_jax.inject(base, config, key=KEY, names=names)
    interop.save_peft(tmp_path / "adapter", params)
    interop.save_lycoris(tmp_path / "a.safetensors", params)
