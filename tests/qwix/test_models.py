"""Adapted models of other forms: scanned stacks, Linen, rules, files, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix_models import (
    BASES,
    Attention,
    LinenModel,
    Stack,
    adapted,
    randomise,
    tokens,
)
from random_arrays import normal_array

import loha_jax
from loha_jax import interop
from loha_jax.nnx.siblings import values_of
from loha_jax.qwix import LoHaProvider, LoHaRule, linen_params, linen_tree


def temporary_bytes(layers, **fields):
    """Bytes that a training step needs besides its arguments and results."""
    x = jnp.ones((4, 128))
    model = adapted(Stack(layers, 128, nnx.Rngs(0)), x, **fields)
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def step(lora, rest, x):
        return jax.grad(lambda lora: nnx.merge(graph, lora, rest, copy=True)(x).sum())(lora)

    return jax.jit(step).lower(lora, rest, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("base", ["float", "int8"])
def test_scan_keeps_no_float_kernels(base):
    """Seven more layers need less than two more float kernels: quantised ones stay packed."""
    more = temporary_bytes(8, **BASES[base]) - temporary_bytes(1, **BASES[base])
    assert more < 2 * 128 * 128 * 4


def test_scanned_stack_is_one_module_per_layer():
    """The stack's factors have the layers in front, and its file one module per layer."""
    x = jnp.ones((4, 16))
    model = adapted(Stack(3, 16, nnx.Rngs(0)), x)
    assert model.layers.kernel_lora_hada_w1_a.get_value().shape == (3, 16, 2)
    weight = model.layers.kernel.get_value()
    tensors = interop.to_peft_state_dict(model)
    h = x
    for n in range(3):
        w = [
            tensors[f"base_model.model.{n}.layers.hada_{k}"]
            for k in ("w1_a", "w1_b", "w2_a", "w2_b")
        ]
        h = jnp.tanh(h @ (weight[n] + 2.0 * ((w[0] @ w[1]) * (w[2] @ w[3])).T))
    np.testing.assert_allclose(model(x), h, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "axis"), [("float", 0), ("int8", 0), ("nf4", 0), ("float", 1), ("int8", 1)]
)
def test_linen(base, axis):
    """Parameters beside the kernel, the base's function at first, and then the formula's."""
    model, x = LinenModel(axis), tokens()
    provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0, **BASES[base])
    new = qwix.apply_lora_to_model(model, provider)
    params = nn.unbox(new.init(jax.random.key(1), x)["params"])
    rule = qwix.QuantizationRule(module_path=".*", **BASES[base])
    plain = model if base == "float" else qwix.quantize_model(model, qwix.PtqProvider([rule]))
    flat = flatten_dict(params)
    bare = unflatten_dict({k: v for k, v in flat.items() if "_lora_" not in k[-1]})
    np.testing.assert_array_equal(
        new.apply({"params": params}, x), plain.apply({"params": bare}, x)
    )
    shape = {0: (3, 2, 16), 1: (2, 3, 16)}[axis]
    assert params["layers"]["dense"]["kernel_lora_hada_w1_b"].shape == shape
    random = {
        k: normal_array(n, v.shape) * 0.5 if "_lora_" in k[-1] else v
        for n, (k, v) in enumerate(flat.items())
    }
    params = unflatten_dict(random)
    tree = linen_tree(provider, params)
    if base == "float":
        want = loha_jax.adapt(model.apply)({"params": tree}, x)
        np.testing.assert_allclose(new.apply({"params": params}, x), want, atol=1e-5)
    merged = loha_jax.merge(tree)
    tolerance = 1e-5 if base == "float" else 1e-4
    np.testing.assert_allclose(
        new.apply({"params": params}, x), model.apply({"params": merged}, x), atol=tolerance
    )
    names = interop.to_peft_state_dict(tree)
    assert "base_model.model.layers.2.dense.hada_w1_a" in names


