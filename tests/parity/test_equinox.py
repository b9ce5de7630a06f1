"""Equinox models as they are.

Layouts of every layer, files that the real PEFT opens, torch's weights both ways.
"""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from leaves import loha_leaves
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop

KEY = jax.random.key(0)


def stacked(make):
    return eqx.filter_vmap(make)(jax.random.split(KEY, 3))


LAYERS = {
    "Linear": (lambda: eqx.nn.Linear(4, 4, key=KEY), {"m": "oi"}),
    "scalar Linear": (lambda: eqx.nn.Linear("scalar", 3, key=KEY), {"m": "oi"}),
    "stacked Linear": (
        lambda: stacked(lambda key: eqx.nn.Linear(4, 4, use_bias=False, key=key)),
        {"m": "soi"},
    ),
    "Conv1d": (lambda: eqx.nn.Conv1d(4, 4, 4, use_bias=False, key=KEY), {"m": "oik"}),
    "Conv2d": (lambda: eqx.nn.Conv2d(6, 8, 3, use_bias=False, key=KEY), {"m": "oikk"}),
    "Conv3d": (lambda: eqx.nn.Conv3d(3, 3, 3, use_bias=False, key=KEY), {"m": "oikkk"}),
    "depthwise": (lambda: eqx.nn.Conv2d(6, 6, 3, groups=6, use_bias=False, key=KEY), {"m": "oikk"}),
    "stacked Conv1d": (
        lambda: stacked(lambda key: eqx.nn.Conv1d(3, 3, 3, use_bias=False, key=key)),
        {"m": "soik"},
    ),
    "ConvTranspose": (lambda: eqx.nn.ConvTranspose2d(4, 4, 3, key=KEY), {"m": "oikk"}),
    "Embedding": (lambda: eqx.nn.Embedding(5, 5, key=KEY), {"m": "oi"}),
    "GRUCell": (lambda: eqx.nn.GRUCell(12, 4, key=KEY), {"m.weight_ih": "oi", "m.weight_hh": "oi"}),
    "LSTMCell": (
        lambda: eqx.nn.LSTMCell(3, 4, key=KEY),
        {"m.weight_ih": "oi", "m.weight_hh": "oi"},
    ),
    "attention": (
        lambda: eqx.nn.MultiheadAttention(2, 4, key=KEY),
        {f"m.{name}_proj": "oi" for name in ("query", "key", "value", "output")},
    ),
    "norm over two axes": (
        lambda: [eqx.nn.LayerNorm((4, 4)), eqx.nn.Linear(4, 4, key=KEY)],
        {"m.1": "oi"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_their_layouts(name):
    make, expected = LAYERS[name]
    tree = {"m": make()}
    config = LoHaConfig(r=2, target_modules=list(expected))
    leaves = loha_leaves(loha_jax.inject(tree, config, key=KEY))
    assert {leaf.names[0].removeprefix("0."): leaf.layout.word for leaf in leaves} == expected


def test_all_linear_takes_linear_layers_alone():
    tree = {
        "embed": eqx.nn.Embedding(6, 4, key=KEY),
        "norm": eqx.nn.LayerNorm((4, 4)),
        "conv": eqx.nn.Conv2d(3, 3, 3, use_bias=False, key=KEY),
        "experts": stacked(lambda key: eqx.nn.Linear(4, 4, use_bias=False, key=key)),
        "mlp": eqx.nn.MLP(4, 4, 4, 1, key=KEY),
        "lm_head": eqx.nn.Linear(4, 6, key=KEY),
    }
    adapted = loha_leaves(
        loha_jax.inject(tree, LoHaConfig(r=2, target_modules="all-linear"), key=KEY)
    )
    found = {name for leaf in adapted for name in leaf.names}
    assert found == {*(f"{n}.experts" for n in range(3)), "mlp.layers.0", "mlp.layers.1"}


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    q: eqx.nn.Linear

    def __init__(self):
        first, second = jax.random.split(KEY)
        self.conv = eqx.nn.Conv2d(4, 4, 3, use_bias=False, key=first)
        self.q = eqx.nn.Linear(4, 4, key=second)

    def __call__(self, x):
        return self.q(jax.nn.relu(self.conv(x)).mean((1, 2)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, bias=False)
        self.q = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.q(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def twins(tmp_path):
    """Torch's weights, loaded into Equinox: square, so that a transposed one would fit."""
    torch.manual_seed(0)
    module = TorchNet().eval()
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    return module, interop.load_base(tmp_path / "model.safetensors", Net()), weights


X = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)


def test_torchs_weights_go_in_and_out(twins, tmp_path):
    module, net, weights = twins
    np.testing.assert_allclose(
        jax.vmap(net)(X), module(torch.tensor(X)).detach().numpy(), atol=1e-5
    )
    interop.save_merged(tmp_path / "out", net)
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == weights.keys()
    assert all(np.array_equal(written[name], weights[name]) for name in weights)


def test_peft_opens_the_adapter_of_square_layers(twins, tmp_path):
    module, net, _ = twins
    config = LoHaConfig(r=2, alpha=8, target_modules=["conv", "q"], init_weights=False)
    adapted = loha_jax.inject(net, config, key=jax.random.key(1))
    interop.save_peft(tmp_path / "adapter", adapted)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "adapter").eval()
    theirs = opened(torch.tensor(X)).detach().numpy()
    ours = loha_jax.adapt(lambda net, x: jax.vmap(net)(x))(adapted, X)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - module(torch.tensor(X)).detach().numpy()).max() > 0.01
    again = interop.load_peft(tmp_path / "adapter", net)
    np.testing.assert_allclose(jax.vmap(loha_jax.merge(again))(X), theirs, atol=1e-4)


def test_a_transposed_convolution_is_adapted_and_not_exchanged(tmp_path):
    layer = {"up": eqx.nn.ConvTranspose2d(4, 4, 3, key=KEY)}
    adapted = loha_jax.inject(
        layer, LoHaConfig(r=2, target_modules=["up"], init_weights=False), key=KEY
    )
    ours = loha_jax.adapt(lambda tree, x: tree["up"](x))(adapted, X[0])
    np.testing.assert_allclose(ours, loha_jax.merge(adapted)["up"](X[0]), atol=1e-4)
    for layouts in (None, {"up": "oikk"}):
        with pytest.raises(ValueError, match=r"transposed convolution.*taps reversed"):
            interop.save_merged(tmp_path / "out", layer, layouts=layouts)
    save_file(
        {"up.weight": np.zeros((4, 4, 3, 3), np.float32), "up.bias": np.zeros(4, np.float32)},
        tmp_path / "m.safetensors",
    )
    with pytest.raises(interop.FileError, match=r"transposed convolution.*taps reversed"):
        interop.load_base(tmp_path / "m.safetensors", layer)


def test_a_recurrent_cells_weights_are_torchs(tmp_path):
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(12, 4, bias=False)
    save_file(
        {f"gru.{name}": t.numpy() for name, t in cell.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    tree = interop.load_base(
        tmp_path / "m.safetensors", {"gru": eqx.nn.GRUCell(12, 4, use_bias=False, key=KEY)}
    )
    x, h = np.ones(12, np.float32), np.ones(4, np.float32)
    theirs = cell(torch.tensor(x)[None], torch.tensor(h)[None])[0].detach().numpy()
    np.testing.assert_allclose(tree["gru"](jnp.asarray(x), jnp.asarray(h)), theirs, atol=1e-5)
