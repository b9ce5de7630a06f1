"""`fit` trains the adapter alone, as PEFT and torch do."""

import keras
import numpy as np
import pytest
import torch
from keras import layers
from keras_models import KEY, TARGETS, adapted, images, net, output, quantise, twin, values
from peft import LoHaConfig, get_peft_model
from safetensors.numpy import load_file

import loha_jax
from loha_jax import interop
from loha_jax.keras import inject

X = images()
Y = np.random.default_rng(1).normal(size=(6, 2)).astype("float32")


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.Adam(0.05), "mse")
    return model


def unchanged(before, after):
    return {path for path, value in before.items() if np.array_equal(after[path], value)}


@pytest.mark.parametrize("mode", [None, "int8"])
def test_fit_changes_no_array_of_the_base(mode):
    model = net() if mode is None else quantise(m := net(), mode, [m.block.up, m.head])
    compiled(model).fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
    base = values(model.variables)
    adapted(model, init_weights=True)
    for function in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="must call `compile"):
            function(X, Y, verbose=0)
    model.norm.trainable = False  # its statistics change otherwise, as in PEFT
    history = compiled(model).fit(X, Y, epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    now = values(model.variables)
    assert unchanged(base, now) == set(base)
    assert len(now) == len(base) + 12
    assert len(model.optimizer.variables) == 2 + 2 * 12
    np.testing.assert_allclose(model.predict(X, verbose=0), output(model, X), atol=1e-5)
    loss = np.mean((output(model, X) - Y) ** 2)
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), loss, rtol=1e-4)
    again = model.fit(X, Y, verbose=0).history["loss"]
    assert again[0] < history[0]


def test_only_statistics_change_besides_the_factors():
    model = adapted(target_modules=["up"])
    base = values(model.non_trainable_variables)
    compiled(model).fit(X, Y, verbose=0)
    changed = set(base) - unchanged(base, values(model.non_trainable_variables))
    assert changed == {"net/norm/moving_mean", "net/norm/moving_variance"}


def test_steps_of_fit_are_those_of_peft(tmp_path):
    base = net()
    config = LoHaConfig(r=2, alpha=12, target_modules=TARGETS, init_weights=False)
    config.modules_to_save = ["norm"]
    torch_model = get_peft_model(twin(base), config)
    torch_model.save_pretrained(tmp_path / "start")
    model = interop.load_peft(tmp_path / "start", base)
    compiled(model, keras.optimizers.SGD(0.3)).fit(X, Y, 6, epochs=3, shuffle=False, verbose=0)
    trained = [p for p in torch_model.parameters() if p.requires_grad]
    assert len(trained) == len(model.trainable_variables) == 14
    optimizer = torch.optim.SGD(trained, 0.3)
    torch_model.train()
    for _ in range(3):
        optimizer.zero_grad()
        ((torch_model(torch.from_numpy(X)) - torch.from_numpy(Y)) ** 2).mean().backward()
        optimizer.step()
    torch_model.save_pretrained(tmp_path / "torch")
    interop.save_peft(tmp_path / "keras", model)
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("start", "torch", "keras"))
    start, theirs, ours = map(load_file, files)
    assert ours.keys() <= theirs.keys()
    for name in ours:
        if "running_var" not in name and "num_batches" not in name:  # torch divides by n - 1
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)
            assert np.abs(ours[name] - start[name]).max() > 1e-4


def test_mixed_precision_trains():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Embedding(9, 4, dtype="mixed_bfloat16", name="table")(inputs)
    x = layers.Dense(2, dtype="mixed_bfloat16", name="head")(x)
    model = keras.Model(inputs, x)
    inject(model, loha_jax.LoHaConfig(r=2, target_modules=["table", "head"]), key=KEY)
    ids = np.random.default_rng(0).integers(0, 9, (8, 4), dtype="int32")
    history = compiled(model).fit(ids, ids[..., None] / 9 + np.zeros(2), epochs=8, verbose=0)
    assert history.history["loss"][-1] < 0.9 * history.history["loss"][0]


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_dropout_is_for_training_alone(kind):
    """Also in layers whose `call` has no `training`, and in the compiled step."""
    layer, x = {
        "conv": (layers.Conv1D(3, 2, name="it"), np.ones((2, 4, 3), "float32")),
        "embedding": (layers.Embedding(5, 3, name="it"), np.ones((2, 4), "int32")),
    }[kind]
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    model = keras.Model(inputs, layer(inputs))
    base = output(model, x)
    adapted(model, target_modules=["it"], module_dropout=0.5)
    whole = output(model, x)
    results = [np.asarray(model(x, training=True)) for _ in range(9)]
    kinds = [
        np.allclose(r, base, atol=1e-6) + 2 * np.allclose(r, whole, atol=1e-6) for r in results
    ]
    assert set(kinds) == {1, 2}
    compiled(model, keras.optimizers.SGD(0.0))
    losses = [model.train_on_batch(x, base) for _ in range(9)]
    assert {0.0} < {round(float(loss), 6) for loss in losses}
    before = values(model.variables)
    assert model.evaluate(x, base, verbose=0) > 0
    assert unchanged(before, values(model.variables)) == set(before)
    loha_jax.merge(model)
    np.testing.assert_allclose(np.asarray(model(x, training=True)), whole, atol=1e-6)


def test_frozen_layers_are_trained_too():
    model = net()
    model.trainable = False
    model.trainable = True
    model.block.trainable = False
    adapted(model, target_modules=["up"])
    assert len(model.trainable_variables) == 4
    loha_jax.unload(model)
    paths = [v.path for v in model.trainable_variables]
    assert "net/block/up/kernel" not in paths
    assert "net/head/kernel" in paths


def test_a_change_through_an_inner_model_reaches_the_models_around_it():
    """They have compiled functions and optimizers of their own."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="up")])
    outer = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
    x, y = np.ones((2, 4), "float32"), np.ones((2, 2), "float32")
    compiled(outer).fit(x, y, verbose=0)
    config = loha_jax.LoHaConfig(r=2, target_modules=["up"], init_weights=False)
    plain = outer.predict(x, verbose=0)
    inject(inner, config, key=KEY)
    with pytest.raises(ValueError, match="must call `compile"):
        outer.fit(x, y, verbose=0)
    with_adapter = outer.predict(x, verbose=0)
    assert np.abs(with_adapter - plain).max() > 1e-4
    loha_jax.scale(inner, {"default": 0.0})
    np.testing.assert_allclose(outer.predict(x, verbose=0), plain, atol=1e-6)


def test_a_frozen_model_is_refused():
    """`fit` would train nothing, without a word."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="up")])
    model.trainable = False
    with pytest.raises(ValueError, match=r"trainable=False.*model\.trainable = True first"):
        inject(model, loha_jax.LoHaConfig(r=2, target_modules=["up"]), key=KEY)
