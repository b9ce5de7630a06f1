import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError
from linen_reference import (
    KEY,
    plain_params,
)

import loha_jax
from loha_jax import linen
from loha_jax.linen import LoHaDense, LoHaEinsum, LoHaEmbed


class Two(nn.Module):
    first: Any = dataclasses.field(default_factory=dict)
    second: Any = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        return LoHaDense(4, name="b", **self.second)(LoHaDense(4, name="a", **self.first)(x))


X = jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "LoHaDense at a: `r` should be a positive integer"),
        ({"alpha": float("nan")}, "LoHaDense at a: `alpha` should be a finite number"),
        ({"rank_dropout": 1.0}, "LoHaDense at a: `rank_dropout`"),
        ({"init_weights": "zeros"}, "LoHaDense at a: `init_weights`"),
        ({"init_weights": "abba"}, "LoHaDense at a: init_weights='abba' starts from the singular"),
        ({"strategy": "best"}, "The strategy is one of"),
    ],
)
def test_bad_fields_are_named_with_the_layer(fields, message):
    with pytest.raises(ValueError, match=message):
        Two(first=fields).init(KEY, X)


@pytest.mark.parametrize(
    ("shape", "string", "message"),
    [
        ((4,), "bi,i->bi", "is no product that LoHa can adapt"),
        ((4, 3), "bi,ik->bi", "is no product that LoHa can adapt"),
        ((4, 4), "bi,ii->bi", "is no product that LoHa can adapt"),
    ],
)
def test_einsums_without_in_or_out_axes(shape, string, message):
    with pytest.raises(ValueError, match=message):
        LoHaEinsum(shape, string, use_bias=False, kernel_init=nn.initializers.ones).init(KEY, X)


def test_an_einsum_string_of_the_call_needs_a_layout():
    x = jax.random.normal(KEY, (2, 4))
    with pytest.raises(
        ValueError, match="LoHaEinsum at the root: the einsum string comes with the call"
    ):
        LoHaEinsum((4, 5)).init(KEY, x, "bi,io->bo")
    with pytest.raises(ValueError, match="layout='sio' is for 3 axes, the kernel has"):
        LoHaEinsum((4, 5), layout="sio").init(KEY, x, "bi,io->bo")
    layer = LoHaEinsum((4, 4), layout="io", r=2, init_weights=False, use_bias=False)
    params = layer.init(KEY, x, "bi,io->bo")
    weight = plain_params(params["params"])["kernel"]
    np.testing.assert_allclose(
        layer.apply(params, x, "bi,io->bo"), x @ weight, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        layer.apply(params, x, "bo,io->bi"), x @ weight.T, rtol=1e-5, atol=1e-5
    )


def test_flax_still_checks_its_parameters():
    params = LoHaDense(4, r=2).init(KEY, X)["params"]
    with pytest.raises(ScopeParamShapeError, match="hada_w1_a"):
        LoHaDense(4, r=3).apply({"params": params}, X)
    with pytest.raises(ScopeParamNotFoundError, match='"hada_w2_b"'):
        LoHaDense(4, r=2).apply(
            {"params": {k: v for k, v in params.items() if k != "hada_w2_b"}}, X
        )
    with pytest.raises(ScopeParamShapeError, match='"kernel"'):
        LoHaDense(4, r=2).apply({"params": params}, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="integer"):
        LoHaEmbed(4, 4).init(KEY, X)


def test_a_mask_of_a_model_without_factors_is_an_error():
    with pytest.raises(ValueError, match="hold no leaf called hada"):
        linen.trainable_mask(nn.Dense(4).init(KEY, X))


def test_params_that_do_not_fit_the_model_are_all_named():
    params = Two().init(KEY, X)["params"]
    broken = {
        "a": {**params["a"], "hada_w1_a": jnp.ones((4, 3))},
        "b": dict(params["b"]),
        "c": params["a"],
    }
    del broken["b"]["hada_w2_b"]
    with pytest.raises(ValueError, match="nothing was converted") as error:
        linen.to_adapted(broken, Two().init, KEY, X)
    for part in (
        "a/hada_w1_a has shape (4, 3), in the model (4, 8)",
        "b/hada_w2_b is missing",
        "c/hada_w1_a: the model has no LoHa layer there",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"has no layer of loha_jax.linen"):
        linen.to_adapted(params, nn.Dense(4).init, KEY, X)
    with pytest.raises(ValueError, match="is not the init of a Linen model"):
        linen.to_adapted(params, lambda x: x, X)


@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout", "init_weights"])
def test_layers_that_differ_in_what_a_config_holds_once(field):
    value = False if field == "init_weights" else 0.5
    model = Two(first={"deterministic": True}, second={field: value, "deterministic": True})
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match=f"The layers differ in {field}, .* a: .*, b: {value}"):
        linen.to_adapted(params, model.init, KEY, X)


def test_two_layers_of_one_name():
    model = Two()
    with pytest.raises(ValueError, match="Two layers have the module name 'q'"):
        linen.to_adapted(model.init(KEY, X), model.init, KEY, X, names=lambda name: "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: loha_jax.set_adapter(a, ()), "has the active adapters"),
        (lambda a: loha_jax.scale(a, {"default": 0.5}), "loha_jax.scale"),
        (lambda a: loha_jax.partition(a)[0], "a/kernel comes from one half of `partition`"),
        (lambda a: loha_jax.partition(a)[1], "b/kernel comes from one half of `partition`"),
        (loha_jax.merge, "a/kernel is a ArrayImpl"),
        (lambda a: {**a, "c": a["a"]}, "c/kernel is adapted, the model has no LoHa layer there"),
        (lambda a: linen.to_adapted(*other(r=2)), r"r=\[2\] \(the layer: \[8\]\)"),
        (lambda a: linen.to_adapted(*other(alpha=2)), r"alpha=\[2\] \(the layer: \[8\]\)"),
        (
            lambda a: loha_jax.inject(
                loha_jax.unload(a),
                loha_jax.LoHaConfig(target_modules=["a", "b"]),
                key=KEY,
                layouts={"a": "oi"},
            ),
            r"layout=oi \(the layer: io\)",
        ),
    ],
    ids=[
        "none_active",
        "scaled",
        "trainable_half",
        "frozen_half",
        "merged",
        "elsewhere",
        "rank",
        "alpha",
        "layout",
    ],
)
def test_trees_that_do_not_fit_the_model(change, message):
    adapted = linen.to_adapted(Two().init(KEY, X)["params"], Two().init, KEY, X)
    with pytest.raises(ValueError, match=message):
        linen.from_adapted(change(adapted), Two().init, KEY, X)


def other(**fields):
    model = Two(first=fields, second=fields)
    return model.init(KEY, X)["params"], model.init, KEY, X


def test_a_saved_module_comes_back_as_its_trained_copy():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(LoHaDense(4, name="a")(x))

    params = Net().init(KEY, X)["params"]
    base = loha_jax.unload(linen.to_adapted(params, Net().init, KEY, X))
    config = loha_jax.LoHaConfig(target_modules=["a"], modules_to_save=["head"])
    adapted = loha_jax.inject(base, config, key=KEY)
    back = linen.from_adapted(adapted, Net().init, KEY, X)
    np.testing.assert_array_equal(back["head"]["kernel"], params["head"]["kernel"])
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
