"""Trees with quantised kernels: inject, partition, training, merge, files and checkpoints."""

import dataclasses
import re
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, ScaledArray, checkpoint, interop
from tests.helpers.quantised_kernels import KEY, SCHEMES, float_and_quantised, quantised

CONFIG = LoHaConfig(
    r=2, alpha=3, target_modules=["a", "c"], modules_to_save=["s"], init_weights=False
)
LAYOUTS = {"c": "sio"}


def kernel(*shape, seed=0):
    return normal_array(seed, shape)


def tree(scheme):
    """Adapted `a` and a stack `c`, a saved `s`, and `b`, which only is quantised."""
    return {
        "a": {"kernel": quantised(kernel(8, 12), scheme), "bias": jnp.ones(12)},
        "b": {"kernel": quantised(kernel(12, 4), scheme)},
        "c": {"kernel": quantised(kernel(3, 8, 8), scheme, stacked=True)},
        "s": {"kernel": quantised(kernel(8, 4), scheme)},
    }


def adapted(scheme):
    """The float tree and the quantised one, adapted alike."""
    return float_and_quantised(tree(scheme), CONFIG, LAYOUTS)


def same_bits(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# --- inject ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inject_and_back(scheme):
    base = tree(scheme)
    params = loha_jax.inject(base, CONFIG, key=KEY, layouts=LAYOUTS)
    plain = loha_jax.inject(loha_jax.dequantise(base), CONFIG, key=KEY, layouts=LAYOUTS)
    trained, wanted = loha_jax.partition(params)[0], loha_jax.partition(plain)[0]
    assert same_bits(trained["a"], wanted["a"])
    assert same_bits(trained["c"], wanted["c"])
    np.testing.assert_array_equal(params["s"]["kernel"], plain["s"]["kernel"])
    assert params["a"]["kernel"].shape == (8, 12)
    assert params["a"]["kernel"].dtype == jnp.float32
    for name in "abcs":
        assert loha_jax.unload(params)[name]["kernel"] is base[name]["kernel"]
        assert loha_jax.delete_adapter(params, "default")[name]["kernel"] is base[name]["kernel"]


def test_repr_and_summary_name_the_scheme():
    params = loha_jax.inject(tree("int4"), CONFIG, key=KEY, layouts=LAYOUTS)
    assert repr(params["a"]["kernel"]) == "LoHaWeight(f32[8,12] (int4) io, default: r=2 alpha=3)"
    assert repr(loha_jax.partition(params)[0]["a"]["kernel"]).startswith("LoHaWeight(None io")
    summary = loha_jax.summary(params)
    assert summary.rows[0].kind == "loha (int4)"
    float_tree = loha_jax.inject(
        loha_jax.dequantise(tree("int4")), CONFIG, key=KEY, layouts=LAYOUTS
    )
    assert summary.totals == loha_jax.summary(float_tree).totals


def test_shapes_are_adapted_like_arrays():
    base = tree("int8")
    shapes = loha_jax.inject(jax.eval_shape(lambda: base), CONFIG, key=KEY, layouts=LAYOUTS)
    params = loha_jax.inject(base, CONFIG, key=KEY, layouts=LAYOUTS)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(params)]


@pytest.mark.filterwarnings(
    "ignore:'VariableState' was removed:DeprecationWarning"
)  # qwix asks Flax for it
def test_linen_parameters_of_qwix():
    """The tree of `quantize_params`, which also says how it was made, with the float model."""
    flax_module = pytest.importorskip("flax.linen")
    qwix = pytest.importorskip("qwix")
    model = flax_module.Sequential([flax_module.Dense(8), flax_module.Dense(4)])
    x = jnp.ones((2, 8))
    params = model.init(KEY, x)
    rules = [
        qwix.QuantizationRule(module_path=".*_0", weight_qtype="nf4", tile_size=4),
        qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8),
    ]
    packed_model = qwix.quantize_model(model, qwix.PtqProvider(rules))
    like = jax.eval_shape(packed_model.init, KEY, x)["params"]
    packed = {"params": qwix.quantize_params(params["params"], like)}
    config = LoHaConfig(r=2, target_modules="all-linear", init_weights=False)
    both = float_and_quantised(packed, config)
    want, have = (loha_jax.adapt(model.apply)(params, x) for params in both)
    np.testing.assert_allclose(have, want, rtol=1e-5)
    with pytest.warns(UserWarning, match=r"layers_0 \d+% \(nf4\)"):
        kept = loha_jax.merge(both[1], requantise=True)["params"]["layers_1"]["kernel"]
    assert type(kept).__name__ == "WithAux"
    assert kept.array.qvalue.dtype == jnp.int8


