"""Embedding tables: neither PEFT nor LyCORIS has a LoHa of one."""

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import keras
import lycoris
import peft
import pytest
import torch
from flax import nnx

import loha_jax
import loha_jax.keras
import loha_jax.nnx
from loha_jax import LoHaConfig, interop

KEY = jax.random.key(0)


class NnxModel(nnx.Module):
    def __init__(self):
        self.tok = nnx.Embed(6, 4, rngs=nnx.Rngs(0))


def keras_model():
    tokens = keras.Input((3,))
    return keras.Model(tokens, keras.layers.Embedding(6, 4, name="tok")(tokens))


def haliax_table():
    return hnn.Embedding.init(hax.Axis("vocab", 6), hax.Axis("out", 4), key=KEY)


def of_names(path, *shape, bias=False):
    weight = {f"{path}.weight": jnp.ones(shape)}
    return weight | ({f"{path}.bias": jnp.ones(shape[0])} if bias else {})


TABLES = {
    "Linen": (lambda: {"tok": {"embedding": jnp.ones((6, 4))}}, "tok", {}),
    "Gemma": (lambda: {"tok": {"input_embedding": jnp.ones((6, 4))}}, "tok.input_embedding", {}),
    "Haiku": (lambda: {"tok": {"embeddings": jnp.ones((6, 4))}}, "tok.embeddings", {}),
    "torch's names": (lambda: of_names("embed_tokens", 6, 4), "embed_tokens", {}),
    "NNX": (NnxModel, "tok", {}),
    "Keras": (keras_model, "tok", {}),
    "Equinox": (lambda: {"tok": eqx.nn.Embedding(6, 4, key=KEY)}, "tok", {}),
    "haliax": (lambda: {"tok": haliax_table()}, "tok", {}),
    "called as a head": (lambda: {"head": {"embedding": jnp.ones((6, 4))}}, "head", {}),
    "a stack of torch's names": (
        lambda: of_names("embed_tokens", 2, 6, 4),
        "e1.embed_tokens",
        {
            "names": {"embed_tokens": ["e0.embed_tokens", "e1.embed_tokens"]},
            "layouts": {"embed_tokens": "soi"},
        },
    ),
    "a stack with a head": (
        lambda: {"tok": {"embedding": jnp.ones((2, 6, 4))}},
        "embed",
        {"names": {"tok": ["lm_head", "embed"]}, "layouts": {"tok": "soi"}},
    ),
}
OTHERS = {
    "Dense": (lambda: {"embed": {"kernel": jnp.ones((6, 4))}}, "embed", {}),
    "torch's Linear with a bias": (
        lambda: of_names("time_embed.0", 6, 4, bias=True),
        "time_embed.0",
        {},
    ),
    "a leaf with a bias": (
        lambda: {"proj": {"embedding": jnp.ones((6, 4)), "bias": jnp.ones(4)}},
        "proj",
        {"layouts": {"proj": "io"}},
    ),
    "torch's Conv2d": (lambda: of_names("patch_embedding", 8, 3, 2, 2), "patch_embedding", {}),
    "Equinox' Linear": (lambda: {"embed": eqx.nn.Linear(4, 6, key=KEY)}, "embed", {}),
    "Equinox' Conv2d": (lambda: {"embed": eqx.nn.Conv2d(4, 6, 3, key=KEY)}, "embed", {}),
    **{
        f"a tied {head}": (
            lambda: {"embed": {"embedding": jnp.ones((6, 4))}},
            head,
            {"names": {"embed": head}},
        )
        for head in ("lm_head", "output", "proj_out", "vocab_projector", "embed_out")
    },
}


def adapted(make, target, options):
    config = LoHaConfig(r=2, target_modules=[target], init_weights=False)
    if isinstance(model := make(), keras.Model):
        return loha_jax.keras.inject(model, config, key=KEY)
    if isinstance(model, nnx.Module):
        return loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(0))
    return loha_jax.inject(model, config, key=KEY, **options)


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


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_written_with_a_warning_and_no_lora_of_it_is(name, tmp_path):
    """PEFT would open the LoRA, and leave the table as it is."""
    params = adapted(*TABLES[name])
    with pytest.warns(UserWarning, match=r"PEFT has no LoHa for embedding tables.*`load_peft`"):
        interop.save_peft(tmp_path / "adapter", params)
    with pytest.warns(UserWarning, match=r"LyCORIS.*for embedding tables.*`load_lycoris`"):
        interop.save_lycoris(tmp_path / "a.safetensors", params)
    with pytest.raises(ValueError, match=r"is an embedding table, for which PEFT's LoRA"):
        interop.save_lora(tmp_path / "lora", params)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_called_like_a_table_and_is_none_is_written_in_silence(name, tmp_path):
    params = adapted(*OTHERS[name])
    interop.save_peft(tmp_path / "adapter", params)
    interop.save_lycoris(tmp_path / "a.safetensors", params)
    interop.save_lora(tmp_path / "lora", params)
