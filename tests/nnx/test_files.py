"""Files of adapted Flax NNX models (PEFT's, LyCORIS', Orbax's), and the author layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_models import split
from nnx_reference import conv, dense, ndh, numpy_delta, table
from random_arrays import normal_array
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.nnx import (
    LoHaConv,
    LoHaEinsum,
    LoHaEmbed,
    LoHaLinear,
    LoHaLinearGeneral,
    LoHaParam,
    inject,
    set_dropout,
)


class Net(nnx.Module):
    """A convolution, a batch norm, and two linear layers."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.lin = nnx.Linear(4 * 5 * 5, 6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv(x)))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in torch's order
        return self.head(jnp.tanh(self.lin(x)))


def torch_twin(model):
    torch = pytest.importorskip("torch")

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.bn = torch.nn.BatchNorm2d(4)
            self.lin = torch.nn.Linear(4 * 5 * 5, 6)
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x):
            x = torch.relu(self.bn(self.conv(x)))
            return self.head(torch.tanh(self.lin(x.flatten(1))))

    twin = Twin()
    tensor = lambda v: torch.tensor(np.array(v.get_value()))  # noqa: E731
    twin.load_state_dict(
        {
            "conv.weight": tensor(model.conv.kernel).permute(3, 2, 0, 1),
            "conv.bias": tensor(model.conv.bias),
            "bn.weight": tensor(model.bn.scale),
            "bn.bias": tensor(model.bn.bias),
            "bn.running_mean": tensor(model.bn.mean),
            "bn.running_var": tensor(model.bn.var),
            "bn.num_batches_tracked": torch.tensor(0),
            **{f"{n}.weight": tensor(getattr(model, n).kernel).T for n in ("lin", "head")},
            **{f"{n}.bias": tensor(getattr(model, n).bias) for n in ("lin", "head")},
        }
    )
    return twin.eval()


IMAGES = np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)


