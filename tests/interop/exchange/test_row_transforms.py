"""Adapters whose rows torch has in another order and scaled: all layouts and formats, both ways.

The reference is W' of a module in float64, computed from a file by the formulas of PEFT and
LyCORIS, beside the rows of the tree's own W'.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from loha_jax.interop import NameMap, RowTransform
from loha_jax.lowrank.layout import Layout
from loha_jax.tree.leaves import map_factors

ORDER = [2, 0, 3, 1]
RNG = np.random.default_rng(0)
SHAPES = {
    "io": (6, 8),
    "oi": (8, 6),
    "ioo": (6, 2, 4),
    "oio": (2, 6, 4),
    "o1 i o0": (4, 6, 2),
    "iio": (2, 3, 8),
    "isoo": (6, 3, 2, 4),
    "soio": (2, 2, 6, 4),
    "kkio": (3, 3, 6, 8),
    "kio": (2, 6, 8),
    "oikk": (8, 6, 3, 3),
    "skkio": (2, 3, 3, 6, 8),
}
FORMS = {
    "plain": (LoHaConfig, {}),
    "cores": (LoHaConfig, {"use_effective_conv2d": True}),
    "scalar": (LycorisConfig, {"use_scalar": True}),
    "out": (LycorisConfig, {"weight_decompose": True}),
    "in": (LycorisConfig, {"weight_decompose": True, "wd_on_out": False}),
    "cores, out": (LycorisConfig, {"weight_decompose": True, "use_effective_conv2d": True}),
}


def name_map(word, scale):
    """A stack has one name per index."""
    count = int(np.prod(Layout(word).sizes("s", SHAPES[word])))
    one = [f"model.{n}.q_proj" for n in range(count)] if "s" in word else "model.0.q_proj"
    return NameMap(
        lambda name: one if name == "q" else name,
        layouts={"q": word},
        rows={"q": RowTransform(ORDER, scale)},
    )


def base_tree(word):
    values = RNG.normal(size=SHAPES[word])
    return {"q": {"kernel": jnp.asarray(values, jnp.float32)}}


def adapted(word, form, scale):
    kind, fields = FORMS[form]
    config = kind(r=2, alpha=3, target_modules=["q_proj"], init_weights=False, **fields)
    names = name_map(word, scale)
    tree = loha_jax.inject(base_tree(word), config, key=jax.random.key(0), names=names)

    def random(leaf, name, factors):
        arrays = {n: x * RNG.uniform(0.5, 2, x.shape) for n, x in factors.trained.items()}
        return dataclasses.replace(factors, **{n: x.astype("float32") for n, x in arrays.items()})

    return map_factors(random, tree)


def torch_rows(array, scale):
    """`[out, …]` of the tree's rows as torch has them, in float64."""
    blocks = np.asarray(array, np.float64).reshape(-1, len(ORDER), *array.shape[1:])
    return scale * blocks[:, ORDER].reshape(array.shape)


def modules_of(array, word):
    """The modules of a kernel, `[out, in, *spatial]` each."""
    stack = len(Layout(word).axes("s"))
    unfolded = np.asarray(Layout(word).unfold(array), np.float64)
    return unfolded.reshape(-1, *unfolded.shape[stack:])


def weight_of_file(tensors, weight, alpha):
    """W' in float64 of a module's tensors, without PEFT's or LyCORIS' prefix, on torch's W."""
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}

    def factor(n):
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if "hada_t1" not in t:
            return (a @ b).reshape(weight.shape)
        core = t[f"hada_t{n}"].reshape(*t[f"hada_t{n}"].shape[:2], *weight.shape[2:])
        return np.einsum("pq...,po,qi->oi...", core, a, b)

    changed = weight + factor(1) * factor(2) * alpha / 2
    if "dora_scale" not in t:
        return changed
    norms = t["dora_scale"].reshape(*t["dora_scale"].shape[:2], *(1,) * (weight.ndim - 2))
    summed = tuple(n for n in range(weight.ndim) if n != (0 if norms.shape[0] > 1 else 1))
    return changed / np.sqrt((changed**2).sum(summed, keepdims=True)) * norms


