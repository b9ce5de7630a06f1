"""Third-party models, and the adapters that are tried on each.

A new model is a function from a `Size` to `Twins`, and a line in `CASES` for each adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tests.models import (
    diffusers_twins,
    framework_twins,
    media_twins,
    real_weights,
    transformers_twins,
)
from tests.models.twins import Size, Twins


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and an adapter.

    Args:
        build: makes the model.
        label: of the adapter; a model has several.
        config: fields of the `LoHaConfig`, of PEFT's and ours alike.
        quirk: what PEFT or the model's author does differently, and what the test does about it.
        peft_stride: lend PEFT's wrapper of a Conv1d the stride of the layer inside, which it lacks.
    """

    build: Callable[[Size], Twins]
    label: str
    config: Mapping[str, Any]
    quirk: str = ""
    peft_stride: bool = False

    @property
    def name(self) -> str:
        return f"{self.build.__name__}-{self.label}"


def _linear(build: Callable[[Size], Twins], *targets: str, **more: Any) -> list[Case]:
    config = {"r": 4, "alpha": 8, "target_modules": list(targets), **more.pop("config", {})}
    return [Case(build, "linear", config, **more)]


def _convolutions(build: Callable[[Size], Twins], *targets: str, **more: Any) -> list[Case]:
    """Both forms: flat, and with cores."""
    config = {"r": 4, "alpha": 8, "target_modules": list(targets), **more.pop("config", {})}
    return [
        Case(build, "conv", config, **more),
        Case(build, "conv_cp", {**config, "use_effective_conv2d": True}, **more),
    ]


_hf, _media = transformers_twins, media_twins
_sd, _other = diffusers_twins, framework_twins
_TEXT = ("k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2")
_UNET = ("proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_UNET_CONVOLUTIONS = (
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
_STABLE_DIFFUSION = {"r": 8, "alpha": 32}

CASES: dict[str, Case] = {
    case.name: case
    for case in [
        *_linear(_hf.bert, "query", "key", "value", "dense", config={"task_type": "SEQ_CLS"}),
        *_linear(
            _hf.roberta,
            "query",
            "value",
            "dense",
            "out_proj",
            config={"rank_pattern": {"query": 2}},
        ),
        *_linear(_hf.distilbert, "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        *_linear(
            _hf.electra,
            *("query", "embeddings_project", "dense"),
            quirk="token_type_ids are given: FlaxElectra's default is 1, PyTorch's 0",
        ),
        *_linear(_hf.gpt_neo, "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
        *_linear(_hf.gptj, "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "lm_head"),
        *_linear(_hf.opt, "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        *_linear(_hf.bloom, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        *_linear(
            _hf.llama,
            *(
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "lm_head",
            ),
            quirk=(
                "FlaxLlama ignores rope_theta and leaves a tied lm_head random: 10,000 and untied"
            ),
        ),
        *_linear(
            _hf.mistral,
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            quirk="FlaxMistral reads sliding_window=None as a window of 0: a wide one is set",
        ),
        *_linear(
            _hf.gemma, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        ),
        *_linear(
            _hf.t5,
            *"qkvo",
            "wi",
            "wo",
            quirk="FlaxT5 calls jnp.clip(a_max=): it is lent the old signature",
        ),
        *_linear(_hf.t5_gated, *"qkvo", "wi_0", "wi_1", "wo", "lm_head", quirk="as t5"),
        *_linear(_hf.bart, *_TEXT),
        *_convolutions(_media.vit, "projection", "query", "key", "value", "dense"),
        *_convolutions(_media.beit, "projection", "query", "key", "value", "dense"),
        *_convolutions(_media.dinov2, "projection", "query", "key", "value", "dense", "fc1", "fc2"),
        *_convolutions(_media.resnet, "convolution"),
        *_convolutions(
            _media.resnet_basic,
            "convolution",
            quirk=(
                "transformers cannot load it (layer_0 is torch's layer.0); load_base and NameMap do"
            ),
        ),
        *_convolutions(_media.regnet, "convolution"),
        *_convolutions(
            _media.clip, "patch_embedding", *_TEXT, "text_projection", "visual_projection"
        ),
        *_convolutions(
            _media.whisper,
            *("conv1", "conv2", *_TEXT),
            quirk=(
                "PEFT's Conv1d has no .stride, which WhisperEncoder reads: it is lent that of "
                "the layer inside"
            ),
            peft_stride=True,
        ),
        *_convolutions(
            _media.wav2vec2,
            config={
                "target_modules": (
                    r".*\.conv_layers\.\d+\.conv|.*\.(projection|\w+_dense|[kqv]_proj"
                    r"|out_proj)"
                )
            },
            quirk=(
                "pos_conv_embed is left out: its stored weights are weight_v and weight_g, no "
                "kernel"
            ),
        ),
        *_linear(_media.clip_text, *_TEXT, config=_STABLE_DIFFUSION),
        *_convolutions(_sd.unet, *_UNET, *_UNET_CONVOLUTIONS, config=_STABLE_DIFFUSION),
        *_linear(_sd.unet_linear, *_UNET, config=_STABLE_DIFFUSION),
        *_convolutions(
            _sd.vae,
            *(
                "conv1",
                "conv2",
                "conv_shortcut",
                "conv",
                "conv_in",
                "conv_out",
                "quant_conv",
                "post_quant_conv",
            ),
            *("to_q", "to_k", "to_v", "to_out.0"),
        ),
        *_convolutions(
            _other.equinox, config={"target_modules": r"conv|attention\.\w+_proj|mlp\.layers\.\d+"}
        ),
        *_convolutions(_other.haiku, config={"r": 3, "target_modules": r"conv|layers\.\d+|head"}),
        *_linear(
            _other.keras_bert,
            *("query", "key", "value", "dense"),
            quirk=(
                "keras-hub's gelu is that by tanh, whatever the checkpoint says: PyTorch's is "
                "set to it"
            ),
        ),
    ]
}

REAL_CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case(
            real_weights.whisper_tiny_en,
            "conv_cp",
            {
                "r": 8,
                "alpha": 16,
                "target_modules": ["conv1", "conv2", *_TEXT],
                "use_effective_conv2d": True,
            },
            quirk="as whisper",
            peft_stride=True,
        ),
        Case(
            real_weights.smollm2,
            "linear",
            {
                "r": 8,
                "alpha": 16,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
            },
            quirk="FlaxLlama is given the config's rotary base, and its lm_head the embeddings",
        ),
    ]
}
"""Real weights, of packages that may not be installed.

The size of a `Trial` counts only for the seed.
"""