def torch_output(twin):
    import torch

    with torch.no_grad():
        return twin(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("cores", [False, True], ids=["flat", "cores"])
@pytest.mark.parametrize("saved", [None, ["head", "bn"]], ids=["", "modules_to_save"])
def test_peft_opens_what_a_model_saves_and_the_model_what_peft_saves(tmp_path, cores, saved):
    peft = pytest.importorskip("peft")
    import torch

    model = Net(nnx.Rngs(0))
    twin = torch_twin(model)
    base = model(IMAGES)
    np.testing.assert_allclose(base, torch_output(twin), rtol=0, atol=1e-5)
    settings = {
        "r": 2,
        "alpha": 3,
        "init_weights": False,
        "target_modules": ["conv", "lin"],
        "use_effective_conv2d": cores,
        "modules_to_save": saved,
    }
    inject(model, LoHaConfig(**settings), rngs=nnx.Rngs(1))
    if saved:
        model.head.kernel_lora_copy.set_value(model.head.kernel_lora_copy.get_value() + 0.1)
        model.bn.mean_lora_copy.set_value(jnp.full(4, 0.2))
    out = model(IMAGES)
    interop.save_peft(tmp_path / "ours", model)
    opened = peft.PeftModel.from_pretrained(torch_twin(Net(nnx.Rngs(0))), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_output(opened), out, rtol=0, atol=1e-5)
    assert np.abs(out - base).max() > 1e-3

    torch.manual_seed(0)
    theirs = peft.get_peft_model(torch_twin(Net(nnx.Rngs(0))), peft.LoHaConfig(**settings))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2))) ** 2).sum().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = interop.load_peft(tmp_path / "theirs", Net(nnx.Rngs(0)))
    assert isinstance(loaded, Net)
    np.testing.assert_allclose(loaded(IMAGES), torch_output(theirs.eval()), rtol=0, atol=1e-5)
    assert loha_jax.explain(lambda m, x: m(x), loaded, IMAGES).dense == ()
    interop.save_peft(tmp_path / "again", loaded)
    file = "adapter_model.safetensors"
    written, read = (load_file(tmp_path / n / file) for n in ("again", "theirs"))
    assert written.keys() == read.keys()
    for key in read:
        np.testing.assert_array_equal(written[key], read[key])


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path):
    interop.save_peft(
        tmp_path,
        inject(Net(nnx.Rngs(0)), LoHaConfig(r=2, target_modules=["lin"]), rngs=nnx.Rngs(1)),
    )
    other = nnx.Dict(lin=nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(other)
    with pytest.raises(ValueError, match="misshapen"):
        interop.load_peft(tmp_path, other)
    assert nnx.graphdef(other) == graphdef


def test_base_checkpoints_go_into_a_model_and_merged_ones_out_of_it(tmp_path):
    model = inject(
        Net(nnx.Rngs(0)),
        LoHaConfig(r=2, init_weights=False, target_modules=["conv", "lin"]),
        rngs=nnx.Rngs(1),
    )
    interop.save_merged(tmp_path, model)
    assert type(model.lin.kernel_lora_hada_w1_a) is LoHaParam
    state = load_file(tmp_path / "model.safetensors")
    assert state["conv.weight"].shape == (4, 3, 3, 3)
    other = Net(nnx.Rngs(5))
    assert interop.load_base(tmp_path, other) is other
    np.testing.assert_allclose(other(IMAGES), model(IMAGES), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        other.conv.kernel[...], loha_jax.merge(nnx.clone(model)).conv.kernel[...]
    )
    with pytest.raises(ValueError, match="load it first"):
        interop.load_base(tmp_path, model)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.lin = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.lin(x))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Layer)(split(rngs, 3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


def test_stacked_layers_are_modules_of_their_own_in_the_file(tmp_path):
    config = LoHaConfig(
        r=2,
        alpha=3,
        init_weights=False,
        target_modules=r"layers\.[02]\.lin",
        rank_pattern={"2.lin": 3},
    )
    model, x = inject(Stacked(nnx.Rngs(0)), config, rngs=nnx.Rngs(1)), jnp.ones((2, 4))
    interop.save_peft(tmp_path, model)
    state = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.layers"
    assert {k: v.shape for k, v in state.items() if k.endswith("w1_a")} == {
        f"{prefix}.0.lin.hada_w1_a": (4, 2),
        f"{prefix}.2.lin.hada_w1_a": (4, 3),
    }
    loaded = interop.load_peft(tmp_path, Stacked(nnx.Rngs(0)))
    np.testing.assert_array_equal(loaded(x), model(x))
    plain = Stacked(nnx.Rngs(0))
    kernel = np.array(plain.layers.lin.kernel.get_value())
    for n, r in ((0, 2), (2, 3)):
        w1, w2 = (
            state[f"{prefix}.{n}.lin.hada_w{k}_a"] @ state[f"{prefix}.{n}.lin.hada_w{k}_b"]
            for k in (1, 2)
        )
        kernel[n] += (w1 * w2).T * 3 / r
    plain.layers.lin.kernel.set_value(jnp.asarray(kernel))
    np.testing.assert_allclose(model(x), plain(x), rtol=0, atol=1e-6)


def test_lycoris_file(tmp_path):
    model = inject(
        Net(nnx.Rngs(0)),
        LoHaConfig(
            r=2,
            alpha=3,
            init_weights=False,
            target_modules=["conv", "lin"],
            use_effective_conv2d=True,
        ),
        rngs=nnx.Rngs(1),
    )
    interop.save_lycoris(tmp_path / "a.safetensors", model)
    state = load_file(tmp_path / "a.safetensors")
    assert state["lycoris_conv.hada_t1"].shape == (2, 2, 3, 3)
    assert state["lycoris_lin.alpha"] == 3
    np.testing.assert_array_equal(
        state["lycoris_lin.hada_w1_a"],
        model.lin.kernel_lora_hada_w1_a.get_value(),
    )


def test_orbax_saves_and_restores_the_factors_alone(tmp_path):
    config = LoHaConfig(r=2, init_weights=False, target_modules=["conv", "lin"])
    model, other = (inject(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "factors", nnx.state(model, LoHaParam))
    with ocp.StandardCheckpointer() as checkpointer:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(other, LoHaParam))
        restored = checkpointer.restore(tmp_path / "factors", abstract)
    assert np.abs(other(IMAGES) - model(IMAGES)).max() > 1e-3
    nnx.update(other, restored)
    np.testing.assert_array_equal(other(IMAGES), model(IMAGES))


# ----------------------------------------------------------------------------------- author layers

LAYERS = {  # the layer, Flax's own, the shape of its input, and how ΔW folds into the kernel
    "LoHaLinear": (LoHaLinear, nnx.Linear, (4, 6), {}, (2, 4), dense),
    "LoHaLinearGeneral": (
        LoHaLinearGeneral,
        nnx.LinearGeneral,
        (4, (2, 3)),
        {"use_bias": False},
        (2, 4),
        dense,
    ),
    "LoHaConv": (LoHaConv, nnx.Conv, (4, 6, (3, 3)), {}, (1, 5, 5, 4), conv),
    "LoHaConv, cores": (
        LoHaConv,
        nnx.Conv,
        (4, 6, 3),
        {"use_effective_conv2d": True},
        (1, 5, 4),
        conv,
    ),
    "LoHaEinsum": (
        LoHaEinsum,
        nnx.Einsum,
        ("btd,ndh->btnh", (2, 4, 3)),
        {"bias_shape": (2, 3)},
        (1, 5, 4),
        ndh,
    ),
    "LoHaEmbed": (LoHaEmbed, nnx.Embed, (11, 4), {}, None, table),
}


@pytest.mark.parametrize("name", LAYERS)
def test_author_layers(name, x64):
    cls, plain_cls, args, options, shape, fold = LAYERS[name]
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    x = jnp.array([[3, 7]]) if shape is None else normal_array(0, shape, jnp.float64)
    kernel = "embedding" if cls is LoHaEmbed else "kernel"
    ours = {"r": 2, "alpha": 3, "init_weights": False}
    plain_options = {k: v for k, v in options.items() if k != "use_effective_conv2d"}
    plain = plain_cls(*args, rngs=nnx.Rngs(0), **plain_options, **dtypes)
    layer = cls(*args, rngs=nnx.Rngs(0), **options, **ours, **dtypes)
    assert type(cls(*args, rngs=nnx.Rngs(0), **options)) is cls
    np.testing.assert_array_equal(getattr(layer, kernel)[...], getattr(plain, kernel)[...])
    if getattr(plain, "bias", None) is not None:
        np.testing.assert_array_equal(layer.bias.get_value(), plain.bias.get_value())
    start = cls(*args, rngs=nnx.Rngs(0), **options, **dtypes)  # PEFT's first factors: no update
    np.testing.assert_array_equal(start(x), plain(x))
    weight = getattr(plain, kernel)
    weight.set_value(weight.get_value() + fold(numpy_delta(layer, kernel), weight.shape))
    np.testing.assert_allclose(layer(x), plain(x), rtol=0, atol=1e-10)
    if cls is LoHaEmbed:
        np.testing.assert_allclose(
            layer.attend(jnp.ones((1, 4))), plain.attend(jnp.ones((1, 4))), rtol=0, atol=1e-10
        )
    assert loha_jax.explain(lambda m, x: m(x), layer, x).dense == ()
    merged = loha_jax.merge(nnx.clone(layer))
    assert type(merged) is plain_cls
    np.testing.assert_allclose(merged(x), plain(x), rtol=0, atol=1e-10)
    stacked = nnx.vmap(lambda rngs: cls(*args, rngs=rngs, **options, **ours, **dtypes))(
        split(nnx.Rngs(0), 3)
    )
    run = nnx.vmap(lambda layer: layer(x))
    out = run(stacked)
    assert out.shape == (3, *plain(x).shape)
    np.testing.assert_allclose(run(loha_jax.merge(nnx.clone(stacked))), out, rtol=0, atol=1e-10)


class Author(nnx.Module):
    def __init__(self, rngs):
        self.up = LoHaLinear(4, 6, r=2, alpha=3, init_weights=False, rngs=rngs)
        self.down = nnx.List([LoHaLinear(6, 4, r=3, alpha=5, init_weights=False, rngs=rngs)])

    def __call__(self, x):
        return self.down[0](jnp.tanh(self.up(x)))


def test_a_model_of_author_layers_is_saved_by_its_paths(tmp_path):
    model, x = Author(nnx.Rngs(0)), jnp.ones((2, 4))
    interop.save_peft(tmp_path, model)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        k.removeprefix("base_model.model."): v.shape for k, v in state.items() if k.endswith("w1_b")
    } == {
        "up.hada_w1_b": (2, 4),
        "down.0.hada_w1_b": (3, 6),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down.0", "up"]
    base = loha_jax.unload(nnx.clone(model))
    assert type(base.up) is nnx.Linear
    loaded = interop.load_peft(tmp_path, base)
    np.testing.assert_array_equal(loaded(x), model(x))
    factors = loha_jax.nnx.model_tree.tree_of(loaded)["down"][0]["kernel"].adapters["default"]
    assert (factors.ranks, factors.alphas) == ((3,), (5,))


class Mixed(nnx.Module):
    def __init__(self, one, other):
        self.a = LoHaConv(4, 4, (3, 3), r=2, rngs=nnx.Rngs(0), **one)
        self.b = LoHaConv(4, 4, (3, 3), r=2, rngs=nnx.Rngs(0), **other)
        self.point = LoHaConv(4, 4, (1, 1), r=2, rngs=nnx.Rngs(0))


CORES = {"use_effective_conv2d": True}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            CORES,
            {},
            "one use_effective_conv2d for all modules, the adapter default has True in a, "
            "False in b",
        ),
        (
            {"rank_dropout": 0.5},
            {"rank_dropout": 0.25},
            "one rank_dropout for all modules.* 0.5 in a, 0.25 in b",
        ),
    ],
)
def test_what_pefts_config_cannot_say_is_an_error(tmp_path, one, other, message):
    with pytest.raises(ValueError, match=message):
        interop.save_peft(tmp_path / "a", Mixed(one, other))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("options", [CORES, {}], ids=["cores", "flat"])
def test_the_config_says_whether_convolutions_have_cores(tmp_path, options):
    interop.save_peft(tmp_path, Mixed(options, options))
    assert json.loads((tmp_path / "adapter_config.json").read_text())[
        "use_effective_conv2d"
    ] is bool(options)
    loaded = interop.load_peft(tmp_path, loha_jax.unload(Mixed(options, options)))
    assert hasattr(loaded.a, "kernel_lora_hada_t1") is bool(options)


def test_author_layers_drop_out():
    layer = LoHaLinear(4, 64, r=2, rank_dropout=0.5, init_weights=False, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 4))
    assert (layer(x) != layer(x)).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    set_dropout(layer, nnx.Rngs(3))
    assert (layer(x) != layer(x)).any()
