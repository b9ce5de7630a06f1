"""A tiny Qwen3: tunix' model with the weights of a checkpoint of transformers."""

from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params

from loha_jax import interop

TARGETS = ("q_proj", "v_proj", "gate_proj")


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