def test_names_inside_a_quantised_array_are_no_modules():
    with pytest.raises(ValueError, match="not found") as error:
        loha_jax.inject(tree("int8"), LoHaConfig(target_modules=["zz"]), key=KEY)
    assert not re.search("qvalue|scale", str(error.value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    bits: jax.Array
    step: jax.Array


def test_an_unknown_type_is_refused_by_path_until_it_is_registered(monkeypatch):
    params = {"q": {"kernel": Packed(jnp.ones((4, 4), jnp.uint8), jnp.float32(0.5))}}
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    with pytest.raises(
        ValueError,
        match=r"q\.kernel is of a type that is not known, .*bits u8\[4,4\].*register_quantised",
    ):
        loha_jax.inject(params, config, key=KEY)
    loha_jax.register_quantised(Packed, lambda q: q.bits * q.step)
    both = float_and_quantised(params, config)
    want, have = (loha_jax.adapt(lambda p, x: x @ p["q"]["kernel"])(p, jnp.eye(4)) for p in both)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    with pytest.raises(ValueError, match="kernel of q is a Packed, which cannot be made again"):
        loha_jax.merge(both[1], requantise=True)


def test_a_scale_that_does_not_fit():
    with pytest.raises(ValueError, match=r"scale of shape \(3,\) does not fit"):
        ScaledArray(jnp.ones((4, 3), jnp.int8), jnp.ones(3))


def test_factors_are_placed_like_the_stored_values():
    mesh = jax.make_mesh((1,), ("x",))
    placed = NamedSharding(mesh, PartitionSpec(None, "x"))
    packed = quantised(kernel(8, 12), "int8")
    packed = jax.tree.map(lambda x: jax.device_put(x, placed), packed)
    config = LoHaConfig(r=2, target_modules=["a"])
    leaf = loha_jax.inject({"a": {"kernel": packed}}, config, key=KEY)["a"]["kernel"]
    assert leaf.adapters["default"].hada_w1_a.sharding.spec == PartitionSpec("x", None)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "scaled_float8"])