@pytest.mark.parametrize("base", ["float", "int8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_file_is_loaded_into_linen_parameters(base, axis, tmp_path):
    """Other parameters then compute with the same updates, in their boxes, with the base packed."""
    model, x = LinenModel(axis), tokens()
    provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0, **BASES[base])
    new = qwix.apply_lora_to_model(model, provider)
    params = new.init(jax.random.key(1), x)["params"]
    flat = flatten_dict(nn.unbox(params))
    trained = unflatten_dict(
        {
            k: normal_array(n, v.shape) * 0.5 if "_lora_" in k[-1] else v
            for n, (k, v) in enumerate(flat.items())
        }
    )
    interop.save_peft(tmp_path, linen_tree(provider, trained))
    tree = interop.load_peft(tmp_path, linen_tree(provider, params), adapter_name="other")
    got = linen_params(provider, params, tree)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(got), trained)
    np.testing.assert_array_equal(new.apply({"params": got}, x), new.apply({"params": trained}, x))


def test_trees_that_do_not_fit_linen_parameters():
    model, x = LinenModel(0), tokens()

    def made(**fields):
        provider = LoHaProvider(**fields)
        new = qwix.apply_lora_to_model(model, provider)
        return provider, new.init(jax.random.key(1), x)["params"]

    provider, params = made(module_path="layers.*", rank=2, alpha=4.0)
    tree = linen_tree(provider, params)
    with pytest.raises(ValueError, match=r"layers/dense/kernel has .* and no active ones"):
        linen_params(provider, params, loha_jax.unload(tree))
    with pytest.raises(ValueError, match=r"layers/dense/kernel has .* and no active ones"):
        linen_params(provider, params, loha_jax.set_adapter(tree, []))
    for fields, text in [({"rank": 3}, "r=3 alpha=4"), ({"alpha": 2.0}, "r=2 alpha=2")]:
        other = linen_tree(*made(**{"module_path": "layers.*", "rank": 2, "alpha": 4.0, **fields}))
        with pytest.raises(ValueError, match=rf"has {text}, and the provider made r=2 alpha=4"):
            linen_params(provider, params, other)
    with pytest.raises(ValueError, match=r"has r=2 alpha=4 scaled by 0\.5, and"):
        linen_params(provider, params, loha_jax.scale(tree, {"default": 0.5}))
    config = loha_jax.LoHaConfig(r=2, alpha=4, target_modules=r".*dense")
    other = loha_jax.inject(
        loha_jax.unload(tree), config, key=jax.random.key(0), layouts={"layers.dense": "soi"}
    )
    with pytest.raises(ValueError, match=r"layout 'soi' .* and 'sio' and"):
        linen_params(provider, params, other)
    with pytest.raises(ValueError, match=r"got the collections: give variables\['params'\]"):
        linen_tree(provider, {"params": params})
    with pytest.raises(ValueError, match="got a NoneType"):
        linen_params(provider, params, None)
    whole = linen_tree(*made(module_path=".*", rank=2, alpha=4.0))
    with pytest.raises(ValueError, match=r"adapter on .*, which the provider has not adapted"):
        linen_params(provider, params, whole)


