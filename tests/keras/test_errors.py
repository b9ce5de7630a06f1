"""What cannot be right is refused, with the layer and what to do."""

import copy
import runpy

import keras
import numpy as np
import pytest
from keras import layers
from keras_models import KEY, adapted, images, net, quantise

import loha_jax
from loha_jax.keras import _keras_internals, inject

X = np.ones((1, 4, 4), "float32")
CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["up"])


def one(layer, shape=(4, 4)):
    return keras.Sequential([keras.Input(shape), layer])


def with_lora():
    model = one(layers.Dense(3, name="it"))
    model.layers[0].enable_lora(2)
    return model


def same_paths():
    inputs = keras.Input((4, 4))
    first = keras.Model(inputs, layers.Dense(4, name="it")(inputs), name="a")
    second = keras.Model(inputs, layers.Dense(4, name="it")(inputs), name="b")
    return keras.Model(inputs, second(first(inputs)))


def float8():
    model = one(layers.Dense(3, name="it"))
    model.layers[0].quantize("float8")
    return model


REFUSED = {
    "not built": (lambda: keras.Sequential([layers.Dense(3, name="it")]), "is not built yet"),
    "recurrent": (
        lambda: one(layers.SimpleRNN(3, name="it")),
        r"it/simple_rnn_cell/kernel cannot be adapted: a SimpleRNNCell is none of the.*Dense",
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
    config = loha_jax.LoHaConfig(r=2, target_modules=r"it(\.simple_rnn_cell)?")
    with pytest.raises(ValueError, match=message):
        inject(model, config, key=KEY)
    assert [(v.path, v.trainable) for v in model.variables] == held


def test_refused_arguments():
    with pytest.raises(TypeError, match="key"):
        inject(net(), CONFIG, key=3)
    with pytest.raises(TypeError, match=r"takes a keras\.Model, got dict"):
        inject({}, CONFIG, key=KEY)
    with pytest.raises(ValueError, match=r"'upp'} not found.*'up'"):
        inject(net(), loha_jax.LoHaConfig(r=2, target_modules=["upp"]), key=KEY)
    with pytest.raises(ValueError, match="already exists"):
        inject(adapted(), CONFIG, key=KEY)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, path: m.save(path / "x.keras"), r"net/conv.*save_peft.*save_weights.*merge"),
        (lambda m, path: keras.models.clone_model(m), "A .keras file, a config"),
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


def test_a_merged_model_is_saved_as_before(tmp_path):
    """So is one of a model inside another."""
    model = keras.Sequential([keras.Input((4, 4)), one(layers.Dense(3, name="it"))])
    adapted(model, target_modules=["it"])
    result = np.asarray(model(X))
    with pytest.raises(ValueError, match=r"the adapters of .*it"):
        model.save(tmp_path / "x.keras")
    loha_jax.merge(model).save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    np.testing.assert_allclose(np.asarray(loaded(X)), result, atol=1e-6)
    model.layers[0].layers[0].quantize("int8")
    assert model.layers[0].layers[0].quantization_mode == "int8"


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


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ImportError, match=r"JAX backend, .* uses 'torch'\. Set the env"):
        runpy.run_path(_keras_internals.__file__)


def test_dropout_without_training_is_refused():
    """`Net` does not tell its block whether it trains."""
    model = adapted(target_modules=["up"], rank_dropout=0.2)
    assert model(images(), training=False).shape == (6, 2)
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"adapter of block\.up drops out.*self.layer\(x, training"
    ):
        model.fit(images(), np.zeros((6, 2)), verbose=0)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_whole_cells_that_cudnn_may_read_are_refused(kind):
    """Not shown by a CPU: only a GPU hands a cell's variables to cuDNN without calling it."""
    config = loha_jax.LoHaConfig(
        r=2, target_modules=["up"], modules_to_save=[f"{kind.__name__.lower()}_cell"]
    )

    def net(**options):
        return keras.Sequential(
            [keras.Input((5, 4)), kind(3, name="rnn", **options), layers.Dense(3, name="up")]
        )

    with pytest.raises(ValueError, match="use_cudnn=False, or leave it out"):
        inject(net(), config, key=KEY)
    model = inject(net(use_cudnn=False), config, key=KEY)
    assert sum("_cell/" in variable.path for variable in model.trainable_variables) == 3
