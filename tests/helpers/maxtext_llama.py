"""A Llama with the parameters of MaxText.

Its layers are scanned on axis 1, rotary pairs are interleaved, and the query is scaled.

The conventions are those of MaxText 0.2.5: `LLAMA31_MAXTEXT_TO_HF_PARAM_HOOK_FN` in
maxtext/checkpoint_conversion/utils/param_mapping.py (`scale_query_layer`, `adjust_rope`,
`reshape_kernel`) and `LLaMARotaryEmbedding` in maxtext/layers/embeddings.py. Attention has no scale
of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.interop import NameMap, RowTransform

VOCABULARY, WIDTH, LAYERS, HEADS, KEYS, HEAD, HIDDEN = 32, 24, 2, 4, 2, 6, 20
EPSILON, THETA = 1e-6, 10000.0
ATTENTION = r"decoder\.layers\.self_attention\."
IDS = np.random.default_rng(3).integers(0, VOCABULARY, (2, 7))


def names(head=HEAD, *, rows=True, scanned=True):
    """The names of the Hugging Face model, and how its rows differ.

    Args:
        head: the size of a head.
        rows: False leaves the transforms out.
        scanned: the layers are one stack, and not `layers_0`, `layers_1`, ….
    """
    start = r"decoder\.layers\." if scanned else r"decoder\.layers_(\d+)\."
    layer = "model.layers.{}." if scanned else r"model.layers.\1."
    attention, mlp, stack = start + r"self_attention\.", start + r"mlp\.", "s" * scanned
    return NameMap(
        {
            attention + "query": layer + "self_attn.q_proj",
            attention + "key": layer + "self_attn.k_proj",
            attention + "value": layer + "self_attn.v_proj",
            attention + "out": layer + "self_attn.o_proj",
            mlp + "wi_0": layer + "mlp.gate_proj",
            mlp + "wi_1": layer + "mlp.up_proj",
            mlp + "wo": layer + "mlp.down_proj",
            start + "pre_self_attention_layer_norm": layer + "input_layernorm",
            start + "post_self_attention_layer_norm": layer + "post_attention_layernorm",
            r"decoder\.decoder_norm": "model.norm",
            r"decoder\.logits_dense": "lm_head",
            "token_embedder": "model.embed_tokens",
        },
        layouts={
            attention + "(query|key|value)": f"i{stack}oo",
            attention + "out": f"i{stack}io",
            mlp + ".*": f"i{stack}o",
        },
        rows={
            attention + "query": RowTransform.rotary(head, scale=head**0.5),
            attention + "key": RowTransform.rotary(head),
        }
        if rows
        else None,
    )


def shapes(bias=False):
    """The shapes of all parameters; with biases of query, key and value as in Qwen2."""
    attention = {
        "query": {"kernel": (WIDTH, LAYERS, HEADS, HEAD)},
        "key": {"kernel": (WIDTH, LAYERS, KEYS, HEAD)},
        "value": {"kernel": (WIDTH, LAYERS, KEYS, HEAD)},
        "out": {"kernel": (HEADS, LAYERS, HEAD, WIDTH)},
    }
    if bias:
        for name in ("query", "key", "value"):
            heads = HEADS if name == "query" else KEYS
            attention[name]["bias"] = (heads, LAYERS, HEAD)
    layers = {
        "self_attention": attention,
        "mlp": {
            "wi_0": {"kernel": (WIDTH, LAYERS, HIDDEN)},
            "wi_1": {"kernel": (WIDTH, LAYERS, HIDDEN)},
            "wo": {"kernel": (HIDDEN, LAYERS, WIDTH)},
        },
        "pre_self_attention_layer_norm": {"scale": (WIDTH, LAYERS)},
        "post_self_attention_layer_norm": {"scale": (WIDTH, LAYERS)},
    }
    tree = {
        "token_embedder": {"embedding": (VOCABULARY, WIDTH)},
        "decoder": {
            "layers": layers,
            "decoder_norm": {"scale": (WIDTH,)},
            "logits_dense": {"kernel": (WIDTH, VOCABULARY)},
        },
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def forward(params, ids):
    """Return the logits."""
    decoder = params["decoder"]
    layers = decoder["layers"]
    x = params["token_embedder"]["embedding"][ids]
    for n in range(LAYERS):
        x = x + _attention(layers["self_attention"], n, _norm(layers, "pre", n, x))
        x = x + _mlp(layers["mlp"], n, _norm(layers, "post", n, x))
    return _normalised(x, decoder["decoder_norm"]["scale"]) @ decoder["logits_dense"]["kernel"]


def _norm(layers, which, n, x):
    return _normalised(x, layers[f"{which}_self_attention_layer_norm"]["scale"][:, n])


def _normalised(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPSILON) * scale


def _mlp(mlp, n, x):
    gate, up, down = (mlp[name]["kernel"][:, n] for name in ("wi_0", "wi_1", "wo"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _attention(attention, n, x):
    def project(name):
        module = attention[name]
        product = jnp.einsum("btd,dnh->btnh", x, module["kernel"][:, n])
        return product + module["bias"][:, n] if "bias" in module else product

    q, k, v = project("query"), project("key"), project("value")
    q, k = _rotated(q), jnp.repeat(_rotated(k), HEADS // KEYS, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)  # the query's kernel holds 1/sqrt(HEAD)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, HEADS // KEYS, 2))
    return jnp.einsum("btnh,nhd->btd", mixed, attention["out"]["kernel"][:, n])


def _rotated(x):
    """Rotate the pairs of features 2i and 2i + 1."""
    frequencies = THETA ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def hooks(kernel, *, scaled):
    """Return `[out, in]` of a projection `[in, heads, head]`, in float64, as MaxText's hooks do."""
    wide = np.asarray(kernel, np.float64)
    if scaled:  # scale_query_layer
        wide = wide * np.sqrt(HEAD)
    wide = np.concatenate((wide[..., ::2], wide[..., 1::2]), -1)  # adjust_rope
    return wide.reshape(WIDTH, -1).T  # reshape_kernel
