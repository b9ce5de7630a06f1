"""Stable Diffusion's parts in diffusers: PyTorch models and their Flax twins.

0.39 is the last release that has these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch
from diffusers import (
    AutoencoderKL,
    FlaxAutoencoderKL,
    FlaxUNet2DConditionModel,
    UNet2DConditionModel,
)
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from loha_jax.interop import NameMap, load_base
from tests.models.twins import Size, Twins, seeded


def _twins(
    module: Any,
    flax_model: Any,
    inputs: Mapping[str, Any],
    call: Callable[[Any, Mapping[str, Any]], Any],
) -> Twins:
    names = NameMap.diffusers()
    shapes = jax.eval_shape(flax_model.init_weights, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        params = load_base(folder, shapes, names=names)

    def fn(params: Any, inputs: Mapping[str, Any]) -> Any:
        return call(lambda *args: flax_model.apply({"params": params}, *args), inputs).sample

    return Twins(
        module=module,
        output=lambda module, tensors: call(module, tensors).sample,
        fn=fn,
        params=params,
        inputs=dict(inputs),
        names=names,
    )


def unet(size: Size, exact: bool = False, **more: Any) -> Twins:
    """Stable Diffusion's denoiser.

    Residual blocks of convolutions, and transformers that see the text.

    diffusers' Flax model computes another function: its transformers' group norms add 1e-5 to the
    variance where PyTorch's add 1e-6, and its gelu is the approximation by tanh. The outputs of a
    tiny model differ by 5e-5 for it. The PyTorch twin here is set to do the same, unless it is to
    be `exact`ly what diffusers makes.
    """
    width = size.width
    config = {
        "sample_size": 8,
        "block_out_channels": (2 * width, 2 * width),
        "layers_per_block": 1,
        "cross_attention_dim": width,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    }
    module = seeded(lambda: UNet2DConditionModel(**config), size)
    for part in module.modules() if not exact else ():
        if isinstance(part, Transformer2DModel):
            part.norm.eps = 1e-5
        elif isinstance(part, GEGLU):
            part.gelu = lambda gate: torch.nn.functional.gelu(gate, approximate="tanh")
    inputs = {
        "sample": size.normal(2, 4, 8, 8),
        "timestep": size.random.integers(0, 1000, 2).astype("int32"),
        "encoder_hidden_states": size.normal(2, 5, width),
    }
    return _twins(
        module,
        FlaxUNet2DConditionModel(**config),
        inputs,
        lambda model, inputs: model(
            inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
        ),
    )


def unet_linear(size: Size) -> Twins:
    """As Stable Diffusion 2: proj_in and proj_out are linear."""
    return unet(size, use_linear_projection=True)


def vae(size: Size) -> Twins:
    """Stable Diffusion's autoencoder, decoding what it encodes."""
    width = size.width
    config = {
        "block_out_channels": (width, 2 * width),
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    module = seeded(lambda: AutoencoderKL(**config), size)
    inputs = {"sample": size.normal(2, 3, 16, 16)}
    return _twins(
        module, FlaxAutoencoderKL(**config), inputs, lambda model, inputs: model(inputs["sample"])
    )
