"""Hugging Face transformers' PyTorch models and their Flax twins.

4.57 is the last release that has these.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import unittest.mock
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers as hf

from loha_jax.interop import NameMap, load_base
from tests.models.twins import VOCABULARY, Size, Twins, seeded


def from_config(
    torch_class: type,
    flax_class: type,
    config: Any,
    inputs: Mapping[str, np.ndarray],
    size: Size,
    output: str = "logits",
) -> Twins:
    """A PyTorch model with random weights, and its twin."""
    return of_module(seeded(lambda: torch_class(config), size), flax_class, inputs, output)


def of_module(
    module: Any,
    flax_class: Any,
    inputs: Mapping[str, np.ndarray],
    output: str = "logits",
    tied: Mapping[str, str] | None = None,
) -> Twins:
    """A PyTorch model and its Flax twin, which reads the same checkpoint.

    `tied` as for `load_base`.
    """
    flax_model = flax_class(module.config, _do_init=False)
    names = NameMap.transformers(module.config.model_type)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        params = load_base(folder, flax_model.params_shape_tree, names=names, tied=tied)

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        return getattr(flax_model(**inputs, params=params), output)

    return Twins(
        module=module,
        output=lambda module, tensors: getattr(module(**tensors), output),
        fn=fn,
        params=params,
        inputs=dict(inputs),
        names=names,
    )


def encoder_sizes(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": 2 * size.width,
        "max_position_embeddings": 40
        + size.width,  # FlaxLlama cuts the sines and cosines of a position to as many
    }


def bert(size: Size) -> Twins:
    config = hf.BertConfig(**encoder_sizes(size), num_labels=3)
    inputs = {"input_ids": size.ids()}
    return from_config(
        hf.BertForSequenceClassification, hf.FlaxBertForSequenceClassification, config, inputs, size
    )


def roberta(size: Size) -> Twins:
    config = hf.RobertaConfig(**encoder_sizes(size), num_labels=3)
    inputs = {"input_ids": size.ids()}
    classes = hf.RobertaForSequenceClassification, hf.FlaxRobertaForSequenceClassification
    return from_config(*classes, config, inputs, size)


def distilbert(size: Size) -> Twins:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=size.width,
        n_layers=size.layers,
        n_heads=size.heads,
        hidden_dim=2 * size.width,
        max_position_embeddings=40,
    )
    classes = hf.DistilBertForSequenceClassification, hf.FlaxDistilBertForSequenceClassification
    return from_config(*classes, config, {"input_ids": size.ids()}, size)


def electra(size: Size) -> Twins:
    """FlaxElectra takes all tokens for a second sentence's by default, PyTorch for the first one's.

    Both are told.
    """
    ids = size.ids()
    config = hf.ElectraConfig(**encoder_sizes(size), embedding_size=size.width // 2)
    classes = hf.ElectraForSequenceClassification, hf.FlaxElectraForSequenceClassification
    return from_config(
        *classes, config, {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}, size
    )


def gpt2(size: Size) -> Twins:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
    )
    return from_config(
        hf.GPT2LMHeadModel, hf.FlaxGPT2LMHeadModel, config, {"input_ids": size.ids()}, size
    )


def gpt_neo(size: Size) -> Twins:
    config = hf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        attention_types=[[["global", "local"], size.layers // 2], [["global"], size.layers % 2]],
        max_position_embeddings=32,
        window_size=4,
    )
    return from_config(
        hf.GPTNeoForCausalLM, hf.FlaxGPTNeoForCausalLM, config, {"input_ids": size.ids()}, size
    )


def gptj(size: Size) -> Twins:
    config = hf.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        rotary_dim=size.width // size.heads // 2,
        n_positions=32,
        tie_word_embeddings=False,
    )
    return from_config(
        hf.GPTJForCausalLM, hf.FlaxGPTJForCausalLM, config, {"input_ids": size.ids()}, size
    )


def opt(size: Size) -> Twins:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        ffn_dim=2 * size.width,
        max_position_embeddings=32,
        word_embed_proj_dim=size.width,
    )
    return from_config(
        hf.OPTForCausalLM, hf.FlaxOPTForCausalLM, config, {"input_ids": size.ids()}, size
    )


def bloom(size: Size) -> Twins:
    config = hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=size.width, n_layer=size.layers, n_head=size.heads
    )
    return from_config(
        hf.BloomForCausalLM, hf.FlaxBloomForCausalLM, config, {"input_ids": size.ids()}, size
    )


def _decoder_sizes(size: Size) -> dict[str, Any]:
    return {
        **encoder_sizes(size),
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.width // size.heads,
        "tie_word_embeddings": False,
    }


def llama(size: Size) -> Twins:
    """FlaxLlama computes with a rotary base of 10,000 whatever the config says.

    It leaves a tied lm_head random.
    """
    config = hf.LlamaConfig(**_decoder_sizes(size), rope_theta=10_000.0)
    return from_config(
        hf.LlamaForCausalLM, hf.FlaxLlamaForCausalLM, config, {"input_ids": size.ids()}, size
    )


def mistral(size: Size) -> Twins:
    """FlaxMistral reads sliding_window=None as 0, a mask that sees nothing of the past.

    A wide window is set.
    """
    config = hf.MistralConfig(**_decoder_sizes(size), rope_theta=10_000.0, sliding_window=4096)
    return from_config(
        hf.MistralForCausalLM, hf.FlaxMistralForCausalLM, config, {"input_ids": size.ids()}, size
    )


def gemma(size: Size) -> Twins:
    config = hf.GemmaConfig(**(_decoder_sizes(size) | {"tie_word_embeddings": True}))
    return from_config(
        hf.GemmaForCausalLM, hf.FlaxGemmaForCausalLM, config, {"input_ids": size.ids()}, size
    )


@contextlib.contextmanager
def clip_with_a_max() -> Any:
    """`jnp.clip` as it was before JAX 0.10, which dropped the argument names `a_min` and `a_max`.

    FlaxT5 uses them.
    """
    clip = jnp.clip
    if "a_max" in inspect.signature(clip).parameters:
        yield
        return

    def old_clip(x: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, a_min, a_max, **kwargs)

    with unittest.mock.patch.object(jnp, "clip", old_clip):
        yield


def t5(size: Size, **more: Any) -> Twins:
    """FlaxT5 calls `jnp.clip(a_max=...)`, which newer JAX refuses.

    It is lent the old name while it runs.
    """
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=size.width,
        d_kv=size.width // size.heads,
        d_ff=2 * size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **more,
    )
    inputs = {"input_ids": size.ids(), "decoder_input_ids": size.ids()}
    with clip_with_a_max():
        twins = from_config(
            hf.T5ForConditionalGeneration, hf.FlaxT5ForConditionalGeneration, config, inputs, size
        )
    unmodified = twins.fn

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        with clip_with_a_max():
            return unmodified(params, inputs)

    twins.fn = fn
    return twins


def t5_gated(size: Size) -> Twins:
    """As T5 1.1: a gated feed-forward and a head of its own; see `t5`."""
    return t5(size, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def encoder_decoder_sizes(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": size.width,
        "encoder_layers": size.layers,
        "decoder_layers": size.layers,
        "encoder_attention_heads": size.heads,
        "decoder_attention_heads": size.heads,
        "encoder_ffn_dim": 2 * size.width,
        "decoder_ffn_dim": 2 * size.width,
    }


def bart(size: Size) -> Twins:
    config = hf.BartConfig(**encoder_decoder_sizes(size), max_position_embeddings=32)
    inputs = {"input_ids": size.ids(), "decoder_input_ids": size.ids()}
    classes = hf.BartForConditionalGeneration, hf.FlaxBartForConditionalGeneration
    return from_config(*classes, config, inputs, size)