def own(tensors, prefix):
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


CASES = [
    *((word, "plain") for word in SHAPES),
    *(("io", form) for form in ("scalar", "out", "in")),
    *(("isoo", form) for form in ("scalar", "out", "in")),
    *((word, "cores") for word in ("kkio", "kio", "oikk", "skkio")),
    *(("skkio", form) for form in ("in", "cores, out")),
]


@pytest.mark.parametrize(("word", "form"), CASES)
def test_files_hold_torchs_rows(word, form, tmp_path):
    """A LyCORIS file of every form, and PEFT's folder where PEFT has the form; then back again."""
    scale = 4.0 if form != "in" else -4.0
    tree, names = adapted(word, form, scale), name_map(word, scale)
    leaf = tree["q"]["kernel"]
    weights, changed = (modules_of(x, word) for x in (leaf.kernel, leaf.dense()))
    file = tmp_path / "adapter.safetensors"
    interop.save_lycoris(file, tree, prefix="")
    written = [(load_file(file), "model.{}.q_proj.")]
    if FORMS[form][0] is LoHaConfig:
        interop.save_peft(tmp_path / "peft", tree)
        found = load_file(tmp_path / "peft/adapter_model.safetensors")
        written.append((found, "base_model.model.model.{}.q_proj."))
    for tensors, prefix in written:
        for n, (weight, want) in enumerate(zip(weights, changed, strict=True)):
            found = weight_of_file(
                own(tensors, prefix.format(n)), torch_rows(weight, scale), leaf_alpha(leaf)
            )
            np.testing.assert_allclose(found, torch_rows(want, scale), rtol=1e-4, atol=1e-4)
    base = {"q": {"kernel": leaf.kernel}}
    again = interop.load_lycoris(file, base, names=names)
    np.testing.assert_allclose(again["q"]["kernel"].dense(), leaf.dense(), rtol=1e-5, atol=1e-5)
    if len(written) > 1:
        again = interop.load_peft(tmp_path / "peft", base, names=names)
        for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(mine, theirs)  # 4 is a power of two


def leaf_alpha(leaf):
    (alpha,) = {*leaf.adapters["default"].alphas}
    return alpha


