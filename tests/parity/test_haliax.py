"""haliax models as they are: layouts from axes, names as of its own state dicts, files for PEFT."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from framework_training import check_base_and_products, trained
from leaves import loha_leaves
from safetensors.numpy import load_file

import loha_jax
from loha_jax import LoHaConfig, interop

hax = pytest.importorskip("haliax", reason="haliax is not installed: python run.py test")
hnn = hax.nn

KEY = jax.random.key(0)
IN, MID, HEADS = hax.Axis("in", 32), hax.Axis("mid", 64), (hax.Axis("heads", 2), hax.Axis("hd", 4))


class Block(eqx.Module):
    ln: hnn.RmsNorm
    up: hnn.Linear
    down: hnn.Linear

    @staticmethod
    def init(key):
        up, down = jax.random.split(key)
        return Block(
            hnn.RmsNorm.init(IN, use_bias=False),
            hnn.Linear.init(IN, MID, key=up),
            hnn.Linear.init(MID, IN, key=down, out_first=False),
        )

    def __call__(self, x):
        return x + self.down(hnn.relu(self.up(self.ln(x))))


class Model(eqx.Module):
    embed: hnn.Embedding
    h: hnn.Stacked
    head: hnn.Linear

    @staticmethod
    def init(key):
        a, b, c = jax.random.split(key, 3)
        return Model(
            hnn.Embedding.init(hax.Axis("vocab", 16), IN, key=a),
            hnn.Stacked.init(hax.Axis("layers", 3), Block)(jax.random.split(b, 3)),
            hnn.Linear.init(IN, HEADS, key=c),
        )

    def __call__(self, ids):
        return self.head(self.h.fold(self.embed(ids)))


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = torch.nn.RMSNorm(32, eps=1e-5)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.ln(x))))


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 32)
        self.h = torch.nn.Sequential(*(TorchBlock() for _ in range(3)))
        self.head = torch.nn.Linear(32, 8)

    def forward(self, ids):
        return self.head(self.h(self.embed(ids)))


IDS = hax.named(jnp.arange(12), "pos")
apply = loha_jax.adapt(lambda model, ids: model(ids))


def outputs(model):
    return np.asarray(apply(model, IDS).rearrange(("pos", *HEADS)).array).reshape(12, -1)


def arrays_of(model):
    return [np.array(leaf) for leaf in jax.tree.leaves(model)]


def test_training_and_the_real_peft(tmp_path):
    model = Model.init(KEY)
    before = arrays_of(model)
    config = LoHaConfig(r=2, alpha=8, target_modules=r".*(up|down|head)", init_weights=False)
    adapted = loha_jax.inject(model, config, key=KEY)
    adapted = trained(adapted, lambda model: ((apply(model, IDS) - 1) ** 2).mean().scalar())
    check_base_and_products(
        lambda model, ids: model(ids), adapted, before, IDS, arrays_of=arrays_of
    )
    np.testing.assert_allclose(outputs(loha_jax.merge(adapted)), outputs(adapted), atol=1e-5)

    interop.save_merged(tmp_path / "base", model)
    twin = Twin()
    weights = load_file(tmp_path / "base/model.safetensors")
    twin.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    base = twin(torch.arange(12)).detach().numpy()
    np.testing.assert_allclose(outputs(model), base, atol=1e-5)
    interop.save_peft(tmp_path / "adapter", adapted)
    opened = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    theirs = opened(torch.arange(12)).detach().numpy()
    np.testing.assert_allclose(outputs(adapted), theirs, atol=1e-5)
    assert np.abs(theirs - base).max() > 0.01
    again = interop.load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(outputs(again), theirs, atol=1e-5)
    read = interop.load_base(tmp_path / "base", Model.init(jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, arrays_of(read), before)


def test_names_are_those_of_haliaxs_state_dict():
    model = {"gpt": Model.init(KEY)}
    config = LoHaConfig(r=2, target_modules=r".*(up|down|head|embed)")
    names = {n for leaf in loha_leaves(loha_jax.inject(model, config, key=KEY)) for n in leaf.names}
    theirs = hax.state_dict.to_torch_compatible_state_dict(model)
    assert names == {
        key.removesuffix(".weight") for key in theirs if key.endswith("weight") and "ln" not in key
    }


def test_axes_give_the_layouts():
    square = hax.Axis("a", 4), hax.Axis("b", 4), hax.Axis("experts", 4)
    a, b, experts = square
    width, height = hax.Axis("w", 4), hax.Axis("h", 4)
    tree = {
        "linear": hnn.Linear.init(a, b, key=KEY),
        "io": hnn.Linear.init(a, b, key=KEY, out_first=False),
        "heads": hnn.Linear.init(a, (b, experts), key=KEY),
        "moe": hnn.MoELinear.init(experts, a, b, key=KEY),
        "conv": hnn.Conv.init((width, height), a, b, 4, key=KEY),
        "embed": hnn.Embedding.init(a, b, key=KEY),
        "norm": hnn.LayerNorm.init((a, b)),
    }
    everything = LoHaConfig(r=2, target_modules=r".*", exclude_modules=["norm"])
    leaves = loha_leaves(loha_jax.inject(tree, everything, key=KEY))
    assert {leaf.names[-1]: leaf.layout.word for leaf in leaves} == {
        "linear": "oi",
        "io": "io",
        "heads": "ooi",
        "3.moe": "sio",
        "conv": "oikk",
        "embed": "oi",
    }
    linear = loha_jax.inject(tree, LoHaConfig(r=2, target_modules="all-linear"), key=KEY)
    assert {leaf.names[-1] for leaf in loha_leaves(linear)} == {"linear", "io", "heads", "3.moe"}
    with pytest.raises(ValueError, match=r"cannot be adapted.*norm\.weight"):
        loha_jax.inject(tree, LoHaConfig(r=2, target_modules=["norm"]), key=KEY)


@pytest.mark.parametrize("order", [None, "ia ib oa ob", "ib oa ia ob", "ob oa ib ia"])
def test_several_axes_flatten_as_the_layer_declares_them(order):
    """haliax' own state dict has the truth, whatever the order of the array is."""
    axes = [hax.Axis(name, size) for name, size in (("oa", 2), ("ob", 3), ("ia", 3), ("ib", 4))]
    layer = hnn.Linear.init(axes[2:], axes[:2], key=KEY)
    if order is not None:
        weight = layer.weight.rearrange(tuple(order.split()))
        layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    params = loha_jax.inject({"q": layer}, config, key=KEY)
    merged, base = (
        hax.state_dict.to_torch_compatible_state_dict(m)["q.weight"]
        for m in (loha_jax.merge(params), {"q": layer})
    )
    got = interop.to_peft_state_dict(params)
    f = {key.rsplit(".", 1)[-1]: np.float64(value) for key, value in got.items()}
    update = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]) * (8 / 2)
    want = np.asarray(merged, np.float64) - np.asarray(base, np.float64)
    assert abs(want).max() > 0.1
    np.testing.assert_allclose(update, want, rtol=0, atol=1e-5)


