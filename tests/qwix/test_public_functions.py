"""The library's functions of a tree, given models of qwix, their states and their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from qwix_models import BASES, Attention, LinenModel, arrays, quantised, randomise, tokens
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import checkpoint, interop
from loha_jax.nnx.siblings import values_of
from loha_jax.qwix import LoHaProvider, LoHaRule, linen_tree

KEY = jax.random.key(0)
CONFIG = loha_jax.LoHaConfig(r=2, target_modules=["mlp"])
LAYERS = {"query": "ioo", "out": "iio", "mlp": "io"}
X = tokens()


def mixed(base, *, trained=True, rank=2):
    """A kernel that is quantised and adapted, one only quantised, and a float one adapted."""
    rules = [
        LoHaRule(module_path="query", rank=rank, alpha=4.0, **BASES[base]),
        qwix.QuantizationRule(module_path="out", **BASES[base]),
        LoHaRule(module_path="mlp", rank=3, alpha=1.5),
    ]
    model = Attention(nnx.Rngs(0))
    model = qwix.apply_lora_to_model(model, LoHaProvider(rules), X, rngs=nnx.Rngs(1))
    if trained:
        randomise(model)
    return model


def plain(model):
    """The base of a mixed model as a float one, made by qwix alone."""
    base = Attention(nnx.Rngs(0))
    for name in ("query", "out"):
        kernel = qwix.dequantize(values_of(getattr(model, name).kernel).array)
        getattr(base, name).kernel.set_value(kernel)
    return base


def updates(model):
    """ΔW of each adapted kernel, in torch's form, by the formula."""
    result = {}
    for name, scaling in (("query", 2.0), ("mlp", 0.5)):
        factors = [
            np.asarray(getattr(getattr(model, name), f"kernel_lora_hada_{n}").get_value())
            for n in ("w1_a", "w1_b", "w2_a", "w2_b")
        ]
        result[name] = scaling * (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    return result


def merged_by_hand(model):
    base = plain(model)
    for name, delta in updates(model).items():
        kernel = getattr(base, name).kernel
        value = kernel.get_value()
        kernel.set_value(value + loha_jax.Layout(LAYERS[name]).fold(delta, value.shape))
    return base


@pytest.fixture(params=["int8", "nf4"])
def base(request):
    return request.param


def test_merge_and_dequantise(base):
    """A float model of the original class, which computes what the formula says."""
    model = mixed(base)
    want = merged_by_hand(model)
    np.testing.assert_allclose(model(X), want(X), atol=1e-4)
    adapted = loha_jax.dequantise(nnx.clone(model))
    assert isinstance(adapted, Attention)
    assert adapted.out.kernel.get_value().dtype == jnp.float32
    np.testing.assert_allclose(adapted(X), want(X), atol=1e-4)
    assert loha_jax.adapter_names(adapted) == ("default",)
    merged = loha_jax.merge(nnx.clone(model))
    assert type(merged) is Attention
    assert nnx.graphdef(merged) is not None
    assert not nnx.state(merged, nnx.LoRAParam)
    for name in LAYERS:
        kernel = getattr(want, name).kernel.get_value()
        np.testing.assert_allclose(getattr(merged, name).kernel.get_value(), kernel, atol=1e-5)
    np.testing.assert_allclose(merged(X), want(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Quantising the merged weights again")
def test_merge_requantised(base):
    """qwix runs the model; kernels without an adapter keep their bits."""
    model = mixed(base)
    want, bits = merged_by_hand(model), np.asarray(model.out.kernel.array.qvalue.get_value())
    losses = loha_jax.requantising_losses(model)
    assert losses.keys() == {"query"}
    merged = loha_jax.merge(model, requantise=True)
    assert np.array_equal(merged.out.kernel.array.qvalue.get_value(), bits)
    stored = qwix.dequantize(values_of(merged.query.kernel).array)
    kernel = want.query.kernel.get_value()
    lost = float(jnp.linalg.norm(stored - kernel)) / np.linalg.norm(updates(mixed(base))["query"])
    assert losses["query"] == pytest.approx(lost, rel=1e-3)
    want.query.kernel.set_value(stored)
    np.testing.assert_allclose(merged(X), want(X), atol=1e-4)


def test_one_of_two_adapters_merged(base):
    """The other one goes on adapting the model, float or quantised again."""
    model = mixed(base)
    config = loha_jax.LoHaConfig(r=2, target_modules=["query"], init_weights=False)
    loha_jax.inject(model, config, key=KEY, adapter_name="other")
    loha_jax.set_adapter(model, ["default", "other"])
    want = model(X)
    half = loha_jax.merge(nnx.clone(model), ["default"], unload=False)
    assert loha_jax.adapter_names(half) == ("other",)
    np.testing.assert_allclose(half(X), want, atol=1e-4)


def test_summary_and_explain(base):
    """As of the same adapters that `inject` puts on the float base."""
    model = mixed(base)
    quantised_summary = loha_jax.summary(model)
    assert {row.module: row.kind for row in quantised_summary.rows} == {
        "query": f"loha ({base})",
        "mlp": "loha",
    }
    explained = loha_jax.explain(lambda m, x: m(x), model, X)
    float_model = loha_jax.dequantise(model)
    assert quantised_summary.totals == loha_jax.summary(float_model).totals
    wanted = loha_jax.explain(lambda m, x: m(x), float_model, X)
    assert explained.uses == wanted.uses
    assert not explained.unused


def test_adapt_leaves_calls_to_qwix(base):
    """`adapt` runs the model as it is; a choice by row is refused."""
    model = mixed(base)
    want = model(X)
    assert (loha_jax.adapt(lambda m, x: m(x))(model, X) == want).all()
    with pytest.raises(ValueError, match="LoHaProvider computes all rows"):
        loha_jax.adapt(lambda m, x: m(x), adapter_index=jnp.zeros(3, int))(model, X)
    bare = quantised(Attention(nnx.Rngs(0)), X, **BASES[base])
    assert (loha_jax.adapt(lambda m, x: m(x))(bare, X) == bare(X)).all()


def test_files(base, tmp_path):
    """PEFT's file from one model into another, and its tensors on the float base."""
    model = mixed(base)
    interop.save_peft(tmp_path, model)
    loaded = interop.load_peft(tmp_path, plain(model))
    np.testing.assert_allclose(loaded(X), model(X), atol=1e-4)
    other = mixed(base, trained=False, rank=4)
    interop.load_peft(tmp_path, other, adapter_name="other")
    assert (other(X) == model(X)).all()
    other = mixed(base, trained=False, rank=4)
    interop.save_lora(tmp_path / "lora", model)
    interop.load_lora(tmp_path / "lora", other, adapter_name="other")
    np.testing.assert_allclose(other(X), model(X), atol=1e-4)
    other = mixed(base, trained=False, rank=4)
    interop.save_lycoris(tmp_path / "lycoris.safetensors", model)
    interop.load_lycoris(tmp_path / "lycoris.safetensors", other, adapter_name="other")
    np.testing.assert_allclose(other(X), model(X), atol=1e-5)
    loha_jax.inject(
        everywhere := plain(model),
        loha_jax.LoHaConfig(r=2, target_modules=list(LAYERS)),
        key=KEY,
    )
    interop.save_peft(tmp_path / "everywhere", everywhere)
    before = arrays(other, nnx.Param)
    with pytest.raises(ValueError, match=r"out\.kernel is quantised and has no adapter"):
        interop.load_peft(tmp_path / "everywhere", other, adapter_name="third")
    assert arrays(other, nnx.Param).keys() == before.keys()


def test_save_merged(base, tmp_path):
    """The base checkpoint with the updates of the adapted kernels, and dequantised others."""
    model = mixed(base)
    tensors = {}
    for name, word in LAYERS.items():
        layer = getattr(plain(model), name)
        tensors[f"{name}.weight"] = np.array(loha_jax.Layout(word).unfold(layer.kernel.get_value()))
        if layer.bias is not None:
            tensors[f"{name}.bias"] = np.array(layer.bias.get_value()).reshape(-1)
    save_file(tensors, tmp_path / "model.safetensors")
    interop.save_merged(tmp_path / "merged", model, base=tmp_path)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        delta = updates(model).get(module, 0) if part == "weight" else 0
        np.testing.assert_allclose(saved[name], tensor + delta, atol=1e-5)
    with pytest.raises(ValueError, match=r"load_base fills floating leaves, and mlp\.kernel"):
        interop.load_base(tmp_path, quantised(Attention(nnx.Rngs(0)), X, **BASES[base]))


def test_training_and_checkpoint(base, tmp_path):
    """A resumed run goes on as the first one, bit for bit."""

    def start():
        model = mixed(base)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    def step(model, optimizer):
        factors = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(lambda m: (m(X) ** 2).mean(), argnums=factors)(model))

    model, optimizer = start()
    step(model, optimizer)
    with checkpoint.Checkpoints(tmp_path) as kept:
        kept.save(1, model, nnx.state(optimizer))
    step(model, optimizer)
    other, other_optimizer = start()
    with checkpoint.Checkpoints(tmp_path) as kept:
        restored = kept.restore(other, nnx.state(other_optimizer))
    assert restored.params is other
    nnx.update(other_optimizer, restored.opt_state)
    step(other, other_optimizer)
    for one, two in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True):
        np.testing.assert_array_equal(one, two)


FUNCTIONS = {
    "merge": loha_jax.merge,
    "unload": loha_jax.unload,
    "summary": loha_jax.summary,
    "partition": loha_jax.partition,
    "trainable_mask": loha_jax.trainable_mask,
    "inject": lambda tree: loha_jax.inject(tree, CONFIG, key=KEY),
    "dropout": lambda tree: loha_jax.dropout(tree, KEY),
    "apply_max_norm": lambda tree: loha_jax.apply_max_norm(tree, 1.0),
    "scale": lambda tree: loha_jax.scale(tree, {"default": 2.0}),
    "set_adapter": lambda tree: loha_jax.set_adapter(tree, "default"),
    "delete_adapter": lambda tree: loha_jax.delete_adapter(tree, "default"),
    "add_weighted_adapter": lambda tree: loha_jax.add_weighted_adapter(
        tree, ["default"], [1.0], "sum"
    ),
    "dequantise": loha_jax.dequantise,
    "save_peft": lambda tree: interop.save_peft("nowhere", tree),
    "to_lora": interop.to_lora,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_arrays_without_rank_and_alpha_are_refused(function):
    """A provider's Linen parameters, an NNX state, and a tree of models."""
    provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0, weight_qtype="int8")
    params = qwix.apply_lora_to_model(LinenModel(), provider).init(KEY, X)
    for tree in (params, nn.meta.unbox(params), nnx.state(mixed("int8"))):
        with pytest.raises(ValueError, match=r"_lora_hada_w1_a is an array.*linen_tree"):
            function(tree)
    assert loha_jax.summary(linen_tree(provider, params["params"])).totals
    with pytest.raises(TypeError, match=r"\['a'\] in the tree is a model \(Attention\)"):
        function({"a": mixed("int8"), "b": jnp.ones(3)})