class UpAndDown(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 12, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(12, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Mixed(nnx.Module):
    """A scanned stack, a kernel that is only quantised, and one that is only adapted."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(UpAndDown)(rngs.split(3))
        self.only, self.head = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 5, rngs=rngs)

    def __call__(this, x):  # qwix takes a frame's `self` for the running module
        axes = nnx.StateAxes({nnx.RngState: nnx.Carry, ...: 0})
        run = lambda x, layer: layer(x)  # noqa: E731
        x = nnx.scan(run, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, this.layers)
        return this.head(this.only(x))


def test_no_rule_meets_the_products_of_an_update():
    """JAX traces an update in a scan again for its gradient, while no module runs."""
    rules = [
        LoHaRule(module_path="layers/up", rank=2, alpha=4.0, weight_qtype="int8"),
        LoHaRule(module_path="layers/down|head", rank=2, alpha=4.0),
        qwix.QuantizationRule(module_path=".*", weight_qtype="int8"),
    ]
    x = normal_array(2, (4, 16))
    model = qwix.apply_lora_to_model(Mixed(nnx.Rngs(0)), LoHaProvider(rules), x, rngs=nnx.Rngs(1))
    randomise(model)

    def gradients(model):
        loss = lambda model: (model(x) ** 2).sum()  # noqa: E731
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        return {path: factor.get_value() for path, factor in nnx.to_flat_state(grads)}

    got, want = gradients(model), gradients(loha_jax.dequantise(nnx.clone(model)))
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, rtol=1e-4, atol=1e-4, err_msg=str(path))


def test_rules():
    """The first rule that matches counts: other ranks, and modules that are only quantised."""
    rules = [
        LoHaRule(module_path="query", rank=2, alpha=4.0),
        qwix.QuantizationRule(module_path="out", weight_qtype="int8"),
        LoHaRule(module_path="mlp", rank=3, alpha=1.0, weight_qtype="nf4", tile_size=8),
    ]
    model = qwix.apply_lora_to_model(
        Attention(nnx.Rngs(0)), LoHaProvider(rules), tokens(), rngs=nnx.Rngs(1)
    )
    assert model.query.kernel_lora_hada_w1_a.get_value().shape == (16, 2)
    assert not hasattr(model.out, "kernel_lora")
    assert model.out.kernel.array.qvalue.get_value().dtype == jnp.int8
    assert model.mlp.kernel_lora_hada_w1_a.get_value().shape == (24, 3)


def test_config():
    """PEFT's config instead of rules: its targets, patterns and alphas."""
    config = loha_jax.LoHaConfig(
        r=2, target_modules=["query", "mlp"], rank_pattern={"mlp": 3}, alpha_pattern={"mlp": 6}
    )
    provider = LoHaProvider(config=config, weight_qtype="int8")
    model = qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), provider, tokens(), rngs=nnx.Rngs(1))
    assert model.query.kernel_lora_hada_w1_a.get_value().shape == (16, 2)
    assert model.mlp.kernel_lora_hada_w1_a.get_value().shape == (24, 3)
    assert not hasattr(model.out, "kernel_lora")
    assert model.out.kernel.array.qvalue.get_value().dtype == jnp.int8
    assert provider.targets["mlp", "kernel"][0].alphas == (6,)


class Experts(nnx.Module):
    """Rows sorted by expert, each multiplied with its expert's kernel."""

    def __init__(self):
        self.w = nnx.Param(normal_array(0, (3, 16, 8)))

    def __call__(self, x):
        return jax.lax.ragged_dot(x, self.w.get_value(), jnp.array([2, 3, 1]))


def test_ragged_products():
    """Each expert has an adapter of its own."""
    x = normal_array(1, (6, 16))
    model = adapted(Experts(), x)
    w = [getattr(model, f"w_lora_hada_{n}").get_value() for n in ("w1_a", "w1_b", "w2_a", "w2_b")]
    kernel = model.w.get_value() + 2.0 * jnp.swapaxes((w[0] @ w[1]) * (w[2] @ w[3]), 1, 2)
    expert = jnp.array([0, 0, 1, 1, 1, 2])
    np.testing.assert_allclose(model(x), jnp.einsum("ti,tio->to", x, kernel[expert]), atol=1e-4)
    (use,) = loha_jax.explain(lambda model, x: model(x), model, x).uses
    assert (use.primitive, use.strategy) == ("ragged_dot_general", "factored")
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda lora: nnx.merge(graph, lora, rest)(x).sum())(lora)
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradients))


class Transposed(nnx.Module):
    """Multiplies with the transposed kernel, or with the kernel on the left."""

    def __init__(self, left):
        self.w = nnx.Param(normal_array(0, (4, 4)))
        self.left = left

    def __call__(self, x):
        w = self.w.get_value()
        return jnp.dot(w, x) if self.left else jnp.dot(x, w.T)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_operands_that_no_adapter_fits_are_refused(left, jit):
    """A kernel that is transposed, or the left operand, is not left out silently."""

    def apply(x):
        provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0)
        return qwix.apply_lora_to_model(Transposed(left), provider, x, rngs=nnx.Rngs(0))(x)

    run = jax.jit(apply) if jit else apply
    with pytest.raises(ValueError, match=r"w (stands first|is transposed)"):
        run(jnp.ones((4, 4)))


