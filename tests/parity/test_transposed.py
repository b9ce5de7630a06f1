"""Transposed convolutions: PEFT has no LoHa and no LoRA of them, and torch turns their weights."""

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop

KEY = jax.random.key(0)
CONFIG = LoHaConfig(r=2, target_modules=["up"], init_weights=False)


class NnxModel(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.up = nnx.ConvTranspose(4, 4, (3, 3), rngs=nnx.Rngs(0))


def with_q(layer):
    return {"up": layer, "q": {"kernel": jnp.ones((4, 4))}}


def haliax_layer():
    axes = hax.Axis("in", 4), hax.Axis("out", 4)
    return hnn.ConvTranspose.init(("h", "w"), *axes, 3, key=KEY)


def torch_named():
    layer = torch.nn.ConvTranspose2d(4, 4, 3)
    named = {f"up.{name}": jnp.asarray(t.detach().numpy()) for name, t in layer.named_parameters()}
    return {**named, "q.weight": jnp.ones((4, 4))}


MODELS = {
    "nnx": (NnxModel, None),
    "equinox": (lambda: with_q(eqx.nn.ConvTranspose2d(4, 4, 3, key=KEY)), None),
    "haliax": (lambda: with_q(haliax_layer()), None),
    "torch's names": (torch_named, {"up": "iokk"}),
}


def linen():
    layers = {"ConvTranspose_0": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)}}
    return {"up": layers, "q": {"kernel": jnp.ones((4, 4))}}


def test_peft_refuses_them():
    module = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(4, 4, 3)})
    for config in (peft.LoHaConfig, peft.LoraConfig):
        with pytest.raises((TypeError, ValueError), match=r"ConvTranspose2d.* not supported"):
            peft.get_peft_model(module, config(target_modules=["up"]))


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_is_written_with_a_warning_and_no_lora_is(name, tmp_path):
    make, layouts = MODELS[name]
    params = loha_jax.inject(make(), CONFIG, key=KEY, layouts=layouts)
    with pytest.warns(UserWarning, match=r"PEFT has no LoHa for transposed.* \(up\).*`load_peft`"):
        interop.save_peft(tmp_path / "adapter", params)
    with pytest.warns(UserWarning, match=r"LyCORIS.*transposed.* \(up\).*`load_lycoris`"):
        interop.save_lycoris(tmp_path / "a.safetensors", params)
    for write in (interop.to_lora, lambda p: interop.save_lora(tmp_path / "lora", p)):
        with pytest.raises(ValueError, match=r"up is a transposed convolution.*no LoRA"):
            write(params)
    loaded = interop.load_peft(tmp_path / "adapter", make(), layouts=layouts)
    ours, again = interop.to_peft_state_dict(params), interop.to_peft_state_dict(loaded)
    assert all(np.array_equal(ours[key], again[key]) for key in ours)


def test_linens_are_known_by_their_names(tmp_path):
    config = LoHaConfig(r=2, target_modules=["ConvTranspose_0"], init_weights=False)
    params = loha_jax.inject(linen(), config, key=KEY, layouts={"up.*": "kkio"})
    with pytest.warns(UserWarning, match=r"transposed convolutions \(up\.ConvTranspose_0\)"):
        interop.save_peft(tmp_path, params)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_copy_is_refused(name, tmp_path):
    """PEFT would open it where it is square, with the taps and the channels in another order."""
    make, layouts = MODELS[name]
    config = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["up"], init_weights=False)
    params = loha_jax.inject(make(), config, key=KEY, layouts=layouts)
    for write in (interop.save_peft, interop.save_lora):
        with pytest.raises(ValueError, match=r"up\.weight is the weight of a transposed"):
            write(tmp_path / "adapter", params)
    module = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(4, 4, 3, bias=False)})
    module["q"] = torch.nn.Linear(4, 4, bias=False)
    model = peft.get_peft_model(
        module, peft.LoHaConfig(r=2, target_modules=["q"], modules_to_save=["up"])
    )
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"up\.weight are of transposed convolutions"):
        interop.load_peft(tmp_path / "theirs", make(), layouts=layouts)
    if name == "torch's names":
        return
    with pytest.raises(ValueError, match=r"transposed convolution.*taps reversed"):
        interop.save_merged(tmp_path / "merged", params)


def test_kerass_is_refused_too(tmp_path):
    model = keras.Sequential(
        [
            keras.layers.Input((4, 4, 4)),
            keras.layers.Conv2DTranspose(4, 3, name="up"),
            keras.layers.Dense(4, name="q"),
        ]
    )
    config = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["up"], init_weights=False)
    loha_jax.keras.inject(model, config, key=KEY)
    with pytest.raises(ValueError, match=r"up\.weight is the weight of a transposed"):
        interop.save_peft(tmp_path, model)


def test_an_adapted_layer_of_nnx_is_not_merged_into_torchs(tmp_path):
    params = loha_jax.inject(NnxModel(), CONFIG, key=KEY)
    with pytest.raises(ValueError, match=r"up\.kernel.*transposed convolution.*taps reversed"):
        interop.save_merged(tmp_path, params)


def test_torchs_own_weights_stay_as_they_are(tmp_path):
    """A dictionary of torch's names in and out, square, with an adapter merged."""
    torch.manual_seed(0)
    tree = torch_named()
    save_file({name: np.asarray(value) for name, value in tree.items()}, tmp_path / "m.safetensors")
    layouts = {"up": "iokk"}
    like = jax.tree.map(jnp.zeros_like, tree)
    read = interop.load_base(tmp_path / "m.safetensors", like, layouts=layouts)
    assert all(np.array_equal(read[name], value) for name, value in tree.items())
    params = loha_jax.inject(read, CONFIG, key=KEY, layouts=layouts)
    interop.save_merged(tmp_path / "merged", params, layouts=layouts)
    merged = load_file(tmp_path / "merged/model.safetensors")
    np.testing.assert_array_equal(merged["up.weight"], loha_jax.merge(params)["up.weight"])
    assert not np.array_equal(merged["up.weight"], tree["up.weight"])


@pytest.mark.parametrize("taps", [(2, 2), (3, 3)])
def test_linens_square_ones_that_are_called_up_are_asked_for(taps):
    """With `transpose_kernel` they are [..., out, in], without it [..., in, out]."""
    x = jnp.ones((1, 4, 4, 4))
    for transpose, word in ((True, "kkoi"), (False, "kkio")):
        layer = nn.ConvTranspose(4, taps, transpose_kernel=transpose)
        params = {"up": layer.init(KEY, x)["params"]}
        with pytest.raises(ValueError, match=r"up\.kernel.*'kkio' .*'kkoi' .*layouts="):
            loha_jax.inject(params, CONFIG, key=KEY)
        layouts = loha_jax.infer_layouts(
            lambda p, x, layer=layer: layer.apply({"params": p["up"]}, x), params, x
        )
        assert layouts == {"up": word}
        loha_jax.inject(params, CONFIG, key=KEY, layouts=layouts)
