"""Adapters that LyCORIS 4.1.3 wrote, their base weights and network in JAX.

tests/data/lycoris/README.md says how they were made.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax
from peft_samples import flax_leaf, flax_value
from safetensors.numpy import load_file

from loha_jax.tree.inject import apply_plan
from loha_jax.tree.plan import plan_injection

DATA = Path(__file__).parents[1] / "data" / "lycoris"
FORMS = ["plain", "tucker", "dora", "dora_in", "scalar", "bypass"]
CONVOLUTIONS = {"conv3": "kkio", "gconv": "kkio", "c1d": "kio", "c3d": "kkkio"}
LAYERS = ["fc1", "blocks.0.q_proj", "blocks.0.out", "conv1x1", *CONVOLUTIONS]
LAYOUTS = {"c1d": "kio"}


def jax_tree(state):
    """A torch state dict as a JAX tree in Flax's names and orientation."""
    flat = {}
    for key, value in state.items():
        *path, leaf = key.split(".")
        flat[(*path, flax_leaf(path, leaf, value))] = flax_value(path, leaf, value)
    return unflatten_dict(flat)


def base_params(without=()):
    """The sample's base weights, less some layers."""
    state = load_file(DATA / "base_tiny.safetensors")
    return jax_tree(
        {key: value for key, value in state.items() if key.rpartition(".")[0] not in without}
    )


@functools.cache
def kohya_state(component):
    """The base weights of one component of the kohya files, "unet" or "te", in torch's names."""
    state = load_file(DATA / "kohya_base.safetensors")
    return {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{component}.")}


def inputs():
    """The sample's inputs."""
    return load_file(DATA / "inputs_tiny.safetensors")


def outputs(form):
    """The outputs of LyCORIS' forward pass."""
    return load_file(DATA / f"native_{form}_out.safetensors")


def native(form):
    """A file and its tensors."""
    path = DATA / f"native_{form}.safetensors"
    return path, load_file(path)


def model(params, inputs):
    """The sample's network, in torch's axis order."""

    def linear(p, x):
        y = x @ jnp.asarray(p["kernel"])
        return y + p["bias"] if "bias" in p else y

    def convolution(name, x, stride=1, padding=0, groups=1):
        p = params[name]
        space = "DHW"[-(x.ndim - 2) :]
        y = lax.conv_general_dilated(
            x,
            jnp.asarray(p["kernel"]),
            (stride,) * len(space),
            [(padding, padding)] * len(space),
            dimension_numbers=("NC" + space, space + "IO", "NC" + space),
            feature_group_count=groups,
        )
        return y + p["bias"].reshape(-1, *(1,) * len(space))

    blocks = params["blocks"]["0"]
    image = convolution("conv1x1", inputs["img"])
    return {
        "lin": linear(
            blocks["out"], jnp.tanh(linear(blocks["q_proj"], linear(params["fc1"], inputs["x"])))
        ),
        "conv3": convolution("conv3", image, stride=2, padding=1),
        "gconv": convolution("gconv", image, groups=2),
        "c1d": convolution("c1d", inputs["seq"], padding=1),
        "c3d": convolution("c3d", inputs["vol"]),
    }


def trained(base, config, layouts):
    """An adapter as `inject` makes it, with values as after training.

    Its initialisation is not compiled.
    """
    random = np.random.default_rng(0)

    def values(shape, mean=0.0):
        return jnp.asarray(random.normal(mean, 0.3, shape), jnp.float32)

    def extras(target, config, kernel):
        out, into, *spatial = target.layout.torch_shape(target.shape)
        norms = (
            (out, 1, *(1 for _ in spatial))
            if config.wd_on_out
            else (1, into, *(1 for _ in spatial))
        )
        scalar = {"scalar": values((), 0.6)} if config.use_scalar else {}
        return scalar | ({"dora_scale": values(norms, 1.5)} if config.weight_decompose else {})

    return apply_plan(
        base,
        plan_injection(base, config, layouts=layouts),
        "default",
        lambda target, kernel: {
            part: values(shape) for part, shape in target.shapes(*target.ranks).items()
        },
        lambda saved, original: original + values(original.shape),
        extras,
    )