def test_errors():
    """An error says what cannot be done, and what to do."""
    x = tokens()

    def apply(**fields):
        return qwix.apply_lora_to_model(
            Attention(nnx.Rngs(0)), LoHaProvider(**fields), x, rngs=nnx.Rngs(0)
        )

    with pytest.raises(ValueError, match=r"No kernel was adapted.*'quer'.*query"):
        apply(module_path="quer", rank=2, alpha=4.0)
    with pytest.raises(TypeError, match="rank_dropout"):
        LoHaProvider(rank=2, alpha=4.0, dropout=0.1)
    with pytest.raises(ValueError, match="regular expression"):
        LoHaProvider(config=loha_jax.LoHaConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"qwix\.QuantizationRule"):
        LoHaProvider(
            [LoHaRule(rank=2, alpha=4.0)], config=loha_jax.LoHaConfig(target_modules=["query"])
        )


def test_file_opens_in_peft(tmp_path):
    """The adapter of a float base, opened by PEFT on the torch twin, computes the same."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    x = tokens()
    model = adapted(Attention(nnx.Rngs(0)), x)
    interop.save_peft(tmp_path, model)

    def linear(layer, word):
        kernel = loha_jax.Layout(word).unfold(layer.kernel.get_value())
        twin = torch.nn.Linear(kernel.shape[1], kernel.shape[0], bias=layer.bias is not None)
        twin.weight.data = torch.tensor(np.array(kernel))
        if layer.bias is not None:
            twin.bias.data = torch.tensor(np.array(layer.bias.get_value()).reshape(-1))
        return twin

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = linear(model.query, "ioo")
            self.out = linear(model.out, "iio")
            self.mlp = linear(model.mlp, "io")

        def forward(self, x):
            h = self.out(self.query(x))
            return self.mlp(torch.nn.functional.gelu(h, approximate="tanh"))

    twin = peft.PeftModel.from_pretrained(Twin().eval(), str(tmp_path)).eval()
    want = twin(torch.tensor(np.array(x))).detach().numpy()
    np.testing.assert_allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize("base", ["float", "int8"])
def test_files_and_summary(base, tmp_path):
    """`save_peft`, `load_peft`, `summary` read the model, whatever its base."""
    x = tokens()
    model = adapted(Attention(nnx.Rngs(0)), x, **BASES[base])
    assert "query" in str(loha_jax.summary(model))
    interop.save_peft(tmp_path, model)
    tree = interop.load_peft(tmp_path, Attention(nnx.Rngs(0)))
    np.testing.assert_array_equal(
        tree.mlp.kernel_lora_hada_w2_b.get_value(), model.mlp.kernel_lora_hada_w2_b.get_value()
    )
    if base == "float":
        np.testing.assert_allclose(tree(x), model(x), atol=1e-5)


@pytest.mark.parametrize("base", ["float", "int8", "nf4"])
def test_merge(base):
    """`merge` makes a float model that computes the same."""
    x = tokens()
    model = adapted(Attention(nnx.Rngs(0)), x, **BASES[base])
    want = model(x)
    merged = loha_jax.merge(model)
    assert merged is model
    assert type(merged) is Attention or base == "float"
    assert not hasattr(merged.mlp, "kernel_lora")
    assert merged.mlp.kernel.get_value().dtype == jnp.float32
    np.testing.assert_allclose(merged(x), want, atol=1e-4)


def test_merge_requantised():
    """Quantised again, the merged kernels lose the share that is reported; qwix runs the model."""
    x = tokens()
    model = adapted(Attention(nnx.Rngs(0)), x, **BASES["int8"])
    want = model(x)
    exact = loha_jax.merge(nnx.clone(model))
    base = qwix.dequantize(values_of(model.mlp.kernel).array)
    losses = loha_jax.requantising_losses(model)
    merged = loha_jax.merge(model, requantise=True)
    stored = qwix.dequantize(values_of(model.mlp.kernel).array)
    kernel = exact.mlp.kernel.get_value()
    share = float(jnp.linalg.norm(stored - kernel) / jnp.linalg.norm(kernel - base))
    assert losses.keys() == {"query", "out", "mlp"}
    assert losses["mlp"] == pytest.approx(share, rel=1e-4)
    assert all(0 < loss < 0.05 for loss in losses.values())
    assert merged.mlp.kernel.array.qvalue.get_value().dtype == jnp.int8
    difference = abs(merged(x) - want).max()
    assert 0 < difference < 0.03 * abs(want).max()