@pytest.mark.parametrize(("word", "form"), [("ioo", "plain"), ("isoo", "out"), ("kkio", "cores")])
def test_loras_hold_torchs_rows(word, form, tmp_path):
    """B A of the file is the update; a DoRA's magnitude has torch's rows."""
    scale = 6**0.5
    tree, names = adapted(word, form, scale), name_map(word, scale)
    leaf = tree["q"]["kernel"]
    interop.save_lora(tmp_path, tree)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights, changed = (modules_of(x, word) for x in (leaf.kernel, leaf.dense()))
    for n, (weight, want) in enumerate(zip(weights, changed, strict=True)):
        mine = own(tensors, f"base_model.model.model.{n}.q_proj.")
        a, b = (np.asarray(mine[f"lora_{x}.weight"], np.float64) for x in "AB")
        update = np.einsum("or,r...->o...", b.reshape(len(b), -1), a)
        found = torch_rows(weight, scale) + update
        if form == "out":
            found *= (mine["lora_magnitude_vector"] / np.sqrt((found**2).sum(1)))[:, None]
        np.testing.assert_allclose(found, torch_rows(want, scale), rtol=1e-4, atol=1e-4)
    again = interop.load_lora(tmp_path, {"q": {"kernel": leaf.kernel}}, names=names)
    np.testing.assert_allclose(again["q"]["kernel"].dense(), leaf.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", SHAPES)
def test_base_weights_have_torchs_rows(word, tmp_path):
    tree, names = base_tree(word), name_map(word, 4.0)
    interop.save_merged(tmp_path / "out", tree, names=names)
    tensors = load_file(tmp_path / "out/model.safetensors")
    for n, weight in enumerate(modules_of(tree["q"]["kernel"], word)):
        np.testing.assert_array_equal(tensors[f"model.{n}.q_proj.weight"], torch_rows(weight, 4))
    back = interop.load_base(tmp_path / "out", jax.eval_shape(lambda: tree), names=names)
    np.testing.assert_array_equal(back["q"]["kernel"], tree["q"]["kernel"])


def test_base_weights_of_another_dtype_round_once(tmp_path):
    """A float32 leaf of a bfloat16 file has no rounded quotient, nor the file a rounded product."""
    weight = jnp.asarray(RNG.normal(size=(8, 6)), jnp.bfloat16)
    save_file({"q.weight": np.asarray(weight)}, tmp_path / "model.safetensors")
    names = NameMap(rows={"q": RowTransform(scale=128**0.5)})
    for dtype in (jnp.float32, jnp.bfloat16):
        like = {"q": {"kernel": jax.ShapeDtypeStruct((6, 8), dtype)}}
        leaf = interop.load_base(tmp_path, like, names=names)["q"]["kernel"]
        exact = np.asarray(weight, np.float64).T / 128**0.5
        np.testing.assert_array_equal(leaf, exact.astype(np.float32).astype(dtype))
        interop.save_merged(tmp_path / str(dtype.__name__), {"q": {"kernel": leaf}}, names=names)
    back = load_file(tmp_path / "float32/model.safetensors")["q.weight"]
    np.testing.assert_array_equal(back.astype(jnp.bfloat16), weight)


def test_saved_modules_and_their_biases_have_torchs_rows(tmp_path):
    """Copies of `modules_to_save`, and LyCORIS' differences of biases and whole weights."""
    params = {
        name: {
            "kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32),
            "bias": jnp.asarray(RNG.normal(size=8), jnp.float32),
        }
        for name in ("q", "head")
    }
    rows = RowTransform(ORDER, 4)
    names = NameMap(rows={"q|head": rows})
    config = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["head"])
    tree = loha_jax.inject(params, config, key=jax.random.key(0), names=names)
    interop.save_peft(tmp_path, tree)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kernel, bias = (np.asarray(params["head"][name]).T for name in ("kernel", "bias"))
    np.testing.assert_array_equal(tensors["base_model.model.head.weight"], torch_rows(kernel, 4))
    np.testing.assert_array_equal(tensors["base_model.model.head.bias"], torch_rows(bias, 4))
    again = interop.load_peft(tmp_path, params, names=names)
    np.testing.assert_array_equal(again["head"]["kernel"], params["head"]["kernel"])
    np.testing.assert_array_equal(again["head"]["bias"], params["head"]["bias"])
    change, moved = RNG.normal(size=(8, 6)), RNG.normal(size=8)
    file = interop.to_lycoris_state_dict(
        loha_jax.inject(
            params, LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0), names=names
        ),
        prefix="",
    )
    file |= {"head.diff": change.astype(np.float32), "q.diff_b": moved.astype(np.float32)}
    save_file(file, tmp_path / "diff.safetensors")
    loaded = interop.load_lycoris(tmp_path / "diff.safetensors", params, names=names)
    got = torch_rows(np.asarray(loaded["head"]["kernel"]).T, 4)
    np.testing.assert_allclose(got, torch_rows(kernel, 4) + change, atol=1e-5)
    got = torch_rows(np.asarray(loaded["q"]["bias"]), 4)
    np.testing.assert_allclose(
        got, torch_rows(np.asarray(params["q"]["bias"]), 4) + moved, atol=1e-5
    )


