"""A tiny Qwen3: tunix' model, and transformers' with the same weights."""

import numpy as np
import torch
import transformers
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params

from loha_jax import interop

TARGETS = ("q_proj", "v_proj", "gate_proj")


def save_checkpoint(folder):
    """Write transformers' folder with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e6,  # tunix 0.1.7's, whatever its config says
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def torch_twin(folder):
    """transformers' model of a checkpoint."""
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.array(tokens)).long()).logits.numpy()


def model_config():
    return qwen3.ModelConfig(
        num_layers=2,
        vocab_size=256,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=False,
    )


def names(folder):
    mapping = params._get_key_and_transform_mapping(model_config())
    return interop.NameMap(mapping, base=folder)


def load(folder):
    """tunix' Qwen3 with the weights of a checkpoint."""
    model = qwen3.Qwen3(model_config(), rngs=nnx.Rngs(0))
    return interop.load_base(folder, model, names=names(folder))
