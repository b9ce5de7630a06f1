import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from linen_reference import (
    IDS,
    KEY,
    Block,
    Scanned,
    Tied,
)

import loha_jax
from loha_jax import interop, linen
from loha_jax.linen import LoHaDense, LoHaDenseGeneral


class PlainTied(nn.Module):
    """The same model of Flax's own layers."""

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.query = nn.DenseGeneral((2, 4))
        self.out = nn.Einsum((2, 4, 8), "btnh,nhd->btd")
        self.conv = nn.Conv(8, (3,))
        self.norm = nn.LayerNorm()

    __call__ = Tied.__call__


@pytest.mark.parametrize("whole", [True, False], ids=["variables", "params"])
def test_an_adapted_tree_serves_the_plain_model_and_comes_back(whole):
    variables = Tied().init(KEY, IDS)
    given = variables if whole else variables["params"]
    adapted = linen.to_adapted(given, Tied().init, KEY, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    tree = adapted if whole else {"params": adapted}
    want = Tied().apply(variables, IDS)
    np.testing.assert_allclose(
        PlainTied().apply(loha_jax.merge(tree), IDS), want, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        loha_jax.adapt(PlainTied().apply)(tree, IDS), want, rtol=1e-4, atol=1e-4
    )
    assert set(loha_jax.infer_layouts(PlainTied().apply, tree, IDS).items()) == {
        ("conv", "kio"),
        ("embed", "oi"),
        ("out", "iio"),
        ("query", "ioo"),
    }
    config = tree["params"]["out"]["kernel"].adapters["default"].config
    assert (config.r, config.alpha) == (2, 8)
    assert (config.rank_pattern, config.alpha_pattern) == ({"^out": 3}, {"^out": 4})
    back = linen.from_adapted(adapted, Tied().init, KEY, IDS)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, back, given)


@pytest.mark.parametrize("block", [Block, nn.jit(Block)], ids=["plain", "jit"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stacked_layers_come_and_go_whatever_the_axis(axis, block):
    model, x = (
        Scanned(axis, block),
        jnp.ones((2, 4)),
    )  # 4 layers of width 4: shapes alone say nothing
    jax.jit(model.init)(KEY, x)  # its trace must not be taken for the description
    params = model.init(KEY, x)["params"]
    adapted = linen.to_adapted(params, jax.jit(model.init), KEY, x)
    leaf = adapted["layers"]["q"]["kernel"]
    assert leaf.layout.word == {0: "sio", 1: "iso", -1: "ios"}[axis]
    assert leaf.names == tuple(f"layers.{n}.q" for n in range(4))
    twin = Scanned(axis, Block, {"dense": nn.Dense, "fields": {}})
    want = model.apply({"params": params}, x)
    np.testing.assert_allclose(
        twin.apply({"params": loha_jax.merge(adapted)}, x), want, rtol=1e-5, atol=1e-5
    )
    back = linen.from_adapted(adapted, model.init, KEY, x)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_transforms_inside_of_transforms_and_stacks_of_their_own():
    """A stack axis of the layer (2), one of a vmap (3) and one of a scan (6).

    The vmap's is between in (4) and out (5) axes, the scan's is the first.
    """
    fields = {"features": 5, "batch_dims": (0,), "r": 2, "init_weights": False}

    class Body(nn.Module):
        general: Any = LoHaDenseGeneral

        @nn.compact
        def __call__(self, x, _):
            several = nn.vmap(
                self.general,
                variable_axes={"params": 2},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            own = {f.name for f in dataclasses.fields(self.general)}
            y = several(**{k: v for k, v in fields.items() if k in own}, name="q")(x)
            return x + nn.tanh(y).sum((0, 3))[..., None], None

    def model(general):
        return nn.scan(Body, variable_axes={"params": 1}, split_rngs={"params": True}, length=6)(
            general
        )

    x = jax.random.normal(KEY, (2, 7, 4))
    adapting = model(LoHaDenseGeneral)
    params = adapting.init(KEY, x, None)["params"]
    assert params["q"]["kernel"].shape == (2, 6, 4, 3, 5)
    assert params["q"]["hada_w1_a"].shape == (2, 6, 5, 3, 2)
    adapted = linen.to_adapted(params, adapting.init, KEY, x, None)
    leaf = adapted["q"]["kernel"]
    assert leaf.layout.word == "ssiso"
    assert len(set(leaf.names)) == 2 * 3 * 6
    want = adapting.apply({"params": params}, x, None)[0]
    got = model(nn.DenseGeneral).apply({"params": loha_jax.merge(adapted)}, x, None)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    back = linen.from_adapted(adapted, adapting.init, KEY, x, None)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_fedpara_layer_becomes_the_plain_kernel():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LoHaDense(3, r=2, init_weights=False, name="b")(
                LoHaDense(5, r=2, fedpara=True, name="a")(x)
            )

    x = jax.random.normal(KEY, (2, 4))
    params = Net().init(KEY, x)["params"]
    adapted = linen.to_adapted(params, Net().init, KEY, x)
    assert sorted(adapted["a"]) == ["bias", "kernel"]
    assert loha_jax.adapter_names(adapted) == ("default",)
    plain = nn.Sequential([nn.Dense(5), nn.Dense(3)])
    merged = loha_jax.merge(adapted)
    got = plain.apply({"params": {"layers_0": merged["a"], "layers_1": merged["b"]}}, x)
    np.testing.assert_allclose(got, Net().apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a/kernel is the weight of a FedPara layer"):
        linen.from_adapted(adapted, Net().init, KEY, x)


def test_pretrained_parameters_go_under_the_factors():
    """Pretrained parameters of the plain model go under the factors."""
    pretrained = PlainTied().init(jax.random.key(8), IDS)
    params = unflatten_dict({**flatten_dict(Tied().init(KEY, IDS)), **flatten_dict(pretrained)})
    adapted = linen.to_adapted(params, Tied().init, KEY, IDS)
    jax.tree.map(np.testing.assert_array_equal, loha_jax.unload(adapted), pretrained)


def test_files_of_layers_have_torchs_rows():
    """`names` says so; a transform for no module is an error."""
    variables = Tied().init(KEY, IDS)
    rows = interop.RowTransform([1, 0, 3, 2], scale=2)
    names = interop.NameMap(rows={"query": rows})
    tree = linen.to_adapted(variables, Tied().init, KEY, IDS, names=names)
    plain = linen.to_adapted(variables, Tied().init, KEY, IDS)
    got, own = map(interop.to_peft_state_dict, (tree, plain))
    array = own["base_model.model.query.hada_w1_a"]
    want = 2 * array[[1, 0, 3, 2, 5, 4, 7, 6]]
    np.testing.assert_array_equal(got["base_model.model.query.hada_w1_a"], want)
    names = interop.NameMap(rows={"quary": rows})
    with pytest.raises(ValueError, match="'quary', which match no module"):
        linen.to_adapted(variables, Tied().init, KEY, IDS, names=names)