def test_base_weights_in_an_adapter_have_torchs_rows(tmp_path):
    """PEFT writes the base weights of a targeted output head with the adapter."""
    params = {
        "lm_head": {
            "kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32),
            "bias": jnp.arange(8.0),
        }
    }
    names = NameMap(rows={"lm_head": RowTransform(ORDER, 4)})
    config = LoHaConfig(r=2, target_modules=["lm_head"])
    tree = loha_jax.inject(params, config, key=jax.random.key(0), names=names)
    interop.save_peft(tmp_path, tree)
    tensors = own(load_file(tmp_path / "adapter_model.safetensors"), "base_model.model.lm_head.")
    head = params["lm_head"]
    want = torch_rows(np.asarray(head["kernel"]).T, 4)
    np.testing.assert_array_equal(tensors["base_layer.weight"], want)
    np.testing.assert_array_equal(tensors["base_layer.bias"], torch_rows(np.arange(8.0), 4))
    other = jax.tree.map(jnp.zeros_like, params)
    again = interop.load_peft(tmp_path, other, names=names)["lm_head"]
    np.testing.assert_array_equal(again["kernel"].kernel, head["kernel"])
    np.testing.assert_array_equal(again["bias"], head["bias"])


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return self.q(x)


def test_an_nnx_model_keeps_its_transform(tmp_path):
    """In place, through a second adapter, `merge`, and `jax.export`'s description."""
    names = NameMap({"q": "model.q_proj"}, rows={"q": RowTransform(ORDER, 4)})
    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = loha_jax.nnx.inject(Attention(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), names=names)
    interop.save_peft(tmp_path / "one", model)
    x = jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)
    ours = model(x)
    interop.load_peft(tmp_path / "one", model, adapter_name="other")
    np.testing.assert_array_equal(model(x), ours)
    weight = np.asarray(model.q.kernel.get_value()).T
    found = load_file(tmp_path / "one/adapter_model.safetensors")
    changed = weight_of_file(own(found, "base_model.model.model.q_proj."), torch_rows(weight, 4), 8)
    merged = loha_jax.merge(nnx.clone(model))
    got = torch_rows(np.asarray(merged.q.kernel.get_value()).T, 4)
    np.testing.assert_allclose(got, changed, atol=1e-4)


def test_trees_are_exported_with_their_transform():
    tree = adapted("ioo", "plain", 4.0)
    exported = jax.export.export(jax.jit(lambda tree: tree))(tree)
    back = jax.export.deserialize(exported.serialize()).call(tree)
    assert back["q"]["kernel"].rows == RowTransform(ORDER, 4)


def test_what_has_no_known_rows_is_refused(tmp_path):
    """GPT-2's Conv1D is [in, out] in torch; a bias of heads has no layout."""
    names = NameMap(rows={r".*c_attn": RowTransform([1, 0])})
    attention = {"kernel": RNG.normal(size=(12, 4)), "bias": RNG.normal(size=12)}
    tree = {"h": {"0": {"attn": {"c_attn": {k: np.float32(v) for k, v in attention.items()}}}}}
    save_file(
        {
            "h.0.attn.c_attn.weight": np.zeros((4, 12), np.float32),
            "h.0.attn.c_attn.bias": np.zeros(12, np.float32),
        },
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"\[in, out\] \(GPT-2's Conv1D\)"):
        interop.load_base(tmp_path / "model.safetensors", tree, names=names)
    heads = {"q": {"kernel": jnp.ones((6, 4, 2)), "bias": jnp.ones((4, 2))}}
    heads["v"] = heads["q"]
    config = LoHaConfig(r=2, target_modules=["v"], modules_to_save=["q"], init_weights=False)
    params = loha_jax.inject(
        heads,
        config,
        key=jax.random.key(0),
        names=NameMap(rows={"q": RowTransform([1, 0])}),
        layouts={"q": "ioo", "v": "ioo"},
    )
    with pytest.raises(ValueError, match=r"q\.bias.*which of its axes are torch's rows"):
        interop.save_peft(tmp_path / "adapter", params)
