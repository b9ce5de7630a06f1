"""penzai models, frozen: names from labels, layouts from axes, files that PEFT opens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from framework_training import check_base_and_products, trained
from leaves import loha_leaves

import loha_jax
from loha_jax import LoHaConfig, interop

pytest.importorskip("penzai", reason="penzai is not installed: python run.py test")
from penzai import pz

KEY = jax.random.key(0)


def block(init_base_rng, name):
    up = pz.nn.Affine.from_config(f"{name}/up", init_base_rng, {"f": 32}, {"m": 64})
    down = pz.nn.Linear.from_config(f"{name}/down", init_base_rng, {"m": 64}, {"f": 32})
    norm = pz.nn.RMSLayerNorm.from_config(f"{name}/norm", init_base_rng, across_axes={"f": 32})
    relu = pz.nn.Elementwise(jax.nn.relu)
    return pz.nn.Residual(pz.nn.Sequential([norm, up, relu, down]))


def make_model(seed=0):
    key = jax.random.key(seed)
    table = pz.nn.EmbeddingTable.from_config("embed", key, 16, {"f": 32})
    layers = [
        pz.nn.EmbeddingLookup(table),
        pz.nn.LayerStack.from_sublayer_builder(block, "layer", 3, key, {"name": "layers/b"}),
        pz.nn.Linear.from_config("head", key, {"f": 32}, {"h": 2, "hd": 4}),
    ]
    return pz.nn.Sequential(layers)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.ModuleDict({"scale": torch.nn.RMSNorm(32, eps=1e-6)})
        self.up = torch.nn.ModuleDict({"Linear": torch.nn.Linear(32, 64)})
        self.down = torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up["Linear"](self.norm["scale"](x))))


class Twin(torch.nn.Module):
    """Its modules have the names of the labels: `layers/b/up/Linear.weights`."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 32)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"b": TorchBlock()}) for _ in range(3)
        )
        self.head = torch.nn.Linear(32, 8, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer["b"](x)
        return self.head(x)


IDS = pz.nx.wrap(jnp.arange(12)).tag("pos")
apply = loha_jax.adapt(lambda model, ids: model(ids))


def outputs(model):
    return np.asarray(apply(model, IDS).unwrap("pos", "h", "hd")).reshape(12, -1)


def arrays_of(model):
    return [np.array(leaf) for leaf in jax.tree.leaves(model)]


def twin_of(model):
    """Torch's model with penzai's weights, moved by hand."""
    values = {v.label: v.value for v in pz.unbind_params(model, freeze=True)[1]}
    twin = Twin()

    def fill(tensor, label, *axes, index=None):
        array = np.asarray(values[label].unwrap(*axes))
        tensor.data = torch.tensor((array if index is None else array[index]).copy())

    fill(twin.embed.weight, "embed.embeddings", "vocabulary", "f")
    head = np.asarray(values["head.weights"].unwrap("h", "hd", "f")).reshape(8, 32)
    twin.head.weight.data = torch.tensor(head)
    for n, layer in enumerate(twin.layers):
        own = layer["b"]
        fill(own.norm["scale"].weight, "layers/b/norm/scale.weights", "layer", "f", index=n)
        up = own.up["Linear"]
        fill(up.weight, "layers/b/up/Linear.weights", "layer", "m", "f", index=n)
        fill(up.bias, "layers/b/up/AddBias.bias", "layer", "m", index=n)
        fill(own.down.weight, "layers/b/down.weights", "layer", "f", "m", index=n)
    return twin.eval()


def test_training_and_the_real_peft(tmp_path):
    bound = make_model()
    model = pz.freeze_params(bound)
    before = arrays_of(model)
    config = LoHaConfig(r=2, alpha=8, target_modules=r".*(Linear|down|head)", init_weights=False)
    adapted = loha_jax.inject(model, config, key=KEY)
    adapted = trained(
        adapted, lambda m: jnp.mean((apply(m, IDS).unwrap("pos", "h", "hd") - 1) ** 2)
    )
    check_base_and_products(
        lambda model, ids: model(ids), adapted, before, IDS, arrays_of=arrays_of
    )
    np.testing.assert_allclose(outputs(loha_jax.merge(adapted)), outputs(adapted), atol=1e-5)

    twin = twin_of(bound)
    base = twin(torch.arange(12)).detach().numpy()
    np.testing.assert_allclose(outputs(model), base, atol=1e-5)
    interop.save_peft(tmp_path / "adapter", adapted)
    opened = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    theirs = opened(torch.arange(12)).detach().numpy()
    np.testing.assert_allclose(outputs(adapted), theirs, atol=1e-5)
    assert np.abs(theirs - base).max() > 0.01
    again = interop.load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(outputs(again), theirs, atol=1e-5)


@pytest.mark.parametrize("order", [("g", "h", "f", "e"), ("h", "e", "g", "f")])
def test_several_axes_flatten_as_the_layer_declares_them(order):
    layer = pz.nn.Linear.from_config("q", KEY, {"f": 2, "e": 3}, {"g": 4, "h": 2})
    frozen = pz.freeze_params(layer)
    weights = dataclasses.replace(frozen.weights, value=frozen.weights.value.order_as(*order))
    frozen = dataclasses.replace(frozen, weights=weights)
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    params = loha_jax.inject(frozen, config, key=KEY)
    merged, base = (
        np.float64(m.weights.value.unwrap("g", "h", "f", "e")).reshape(8, 6)
        for m in (loha_jax.merge(params), frozen)
    )
    got = interop.to_peft_state_dict(params)
    f = {key.rsplit(".", 1)[-1]: np.float64(value) for key, value in got.items()}
    update = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]) * (8 / 2)
    assert abs(merged - base).max() > 0.1
    np.testing.assert_allclose(update, merged - base, rtol=0, atol=1e-5)


