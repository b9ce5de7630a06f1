"""Hugging Face transformers' models of images and sound, and their Flax twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers as hf

from tests.models.transformers_twins import encoder_decoder_sizes, encoder_sizes, from_config
from tests.models.twins import Size, Twins

IMAGE = 32  # pixels a side


def _vision_sizes(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "image_size": IMAGE,
        "patch_size": 8,
    }


def _images(size: Size) -> dict[str, np.ndarray]:
    return {"pixel_values": size.normal(2, 3, IMAGE, IMAGE)}


def vit(size: Size) -> Twins:
    config = hf.ViTConfig(**_vision_sizes(size), intermediate_size=2 * size.width, num_labels=3)
    classes = hf.ViTForImageClassification, hf.FlaxViTForImageClassification
    return from_config(*classes, config, _images(size), size)


def beit(size: Size) -> Twins:
    config = hf.BeitConfig(
        **_vision_sizes(size),
        intermediate_size=2 * size.width,
        num_labels=3,
        use_relative_position_bias=True,
    )
    classes = hf.BeitForImageClassification, hf.FlaxBeitForImageClassification

    return from_config(*classes, config, _images(size), size)


def dinov2(size: Size) -> Twins:
    config = hf.Dinov2Config(**_vision_sizes(size), mlp_ratio=2, num_labels=3)
    classes = hf.Dinov2ForImageClassification, hf.FlaxDinov2ForImageClassification
    return from_config(*classes, config, _images(size), size)


def _stages(size: Size) -> dict[str, Any]:
    width = size.width
    return {
        "embedding_size": width // 2,
        "hidden_sizes": [width // 2, width, width, 2 * width],
        "num_labels": 3,
    }


def resnet(size: Size, layer_type: str = "bottleneck") -> Twins:
    """BatchNorm's statistics are a collection of their own.

    The tree is {"params": ..., "batch_stats": ...}.
    """
    config = hf.ResNetConfig(**_stages(size), depths=[1, 1, 2, 1], layer_type=layer_type)
    classes = hf.ResNetForImageClassification, hf.FlaxResNetForImageClassification
    return from_config(*classes, config, _images(size), size)


def resnet_basic(size: Size) -> Twins:
    """FlaxResNet calls a basic layer's convolutions layer_0 and layer_1.

    In PyTorch they are layer.0 and layer.1. transformers' own `from_pretrained` therefore leaves
    them random, with a warning; `load_base` knows the names.
    """
    return resnet(size, layer_type="basic")


def regnet(size: Size) -> Twins:
    """Its 3x3 convolutions are grouped."""
    config = hf.RegNetConfig(
        **_stages(size), depths=[1, 1, 1, 1], groups_width=size.width // 4, layer_type="y"
    )
    classes = hf.RegNetForImageClassification, hf.FlaxRegNetForImageClassification
    return from_config(*classes, config, _images(size), size)


def clip(size: Size) -> Twins:
    text = encoder_sizes(size) | {"eos_token_id": 2, "bos_token_id": 1}
    vision = _vision_sizes(size) | {"intermediate_size": 2 * size.width}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.width // 2)
    inputs = {"input_ids": size.ids(), **_images(size)}
    return from_config(
        hf.CLIPModel, hf.FlaxCLIPModel, config, inputs, size, output="logits_per_image"
    )


def clip_text(size: Size) -> Twins:
    """Stable Diffusion's text encoder."""
    config = hf.CLIPTextConfig(**encoder_sizes(size), eos_token_id=2, bos_token_id=1)
    inputs = {"input_ids": size.ids()}
    return from_config(
        hf.CLIPTextModel, hf.FlaxCLIPTextModel, config, inputs, size, output="last_hidden_state"
    )


def whisper(size: Size) -> Twins:
    config = hf.WhisperConfig(
        **encoder_decoder_sizes(size),
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    inputs = {"input_features": size.normal(2, 8, 40), "decoder_input_ids": size.ids()}
    classes = hf.WhisperForConditionalGeneration, hf.FlaxWhisperForConditionalGeneration
    return from_config(*classes, config, inputs, size)


def wav2vec2(size: Size) -> Twins:
    """The positional convolution keeps torch's weight norm.

    weight_v and weight_g are stored, and no kernel.
    """
    config = hf.Wav2Vec2Config(
        **(encoder_sizes(size) | {"vocab_size": 20}),
        conv_dim=(size.width // 2, size.width // 2),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    inputs = {"input_values": size.normal(2, 400)}
    return from_config(hf.Wav2Vec2ForCTC, hf.FlaxWav2Vec2ForCTC, config, inputs, size)
