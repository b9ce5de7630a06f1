"""The refusals of `loha_jax.qwix`, and what its errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from qwix_models import (
    BASES,
    Attention,
    LinenModel,
    Stack,
    adapted,
    arrays,
    quantised,
    randomise,
    tokens,
)

import loha_jax
from loha_jax import interop
from loha_jax.qwix import LoHaProvider, LoHaRule, linen_params, linen_tree

CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["mlp"])


INJECT = {
    "nnx": lambda model, name, targets: loha_jax.nnx.inject(
        model,
        loha_jax.LoHaConfig(r=2, target_modules=targets),
        rngs=nnx.Rngs(0),
        adapter_name=name,
    ),
    "tree": lambda model, name, targets: loha_jax.inject(
        model,
        loha_jax.LoHaConfig(r=2, target_modules=targets),
        key=jax.random.key(0),
        adapter_name=name,
    ),
}
"""Both functions that adapt a model in place."""


class Blocks(nnx.Module):
    """Layers whose paths have slashes."""

    def __init__(self):
        self.blocks = nnx.List([Attention(nnx.Rngs(0)) for _ in range(2)])

    def __call__(self, x):
        return self.blocks[1].query(self.blocks[0].out(self.blocks[0].query(x)))


def applied(model, **fields):
    provider = LoHaProvider(**{"rank": 2, "alpha": 4.0, **fields})
    return qwix.apply_lora_to_model(model, provider, tokens(), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("inject", INJECT.values(), ids=INJECT)
@pytest.mark.parametrize("base", ["float", "int8"])
def test_inject_into_a_provider_s_model(base, inject):
    """One more adapter, on the kernels that the provider has adapted and on float ones."""
    x = tokens()
    model = applied(Attention(nnx.Rngs(0)), module_path="mlp|query", **BASES[base])
    randomise(model)
    first = model(x)
    with pytest.raises(ValueError, match=r"^Adapter with name 'default' already exists"):
        inject(model, "default", ["mlp"])
    inject(model, "other", ["mlp", "out"])
    assert loha_jax.adapter_names(model) == ("default", "other")
    loha_jax.set_adapter(model, "default")
    assert (model(x) == first).all()
    loha_jax.set_adapter(model, ("default", "other"))
    randomise(model)
    both = model(x)
    merged = loha_jax.merge(nnx.clone(model))
    np.testing.assert_allclose(both, merged(x), atol=1e-4)
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda lora: nnx.merge(graph, lora, rest)(x).sum())(lora)
    assert all((abs(g) > 0).any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("inject", INJECT.values(), ids=INJECT)
def test_inject_into_kernels_that_only_qwix_computes_with(inject):
    """Nothing would add the update of a quantised kernel that no rule adapts."""
    rules = [
        LoHaRule(module_path="mlp", rank=2, alpha=4.0, weight_qtype="int8"),
        qwix.QuantizationRule(module_path="out", weight_qtype="int8"),
    ]
    x = tokens()
    models = [
        qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), LoHaProvider(rules), x, rngs=nnx.Rngs(1)),
        quantised(Attention(nnx.Rngs(0)), x, **BASES["int8"]),
    ]
    for model in models:
        before = arrays(model, nnx.Param)
        with pytest.raises(ValueError, match=r"out\.kernel is quantised.*LoHaProvider.*dequantise"):
            inject(model, "other", ["out"])
        after = arrays(model, nnx.Param)
        assert before.keys() == after.keys()
        inject(loha_jax.dequantise(model), "other", ["out"])
        assert (abs(model(x)) > 0).any()


def injected():
    return loha_jax.nnx.inject(Attention(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(0))


APPLIED = {
    "on inject's model": (injected, {}, r"adapters of loha_jax\.nnx.*unload"),
    "twice": (
        lambda: adapted(Attention(nnx.Rngs(0)), tokens()),
        {},
        "already has the adapters of a LoHaProvider",
    ),
    "twice, on other kernels": (
        lambda: applied(Attention(nnx.Rngs(0)), module_path="query", **BASES["int8"]),
        {"module_path": "mlp"},
        "already has the adapters of a LoHaProvider",
    ),
    "part of a path": (Blocks, {"module_path": "query"}, r"blocks/0/query'.*whole path"),
    "other spelling": (Blocks, {"module_path": "blocks/2/quary"}, "blocks/0/query"),
}
"""A model, the fields of a provider applied to it, and what the error says."""


@pytest.mark.parametrize(("model", "fields", "message"), APPLIED.values(), ids=APPLIED)
def test_apply(model, fields, message):
    """Nothing is adapted silently in another way, or not at all."""
    model = model()
    with pytest.raises(ValueError, match=message):
        applied(model, **{"module_path": ".*", **fields})


def test_a_rule_for_lora():
    """`qwix.LoraRule` says nothing of LoHa."""
    with pytest.raises(ValueError, match="LoHaRule"):
        LoHaProvider([qwix.LoraRule(rank=2, alpha=4.0)])


def test_linen_parameters_without_factors():
    """A tree of base parameters is no adapter."""
    params = nn.unbox(LinenModel().init(jax.random.key(0), tokens())["params"])
    with pytest.raises(ValueError, match="no factors"):
        linen_tree(LoHaProvider(rank=2, alpha=4.0), params)


@pytest.mark.parametrize("base", ["float", "int8"])
def test_abba_needs_the_weights_which_come_after_a_linen_model_s_init(base):
    """`init` makes other kernels; `inject` on the parameters with the weights finds the vectors."""
    model, x = LinenModel(), tokens()

    def made(init_weights):
        rule = {"module_path": "query", "rank": 2, "alpha": 4.0, "init_weights": init_weights}
        provider = LoHaProvider(**rule, **BASES[base])
        return provider, qwix.apply_lora_to_model(model, provider)

    with pytest.raises(ValueError, match=r"query: init_weights='abba' .*linen_params"):
        made("abba")[1].init(jax.random.key(1), x)
    provider, new = made("calibrated")
    params = nn.unbox(new.init(jax.random.key(1), x)["params"])
    weights = nn.unbox(model.init(jax.random.key(2), x)["params"])
    quantised = qwix.quantize_params(weights, params)
    params = {**quantised, "query": {**params["query"], **quantised["query"]}}
    config = loha_jax.LoHaConfig(r=2, alpha=4, target_modules=["query"], init_weights="abba")
    tree = loha_jax.inject(
        linen_tree(provider, params), config, key=jax.random.key(3), adapter_name="abba"
    )
    before = new.apply({"params": params}, x)
    params = linen_params(provider, params, tree)
    np.testing.assert_array_equal(new.apply({"params": params}, x), before)
    got = params["query"]["kernel_lora_hada_w1_a"] @ params["query"]["kernel_lora_hada_w1_b"]
    u, s, vt = np.linalg.svd(np.asarray(weights["query"]["kernel"]).reshape(16, 16).T)
    want = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(got, want / np.sqrt(np.mean(want**2)), atol=0.05)


@pytest.mark.parametrize("base", ["float", "int8", "nf4"])
def test_a_file_onto_a_provider_s_model(base, tmp_path):
    """It keeps its own rank and alpha under a new name; `nnx.update` copies neither."""
    x = tokens()
    saved = adapted(Attention(nnx.Rngs(0)), x, rank=3, alpha=1.5, **BASES[base])
    interop.save_peft(tmp_path, saved)
    model = adapted(Attention(nnx.Rngs(0)), x, **BASES[base])
    first = model(x)
    with pytest.raises(ValueError, match=r"^Adapter with name 'default' already exists.*another"):
        interop.load_peft(tmp_path, model)
    interop.load_peft(tmp_path, model, adapter_name="other")
    assert (model(x) == saved(x)).all()
    loha_jax.set_adapter(model, "default")
    assert (model(x) == first).all()
    loha_jax.set_adapter(model, "other")
    loha_jax.delete_adapter(model, "default")
    assert (model(x) == saved(x)).all()
    other = adapted(Attention(nnx.Rngs(0)), x, **BASES[base])
    nnx.update(other, nnx.state(saved, nnx.LoRAParam))
    with pytest.raises(ValueError, match=r"have rank 3, but its settings say 2.*load_peft"):
        other(x)


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # qwix' own
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ["layers.1.dense", "out"]}, "target_modules=.* match no module"),
        ({"exclude_modules": ["layers.1.dense"]}, "no modules were excluded"),
        ({"rank_pattern": {"layers.1.dense": 3}}, "rank_pattern keys did not match"),
    ],
)
def test_parts_of_a_config_that_match_nothing(fields, text):
    """Single layers of a scan have no names while a Linen model runs: a warning says so."""
    config = loha_jax.LoHaConfig(r=2, **{"target_modules": ["dense", "out"], **fields})
    model = qwix.apply_lora_to_model(LinenModel(0), LoHaProvider(config=config))
    with pytest.warns(match=text):
        jax.eval_shape(model.init, jax.random.key(0), tokens())


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["0.layers"]}, {"target_modules": ["layers"], "layers_to_transform": [0]}],
)
def test_single_layers_of_a_scan(fields):
    """The layers have no numbers while a scan runs: the error says what to do."""
    config = loha_jax.LoHaConfig(r=2, **fields)
    with pytest.raises(ValueError, match=r"all layers of a scan.*before they have numbers"):
        qwix.apply_lora_to_model(
            Stack(3, 16, nnx.Rngs(0)),
            LoHaProvider(config=config),
            jnp.ones((4, 16)),
            rngs=nnx.Rngs(1),
        )