class Mix(eqx.Module):
    weight: hax.NamedArray


def test_an_unknown_layer_is_asked_for_its_layout():
    tree = {"mix": Mix(hax.random.normal(KEY, (IN, MID)))}
    config = LoHaConfig(r=2, target_modules=["mix"])
    with pytest.raises(ValueError, match=r"mix\.weight of shape \(32, 64\).*in, mid.*layouts="):
        loha_jax.inject(tree, config, key=KEY)
    (leaf,) = loha_leaves(loha_jax.inject(tree, config, key=KEY, layouts={"mix": "io"}))
    assert leaf.layout.word == "io"


def test_a_scaled_weight_needs_the_scale_for_its_file(tmp_path):
    """With muP a layer multiplies its weight, and haliax' own files hold the product."""
    reparam = hnn.Linear.output_reparam(use_mup=True)
    tree = {"head": hnn.Linear.init(IN, HEADS, key=KEY, use_bias=False, reparam_cls=reparam)}
    config = LoHaConfig(r=2, target_modules=["head"], init_weights=False)
    with pytest.raises(ValueError, match=r"head\.weight multiplies it by 0\.03125.*RowTransform"):
        loha_jax.inject(tree, config, key=KEY)
    names = interop.NameMap(rows={"head": interop.RowTransform(scale=1 / 32)})
    adapted = loha_jax.inject(tree, config, key=KEY, names=names)
    interop.save_merged(tmp_path / "out", adapted, names=names)
    merged = load_file(tmp_path / "out/model.safetensors")["head.weight"]
    x = hax.random.normal(KEY, IN)
    ours = loha_jax.adapt(lambda tree, x: tree["head"](x))(adapted, x).array.reshape(-1)
    np.testing.assert_allclose(ours, merged @ np.asarray(x.array), atol=1e-5)
