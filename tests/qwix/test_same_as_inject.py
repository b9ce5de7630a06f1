"""A quantised model with several rules is `loha_jax.inject`'s on the dequantised base."""

import dataclasses

import jax
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix_models import BASES, Attention, LinenModel, randomise, tokens
from random_arrays import normal_array

import loha_jax
from loha_jax import interop
from loha_jax.nnx.variables import values_of
from loha_jax.qwix import LoHaProvider, LoHaRule, linen_tree

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def provider(base):
    """Two adapters of different ranks and alphas; `out` is only quantised."""
    rules = [
        LoHaRule(module_path="query", rank=2, alpha=4.0, **BASES[base]),
        qwix.QuantizationRule(module_path="out", **BASES[base]),
        LoHaRule(module_path=".*", rank=3, alpha=1.5, **BASES[base]),
    ]
    return LoHaProvider(rules)


def layouts(params):
    words = {"query": "ioo", "out": "iio", "layers.dense": "sio"}
    return {name: word for name, word in words.items() if name.split(".")[0] in params}


def injected(params, factors, targets):
    """The float parameters adapted by `loha_jax.inject`, with given factors by path."""
    patterns = {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 4}}
    config = loha_jax.LoHaConfig(r=3, alpha=1.5, target_modules=targets, **patterns)
    tree = loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts(params))
    flat = flat_tree(tree)
    for path, leaf in flat.items():
        if isinstance(leaf, loha_jax.LoHaWeight):
            given = {name: factors[(*path[:-1], f"kernel_lora_{name}")] for name in FACTORS}
            adapter = dataclasses.replace(leaf.adapters["default"], **given)
            flat[path] = dataclasses.replace(leaf, adapters={"default": adapter})
    return unflatten_dict(flat)


def flat_tree(tree):
    return flatten_dict(tree, is_leaf=lambda _, x: not isinstance(x, dict))


def check(run, apply, tree, folder, merged):
    """The outputs of the model, of the injected tree, of its file and of the merged model."""
    x = tokens()
    want = loha_jax.adapt(apply)(tree, x)
    base = unflatten_dict({k: getattr(v, "kernel", v) for k, v in flat_tree(tree).items()})
    loaded = interop.load_peft(folder, base, layouts=layouts(base))
    assert abs(apply(base, x) - want).max() > 0.1 * abs(want).max()
    for got in (run(x), loha_jax.adapt(apply)(loaded, x), merged(x)):
        np.testing.assert_allclose(got, want, atol=3e-6 * float(abs(want).max()))


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_nnx(base, tmp_path):
    """The model, its file, and its merged form."""
    plain = Attention(nnx.Rngs(0))
    model = qwix.apply_lora_to_model(plain, provider(base), tokens(), rngs=nnx.Rngs(1))
    randomise(model)
    interop.save_peft(tmp_path, model)
    for name in ("query", "out", "mlp"):
        quantised = values_of(getattr(model, name).kernel)
        getattr(plain, name).kernel.set_value(qwix.dequantize(quantised.array))
    state = nnx.state(plain)
    factors = flat_tree(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    tree = injected(nnx.to_pure_dict(state), factors, ["query", "mlp"])

    def apply(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(nnx.graphdef(plain), state)(x)

    run = nnx.clone(model)
    check(run, apply, tree, tmp_path, loha_jax.merge(model))


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_linen(base, tmp_path):
    """The same of a Linen model, with a scanned stack."""
    plain, used = LinenModel(), provider(base)
    model = qwix.apply_lora_to_model(plain, used)
    flat = flatten_dict(nn.unbox(model.init(jax.random.key(1), tokens())["params"]))
    for n, (path, value) in enumerate(flat.items()):
        if "_lora_" in path[-1]:
            flat[path] = 0.5 * normal_array(n, value.shape)
    params = unflatten_dict(flat)
    own = linen_tree(used, params)
    interop.save_peft(tmp_path, own)
    float_params = {k: getattr(v, "kernel", v) for k, v in flat_tree(own).items()}
    tree = injected(unflatten_dict(float_params), flat, ["query", "dense"])
    check(
        lambda x: model.apply({"params": params}, x),
        lambda params, x: plain.apply({"params": params}, x),
        tree,
        tmp_path,
        lambda x: plain.apply({"params": loha_jax.merge(own)}, x),
    )
