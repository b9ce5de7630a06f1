"""Shared by the tests in tests/interop/names: models, trees and references."""

import re

import jax.numpy as jnp
import numpy as np

D, N, K, H, F, V, E = (
    12,
    4,
    2,
    5,
    7,
    11,
    3,
)  # embed, heads, kv heads, head, hidden, vocabulary, experts


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


# Mappings in the form, and with the names, of google-tunix 0.1.7's models.


def llama3():
    layer = r"model\.layers\.([0-9]+)\."
    return {
        r"model\.embed_tokens\.weight": ("embedder.input_embedding", None),
        layer + r"self_attn\.q_proj\.weight": (r"layers.\1.attn.q_proj.w", ((1, 0), (D, N, H))),
        layer + r"self_attn\.k_proj\.weight": (r"layers.\1.attn.k_proj.w", ((1, 0), (D, K, H))),
        layer + r"self_attn\.v_proj\.weight": (r"layers.\1.attn.v_proj.w", ((1, 0), (D, K, H))),
        layer + r"self_attn\.o_proj\.weight": (r"layers.\1.attn.o_proj.w", ((1, 0), (N, H, D))),
        layer + r"mlp\.gate_proj\.weight": (r"layers.\1.mlp.gate_proj.kernel", ((1, 0), None)),
        layer + r"mlp\.down_proj\.weight": (r"layers.\1.mlp.down_proj.kernel", ((1, 0), None)),
        r"model\.norm\.weight": ("final_norm.w", None),
        layer + r"self_attn\.q_norm\.weight": (r"layers.\1.attn.q_norm.w", None),
        layer + r"input_layernorm\.weight": (r"layers.\1.input_layernorm.w", None),
        r"lm_head\.weight": ("lm_head.w", ((1, 0), None)),
    }


def torch_tensors(rng, layers=2, kind="llama3", prefix=""):
    def values(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {f"{prefix}model.embed_tokens.weight": values(V, D)}
    for n in range(layers):
        layer = f"{prefix}model.layers.{n}."
        tensors[layer + "self_attn.q_proj.weight"] = values(N * H, D)
        tensors[layer + "self_attn.k_proj.weight"] = values(K * H, D)
        tensors[layer + "self_attn.v_proj.weight"] = values(K * H, D)
        tensors[layer + "self_attn.o_proj.weight"] = values(D, N * H)
        if kind.startswith("gemma"):
            tensors[layer + "post_feedforward_layernorm.weight"] = values(D)
            continue
        tensors[layer + "mlp.down_proj.weight"] = values(D, F)
        if kind == "qwen2":
            tensors[layer + "self_attn.q_proj.bias"] = values(N * H)
        else:
            tensors[layer + "self_attn.q_norm.weight"] = values(H)
        if kind == "qwen3":
            tensors[layer + "mlp.gate.weight"] = values(E, D)
            for e in range(E):
                tensors[layer + f"mlp.experts.{e}.up_proj.weight"] = values(F, D)
    return tensors


def run_loader(mapping, tensors, preprocess=None):
    """Torch tensors as tunix' loader converts them, by its own rule."""
    out = {}
    for key, value in tensors.items():
        hits = [(re.sub(p, path, key), t) for p, (path, t) in mapping.items() if re.match(p, key)]
        if len(hits) != 1:
            continue
        permute, reshape = hits[0][1] or (None, None)
        value = value.transpose(permute) if permute else value
        out[hits[0][0]] = jnp.asarray(value.reshape(reshape) if reshape else value)
    return preprocess(out) if preprocess else out
