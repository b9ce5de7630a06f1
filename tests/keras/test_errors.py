"""What cannot be right is refused, with the layer and what to do."""

import copy
import os
import subprocess
import sys

import jax
import keras
import numpy as np
import pytest
from keras import layers
from keras_models import KEY, adapted, images, net, quantise

import loha_jax
from loha_jax.keras import inject

CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["it", "up"])


def one(layer, shape=(4, 4)):
    return keras.Sequential([keras.Input(shape), layer])


def with_lora():
    model = one(layers.Dense(3, name="it"))
    model.layers[0].enable_lora(2)
    return model


def same_paths():
    inner = one(layers.Dense(4, name="it"))
    inputs = keras.Input((4, 4))
    first = keras.Model(inputs, layers.Dense(4, name="it")(inputs), name="a")
    second = keras.Model(inputs, layers.Dense(4, name="it")(inputs), name="b")
    del inner
    return keras.Model(inputs, second(first(inputs)))


def float8():
    model = one(layers.Dense(3, name="it"))
    model.layers[0].quantize("float8")
    return model


REFUSED = {
    "not built": (lambda: keras.Sequential([layers.Dense(3, name="it")]), "is not built yet"),
    "LSTM": (
        lambda: one(layers.LSTM(3, name="it")),
        r"it/lstm_cell/kernel cannot be adapted: a LSTMCell is none of the layers.*Dense",
    ),
    "depthwise": (lambda: one(layers.DepthwiseConv1D(2, name="it")), "a DepthwiseConv1D is none"),
    "transposed": (lambda: one(layers.Conv1DTranspose(3, 2, name="it")), "a Conv1DTranspose is no"),
    "constraint": (
        lambda: one(layers.Dense(3, kernel_constraint="unit_norm", name="it")),
        "it/kernel cannot be adapted: it has a constraint",
    ),
    "Keras' LoRA": (with_lora, "it has Keras' own LoRA"),
    "two of one path": (same_paths, "Two variables have the path it/kernel"),
    "float8": (float8, "a Dense quantised to float8 is none of int8 and int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models(case):
    build, message = REFUSED[case]
    model = build()
    held = [(v.path, v.trainable) for v in model.variables]
    config = loha_jax.LoHaConfig(r=2, target_modules=r"it(\.lstm_cell)?")
    with pytest.raises(ValueError, match=message):
        inject(model, config, key=KEY)
    assert [(v.path, v.trainable) for v in model.variables] == held


def test_refused_arguments():
    with pytest.raises(TypeError, match=r"takes a keras\.Model, got dict"):
        inject({}, CONFIG, key=KEY)
    with pytest.raises(ValueError, match=r"not found.*block\.up"):
        inject(net(), loha_jax.LoHaConfig(r=2, target_modules=["upp"]), key=KEY)
    with pytest.raises(ValueError, match="already exists"):
        inject(adapted(), CONFIG, key=KEY)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, path: m.save(path / "x.keras"), r"net/conv.*save_peft.*save_weights.*merge"),
        (lambda m, path: m.to_json(), "A .keras file, a config"),
        (lambda m, path: copy.deepcopy(m), "A .keras file, a config"),
        (lambda m, path: m.block.up.get_config(), "net/block/up"),
        (lambda m, path: m.block.get_config(), "net/block/up"),
        (lambda m, path: m.quantize("int8"), "net/conv has an adapter. Quantise the model before"),
        (lambda m, path: m.block.up.quantize("int8"), "net/block/up has an adapter"),
        (lambda m, path: m.block.up.enable_lora(2), "net/block/up has a LoHa adapter: Keras'"),
    ],
)
def test_refused_uses_of_an_adapted_model(tmp_path, use, message):
    model = adapted()
    with pytest.raises(ValueError, match=message):
        use(model, tmp_path)
    assert not list(tmp_path.iterdir())
    loha_jax.merge(model)
    if "save" not in message:
        return
    outer = keras.Sequential([one(layers.Dense(3, name="it"))])
    adapted(outer, target_modules=["it"])
    with pytest.raises(ValueError, match=message.replace("net/conv", "it")):
        use(outer, tmp_path)
    use(loha_jax.merge(outer), tmp_path)  # as before
    assert keras.saving.load_model(tmp_path / "x.keras").layers


def test_rows_with_adapters_of_their_own_are_refused():
    run = loha_jax.adapt(lambda m, x: m(x), adapter_index=np.zeros(6, int))
    with pytest.raises(TypeError, match="runs all rows through its active adapters"):
        run(adapted(), images())


def test_adapt_of_a_function_of_the_model_changes_nothing():
    model = adapted()
    result = loha_jax.adapt(lambda m, x: m(x))(model, images())
    np.testing.assert_array_equal(np.asarray(result), np.asarray(model(images())))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["head"]}, "modules_to_save names the layer of head/kernel, which is"),
        ({"weight_decompose": True}, "needs the norms of a float kernel"),
    ],
)
def test_refused_adapters_of_quantised_layers(config, message):
    model = net()
    quantise(model, "int8", [model.head, model.block.up])
    kind = loha_jax.LycorisConfig if "weight_decompose" in config else loha_jax.LoHaConfig
    with pytest.raises(ValueError, match=message):
        inject(model, kind(r=2, target_modules=["up"], **config), key=KEY)
    assert len(model.trainable_variables) > 4


def test_another_backend_is_refused_and_keras_is_imported_late():
    code = (
        "import sys, loha_jax\n"
        "assert 'keras' not in sys.modules\n"
        "try:\n    import loha_jax.keras\n"
        "except ImportError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "JAX backend, and this process uses 'numpy'. Set the environment" in result.stdout


def test_the_key_is_checked():
    with pytest.raises(TypeError, match="key"):
        inject(net(), CONFIG, key=3)
    assert jax.random.key(0) is not None