def test_labels_and_axes_give_names_and_layouts():
    model = pz.freeze_params(make_model())
    config = LoHaConfig(r=2, target_modules=r".*(Linear|down|head|embed)")
    leaves = loha_leaves(loha_jax.inject(model, config, key=KEY))
    assert {leaf.names[-1]: leaf.layout.word for leaf in leaves} == {
        "embed": "oi",
        "layers.2.b.up.Linear": "sio",
        "layers.2.b.down": "sio",
        "head": "ioo",
    }
    linear = loha_jax.inject(model, LoHaConfig(r=2, target_modules="all-linear"), key=KEY)
    assert {leaf.names[-1] for leaf in loha_leaves(linear)} == {
        "layers.2.b.up.Linear",
        "layers.2.b.down",
        "head",
    }
    with pytest.raises(ValueError, match=r"cannot be adapted.*layers\.b\.norm\.scale\.weight"):
        loha_jax.inject(model, LoHaConfig(r=2, target_modules=r".*norm\.scale"), key=KEY)


def test_a_merged_model_has_its_parameters_bound_again():
    model = make_model()
    config = LoHaConfig(r=2, target_modules=["head"], init_weights=False)
    adapted = loha_jax.inject(pz.freeze_params(model), config, key=KEY)
    slots, _ = pz.unbind_params(model)
    merged = loha_jax.merge(adapted)
    values = pz.select(merged).at_instances_of(pz.ParameterValue).get_sequence()
    bound = pz.bind_variables(slots, [value.unfreeze_as_copy() for value in values])
    theirs = np.asarray(bound(IDS).unwrap("pos", "h", "hd")).reshape(12, -1)
    np.testing.assert_allclose(theirs, outputs(adapted), atol=1e-5)


def test_what_is_no_tree_is_refused():
    model = make_model()
    config = LoHaConfig(r=2, target_modules=["head"])
    with pytest.raises(TypeError, match=r"penzai parameters \(in a Sequential\).*freeze_params"):
        loha_jax.inject(model, config, key=KEY)
    slots, values = pz.unbind_params(model, freeze=True)
    with pytest.raises(TypeError, match=r"unbound penzai model.*freeze_params"):
        loha_jax.inject(slots, config, key=KEY)
    with pytest.raises(ValueError, match=r"head\.weight.*axes f, h, hd.*no known layer.*layouts="):
        loha_jax.inject(values, config, key=KEY)
    adapted = loha_jax.inject(values, config, key=KEY, layouts={"head": "ioo"})
    assert [leaf.names for leaf in loha_leaves(adapted)] == [("head",)]
