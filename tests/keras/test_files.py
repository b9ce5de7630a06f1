"""Files of adapters with the real PEFT, and files of weights with Keras."""

import keras
import numpy as np
import pytest
import torch
from keras_models import (
    KEY,
    TARGETS,
    adapted,
    images,
    loha_tree,
    net,
    output,
    quantise,
    twin,
    values,
)
from peft import PeftModel

import loha_jax
from loha_jax import interop
from loha_jax.keras import inject

X = images()


def in_peft(model, folder):
    """The result of PEFT's model of a folder."""
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder)(torch.from_numpy(X)).numpy()


def base_model(mode):
    """A `Net`, some of whose layers are quantised."""
    model = net()
    return model if mode is None else quantise(model, mode, [model.block.up, model.head])


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        (None, {}),
        (None, {"modules_to_save": ["head", "norm"], "target_modules": ["conv", "up"]}),
        (None, {"use_effective_conv2d": True, "rank_pattern": {"up": 3}}),
        ("int8", {}),
        ("int4", {}),
    ],
)
def test_peft_opens_the_file_and_the_model_opens_it_again(tmp_path, mode, settings):
    base = base_model(mode)
    model_twin, before = twin(base), output(base, X)
    model = adapted(base, **settings)
    if "modules_to_save" in settings:
        for variable in model.trainable_variables:
            variable.assign(variable.value + 0.1)
    after = output(model, X)
    interop.save_peft(tmp_path, model)
    assert np.abs(after - before).max() > 0.05
    np.testing.assert_allclose(in_peft(model_twin, tmp_path), after, atol=1e-5)
    again = base_model(mode)
    assert interop.load_peft(tmp_path, again) is again
    np.testing.assert_array_equal(output(again, X), after)
    assert len(again.trainable_variables) == len(model.trainable_variables)


def test_a_file_of_peft_adapts_the_model(tmp_path):
    from peft import LoHaConfig, get_peft_model

    base = net()
    other = get_peft_model(
        twin(base), LoHaConfig(r=2, target_modules=TARGETS, init_weights=False)
    ).eval()
    other.save_pretrained(tmp_path)
    interop.load_peft(tmp_path, base)
    with torch.no_grad():
        expected = other(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(output(base, X), expected, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "int8"])
def test_weights_are_saved_and_loaded(tmp_path, mode):
    def model(**settings):
        return adapted(
            base_model(mode), target_modules=["conv", "up"], modules_to_save=["norm"], **settings
        )

    first, second = model(), model()
    for variable in first.variables:
        if variable.dtype == "float32" and "scale" not in variable.name:
            variable.assign(variable.value + 0.01)
    assert np.abs(output(first, X) - output(second, X)).max() > 1e-3
    first.save_weights(tmp_path / "x.weights.h5")
    second.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(output(second, X), output(first, X))
    held, kept = values(second.variables), values(first.variables)
    assert all(np.array_equal(held[path], kept[path]) for path in kept)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: net(), "expected 2 variables, but received"),
        (lambda: adapted(r=3), "saved with other adapters"),
        (lambda: adapted(alpha=5), "saved with other adapters"),
        (lambda: adapted(target_modules=["conv"]), "expected 2 variables, but received"),
        (lambda: inject(adapted(), CONFIG, key=KEY, adapter_name="b"), "saved with other"),
    ],
    ids=["plain", "rank", "alpha", "targets", "adapters"],
)
def test_weights_of_other_adapters_are_refused(tmp_path, other, message):
    adapted().save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match=message):
        other().load_weights(tmp_path / "x.weights.h5")


CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["up"])


def test_weights_without_adapters_are_refused_by_an_adapted_model(tmp_path):
    net().save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="up were saved with other adapters: the file has none"):
        adapted(target_modules=["up"]).load_weights(tmp_path / "x.weights.h5")


def test_merged_and_unloaded_models_are_keras_own(tmp_path):
    model, expected, base = adapted(), None, net()
    expected = output(model, X)
    assert loha_jax.merge(model) is model
    np.testing.assert_allclose(output(model, X), expected, atol=1e-6)
    assert type(model.conv) is keras.layers.Conv2D
    model.save_weights(tmp_path / "x.weights.h5")
    plain = net()
    plain.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(output(plain, X), output(model, X))
    for attributes in ("trainable_variables", "non_trainable_variables"):
        of_base, of_model = getattr(base, attributes), getattr(model, attributes)
        assert [v.path for v in of_model] == [v.path for v in of_base]
    unloaded = loha_jax.unload(adapted())
    np.testing.assert_array_equal(output(unloaded, X), output(base, X))
    assert not [name for name in vars(unloaded.conv) if "loha" in name or "lora_" in name[7:]]


def test_int8_is_merged_and_quantised_again():
    model = adapted(base_model("int8"), target_modules=["up", "head"])
    exact = loha_jax.dequantise(loha_jax.merge(loha_tree(model)))
    untouched = np.asarray(model.block.down._kernel.value)
    losses = loha_jax.requantising_losses(model)
    with pytest.raises(ValueError, match="requantise=True"):
        loha_jax.merge(model)
    assert len(model.trainable_variables) == 8  # nothing has changed
    loha_jax.merge(model, requantise=True)
    tree = loha_jax.dequantise(loha_tree(model))
    for name, layer in (("block/up", model.block.up), ("head", model.head)):
        assert layer.quantization_mode == "int8"
        step = 1 / np.asarray(layer.kernel_scale.value)
        error = np.abs(np.asarray(tree[f"{name}/kernel"]) - np.asarray(exact[f"{name}/kernel"]))
        assert (error <= 0.51 * step).all()
    assert np.array_equal(untouched, np.asarray(model.block.down._kernel.value))
    assert set(losses) == {"block.up", "head"}
    assert max(losses.values()) < 0.1


@pytest.mark.parametrize("kind", [keras.layers.DepthwiseConv2D, keras.layers.DepthwiseConv1D])
def test_depthwise_kernels_are_in_no_file_of_torch(kind, tmp_path):
    """torch has the input's channels in front, and no layout says so."""
    ndim = 2 if kind is keras.layers.DepthwiseConv2D else 1
    dense = keras.layers.Dense(2, name="head")
    model = keras.Sequential([keras.Input((*[5] * ndim, 3)), kind(3, name="dw"), dense])
    config = loha_jax.LoHaConfig(r=2, target_modules=["head"], modules_to_save=["dw"])
    inject(model, config, key=KEY)
    with pytest.raises(ValueError, match=r"dw.*Keras' depthwise"):
        interop.save_merged(tmp_path, model)
    with pytest.raises(ValueError, match=r"dw.*Keras' depthwise"):
        interop.save_peft(tmp_path, model)