def test_the_base_keeps_its_bits_in_training(scheme):
    base = tree(scheme)
    params = loha_jax.inject(base, CONFIG, key=KEY, layouts=LAYOUTS)
    trainable, frozen = loha_jax.partition(params)
    assert not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(trainable))
    mask = loha_jax.trainable_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(trainable)) == 9
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(trainable)

    def fn(p, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["c"]["kernel"])[0]
        return (h @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + x @ p["s"]["kernel"]

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return (
                loha_jax.adapt(fn)(loha_jax.combine(trainable, frozen), jnp.ones((2, 8))) ** 2
            ).sum()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    first = None
    for _ in range(3):
        trainable, state, value = step(trainable, state)
        first = value if first is None else first
    assert value < first
    trained = loha_jax.combine(trainable, frozen)
    assert same_bits(loha_jax.unload(trained), base)


def test_a_changed_scale_is_a_changed_base(tmp_path):
    params = loha_jax.inject(tree("int8"), CONFIG, key=KEY, layouts=LAYOUTS)
    leaf = params["a"]["kernel"]
    node = dataclasses.replace(leaf.kernel.node, scale=leaf.kernel.node.scale * 2)
    params["a"]["kernel"] = dataclasses.replace(leaf, kernel=type(leaf.kernel)(node))
    with pytest.warns(UserWarning, match="base weights have changed .*: a"):
        interop.save_peft(tmp_path, params)


def test_a_narrower_dtype_keeps_the_base_quantised():
    """The training loop computes in bfloat16 without touching what is stored."""
    from loha_jax.train.step import cast_floating

    params = loha_jax.inject(tree("int8"), CONFIG, key=KEY, layouts=LAYOUTS)
    narrow = cast_floating(params, jnp.bfloat16)
    assert same_bits(loha_jax.unload(narrow)["a"]["kernel"], tree("int8")["a"]["kernel"])
    assert narrow["a"]["kernel"].dtype == jnp.bfloat16
    result = loha_jax.adapt(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"])(
        narrow, jnp.ones((2, 8), jnp.bfloat16)
    )
    assert result.dtype == jnp.bfloat16


# --- merge ----------------------------------------------------------------------------------------


def update(leaf):
    """ΔW of a kernel without stack axes, as its formula says."""
    f = leaf.adapters["default"]
    one, two = (
        np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        for a, b in ((f.hada_w1_a, f.hada_w1_b), (f.hada_w2_a, f.hada_w2_b))
    )
    return (one * two).T * f.alphas[0] / f.ranks[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merge_into_float_and_quantised_kernels(scheme):
    plain, params = adapted(scheme)
    wanted, merged = loha_jax.merge(plain), loha_jax.merge(params)
    for name in "acs":
        np.testing.assert_allclose(merged[name]["kernel"], wanted[name]["kernel"], rtol=1e-6)
    assert type(merged["b"]["kernel"]) is type(tree(scheme)["b"]["kernel"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        again = loha_jax.merge(params, requantise=True)
    for name in "ac":
        old = tree(scheme)[name]["kernel"]
        assert jax.tree.structure(again[name]["kernel"]) == jax.tree.structure(old)
        shapes = [
            [(x.shape, x.dtype) for x in jax.tree.leaves(k)] for k in (again[name]["kernel"], old)
        ]
        assert shapes[0] == shapes[1]
    stored = np.asarray(loha_jax.dequantise(again)["a"]["kernel"], np.float64)
    base = np.asarray(loha_jax.dequantise(tree(scheme))["a"]["kernel"], np.float64)
    delta = update(params["a"]["kernel"])
    share = np.linalg.norm(stored - base - delta) / np.linalg.norm(delta)
    losses = loha_jax.requantising_losses(params)
    np.testing.assert_allclose(losses["a"], share, rtol=1e-3)
    assert share > 0
    said = [
        str(w.message) for w in caught if "Quantising the merged weights again" in str(w.message)
    ]
    assert len(said) == 1 if min(losses.values()) > 0.1 else len(said) <= 1
    assert all(f"a {losses['a']:.0%} (" in message for message in said)


def test_merge_of_nothing_keeps_the_bits():
    params = loha_jax.inject(tree("int8"), CONFIG, key=KEY, layouts=LAYOUTS)
    none = loha_jax.merge(params, [])
    assert same_bits(none["a"]["kernel"], tree("int8")["a"]["kernel"])
    scaled = loha_jax.inject(
        {"a": tree("scaled_int8")["a"]}, LoHaConfig(r=2, target_modules=["a"]), key=KEY
    )
    again = loha_jax.merge(scaled, requantise=True)  # an untrained update is zero
    assert same_bits(again["a"]["kernel"], tree("scaled_int8")["a"]["kernel"])


def test_merge_of_some_adapters_keeps_the_others():
    plain, params = (
        loha_jax.inject(p, CONFIG, key=jax.random.key(7), adapter_name="two", layouts=LAYOUTS)
        for p in adapted("int8")
    )
    wanted, merged = (loha_jax.merge(p, ["default"], unload=False) for p in (plain, params))
    np.testing.assert_allclose(merged["a"]["kernel"], wanted["a"]["kernel"], rtol=1e-5)
    with pytest.warns(UserWarning, match="Quantising the merged weights again loses"):
        packed = loha_jax.merge(params, ["default"], unload=False, requantise=True)["a"]["kernel"]
    assert packed.kernel.scheme == "int8"
    assert list(packed.adapters) == ["two"]


def test_merge_under_jit():
    plain, params = adapted("scaled_int8")
    wanted, merged = (jax.jit(loha_jax.merge)(p) for p in (plain, params))
    np.testing.assert_allclose(merged["c"]["kernel"], wanted["c"]["kernel"], rtol=1e-5)
    again = jax.jit(lambda p: loha_jax.merge(p, requantise=True))(params)
    assert again["a"]["kernel"].values.dtype == jnp.int8


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "aqt"])
def test_files_are_those_of_the_float_base(scheme, tmp_path):
    plain, params = adapted(scheme)
    interop.save_peft(tmp_path / "float", plain)
    interop.save_peft(tmp_path / "packed", params)
    name = "adapter_model.safetensors"
    assert (tmp_path / "float" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    back = interop.load_peft(tmp_path / "packed", tree(scheme), layouts=LAYOUTS)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert same_bits(back, params)
    config = LoHaConfig(r=2, target_modules=["a", "c"], init_weights=False)
    for save in (interop.save_lora, interop.save_lycoris):
        written = []
        for n, own in enumerate(float_and_quantised(tree(scheme), config, LAYOUTS)):
            file = tmp_path / f"{save.__name__}{n}.safetensors"
            save(file if save is interop.save_lycoris else file.with_suffix(""), own)
            found = [file] if file.is_file() else sorted(file.with_suffix("").glob("*.safetensors"))
            written.append([f.read_bytes() for f in found])
        assert written[0] == written[1] != []


def test_merged_checkpoints(tmp_path):
    from safetensors.numpy import load_file

    plain, params = adapted("int4")
    interop.save_merged(tmp_path / "float", plain)
    interop.save_merged(tmp_path / "packed", params)
    want, have = (load_file(tmp_path / n / "model.safetensors") for n in ("float", "packed"))
    assert want.keys() == have.keys()
    for key in want:
        np.testing.assert_allclose(have[key], want[key], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"load_base fills floating leaves, and a\.kernel"):
        interop.load_base(tmp_path / "float", tree("int4"))


def test_the_float_model_in_peft_computes_the_same(tmp_path):
    """The adapter's file on a torch model whose weights are the dequantised ones."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    params = {
        "a": {"kernel": quantised(kernel(8, 12), "nf4")},
        "b": {"kernel": quantised(kernel(12, 4), "int8")},
    }
    config = LoHaConfig(r=2, alpha=3, target_modules=["a", "b"], init_weights=False)
    adapted = loha_jax.inject(params, config, key=KEY)
    interop.save_peft(tmp_path, adapted)
    model = torch.nn.Sequential()
    for name, leaf in loha_jax.dequantise(params).items():
        layer = torch.nn.Linear(*leaf["kernel"].shape, bias=False)
        layer.weight.data = torch.tensor(np.asarray(leaf["kernel"]).T.copy())
        model.add_module(name, layer)
    x = np.asarray(kernel(5, 8, seed=3))
    want = peft.PeftModel.from_pretrained(model, tmp_path)(torch.tensor(x)).detach().numpy()
    have = loha_jax.adapt(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"])(adapted, x)
    np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


def test_training_checkpoints(tmp_path):
    params = loha_jax.inject(tree("int4"), CONFIG, key=KEY, layouts=LAYOUTS)
    checkpoint.save(tmp_path / "run", params, step=3)
    other = loha_jax.inject(tree("int4"), CONFIG, key=jax.random.key(5), layouts=LAYOUTS)
    assert same_bits(checkpoint.restore(tmp_path / "run", other).params, params)
    changed = tree("int4")
    changed["a"]["kernel"] = quantised(kernel(8, 12, seed=4), "int4")
    changed = loha_jax.inject(changed, CONFIG, key=KEY, layouts=LAYOUTS)
    with pytest.raises(ValueError, match="base"):
        checkpoint.restore(tmp_path / "run", changed)


def test_flax_serialization():
    params = loha_jax.inject(tree("scaled_int8"), CONFIG, key=KEY, layouts=LAYOUTS)
    other = loha_jax.inject(tree("scaled_int8"), CONFIG, key=jax.random.key(5), layouts=LAYOUTS)
    for name in "acs":
        state = flax.serialization.to_bytes(params[name])
        assert same_bits(flax.serialization.from_bytes(other[name], state), params[name])


def test_export():
    params = loha_jax.inject(
        {"a": tree("scaled_int8")["a"], "b": tree("scaled_int8")["b"]},
        LoHaConfig(r=2, target_modules=["a"], init_weights=False),
        key=KEY,
    )
    run = jax.jit(loha_jax.adapt(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]))
    exported = jax.export.export(run)(params, jnp.ones((2, 8)))
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(params, jnp.ones((2, 8))), run(params, jnp.ones((2, 8))))
