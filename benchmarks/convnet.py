"""A small convolutional net, with flat and with CP factors.

    python -m benchmarks convnet

A stem and one residual block per width, pre-activated, with group norms; 3x3 convolutions and 1x1
shortcuts, all of them adapted. Images are [batch, height, width, channels] in JAX and [batch,
channels, height, width] in PyTorch, as each likes them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import Adapter, Case, Settings
from benchmarks.jax_methods import JaxModel, cross_entropy

if TYPE_CHECKING:
    from benchmarks.torch_peers import TorchModel

TARGETS = ("stem", "conv1", "conv2", "shortcut")
CLASSES = 10


def cases(settings: Settings) -> list[Case]:
    """The same net, flat and CP."""
    widths, images, side = ((8, 16), 2, 8) if settings.quick else ((64, 128, 256), 32, 32)
    return [
        Case(
            subject="convnet",
            name=f"convnet-{'cp' if cp else 'flat'}",
            shape={"channels": list(widths), "images": f"{images} x {side} x {side}", "r": 8},
            adapter=Adapter(8, TARGETS, cp),
            jax_model=functools.partial(_jax_model, widths, images, side, settings.dtype),
            torch_model=functools.partial(_torch_model, widths, images, side, settings.dtype),
            process_memory=not settings.quick,
        )
        for cp in (False, True)
    ]


class Block(nn.Module):
    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))

        def conv(size: int, stride: int, name: str) -> nn.Conv:
            padding = size // 2  # as in PyTorch; "SAME" pads otherwise where the stride is 2
            return nn.Conv(
                self.width,
                (size, size),
                stride,
                padding,
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )

        y = conv(3, self.stride, "conv1")(norm(x))
        return conv(1, self.stride, "shortcut")(x) + conv(3, 1, "conv2")(norm(y))


class ConvNet(nn.Module):
    widths: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.widths[0], (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="stem"
        )(images)
        for n, width in enumerate(self.widths):
            x = Block(width, 1 if n == 0 else 2, self.dtype, name=f"blocks_{n}")(x)
        return nn.Dense(CLASSES, dtype=self.dtype, name="classifier")(nn.relu(x).mean((1, 2)))


def _arrays(images: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((images, side, side, 3), np.float32), random.integers(
        0, CLASSES, images, np.int32
    )


def _jax_model(widths: tuple[int, ...], images: int, side: int, dtype: str) -> JaxModel:
    net = ConvNet(widths, dtype)
    pixels, labels = _arrays(images, side)
    params = net.init(jax.random.key(0), jnp.asarray(pixels[:1]))
    return JaxModel(
        apply=lambda params, x, batch: net.apply(params, x),  # type: ignore[return-value]  # no mutable collections
        params=jax.tree.map(lambda leaf: leaf.astype(dtype), params),
        x=jnp.asarray(pixels, dtype),
        batch={"labels": jnp.asarray(labels)},
        loss=cross_entropy,
        layouts={r".*(stem|shortcut|conv\d)": "kkio"},  # they have no bias
    )


def _torch_model(widths: tuple[int, ...], images: int, side: int, dtype: str) -> TorchModel:
    from benchmarks import torch_models

    return torch_models.convnet(widths, CLASSES, *_arrays(images, side), dtype)
