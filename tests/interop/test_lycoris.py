"""LyCORIS' files, and its outputs on every kind of layer that it adapts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax import lax
from peft_samples import flax_leaf, flax_value
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop

DATA = Path(__file__).parents[1] / "data" / "lycoris"
CONVOLUTIONS = {"conv3": "kkio", "gconv": "kkio", "c1d": "kio", "c3d": "kkkio"}
LAYERS = ["fc1", "blocks.0.q_proj", "blocks.0.out", "conv1x1", *CONVOLUTIONS]


def base_params():
    flat = {}
    for key, value in load_file(DATA / "base_tiny.safetensors").items():
        *path, leaf = key.split(".")
        flat[(*path, flax_leaf(path, leaf, value))] = flax_value(path, leaf, value)
    return unflatten_dict(flat)


def loaded(form):
    """The adapter of a LyCORIS file in a JAX tree: its tensors under PEFT's names."""
    config = LoHaConfig(
        r=4,
        alpha=2,
        target_modules=LAYERS,
        rank_pattern=dict.fromkeys(CONVOLUTIONS, 3),
        alpha_pattern=dict.fromkeys(CONVOLUTIONS, 1),
        use_effective_conv2d=form == "tucker",
    )
    names = {name.replace(".", "_"): name for name in LAYERS}
    state = {}
    for key, tensor in load_file(DATA / f"native_{form}.safetensors").items():
        module, part = key.removeprefix("lycoris_").rsplit(".", 1)
        if part != "alpha":
            one_axis = module == "c1d" and part.startswith("hada_t")
            state[f"base_model.model.{names[module]}.{part}"] = tensor[..., None] if one_axis else tensor
    return interop.from_peft_state_dict(state, config, base_params(), layouts={"c1d": "kio"})


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
        "lin": linear(blocks["out"], jnp.tanh(linear(blocks["q_proj"], linear(params["fc1"], inputs["x"])))),
        "conv3": convolution("conv3", image, stride=2, padding=1),
        "gconv": convolution("gconv", image, groups=2),
        "c1d": convolution("c1d", inputs["seq"], padding=1),
        "c3d": convolution("c3d", inputs["vol"]),
    }


@pytest.mark.parametrize("strategy", ["factored", "fused", "merged"])
@pytest.mark.parametrize("form", ["plain", "tucker"])
def test_outputs_are_those_of_lycoris(form, strategy):
    params, inputs = loaded(form), load_file(DATA / "inputs_tiny.safetensors")
    if strategy == "merged":
        got = model(loha_jax.merge(params), inputs)
    else:
        got = jax.jit(loha_jax.adapt(model, strategy=strategy))(params, inputs)
        assert not loha_jax.explain(model, params, inputs, strategy=strategy).dense
    base = model(loha_jax.unload(params), inputs)
    for name, want in load_file(DATA / f"native_{form}_out.safetensors").items():
        assert np.abs(want - base[name]).max() > 0.01
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("form", ["plain", "tucker"])
def test_a_file_is_written_as_lycoris_writes_it(form, tmp_path):
    path = tmp_path / "adapter.safetensors"
    interop.save_lycoris(path, loaded(form))
    ours, theirs = load_file(path), load_file(DATA / f"native_{form}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def test_what_the_format_cannot_hold_is_refused_by_name(tmp_path):
    base = {"a": {"b_c": {"kernel": jnp.ones((2, 2))}}, "a_b": {"c": {"kernel": jnp.ones((2, 2))}}}
    params = loha_jax.inject(base, LoHaConfig(r=1, target_modules=["b_c", "c"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"a\.b_c and a_b\.c would both be 'lycoris_a_b_c'"):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params)
    config = LoHaConfig(r=1, target_modules=["b_c"], modules_to_save=["c"])
    params = loha_jax.inject(base, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"a_b\.c.* is in modules_to_save.*save_peft"):
        interop.save_lycoris(tmp_path / "adapter.safetensors", params)
    assert not list(tmp_path.iterdir())
