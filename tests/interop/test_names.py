"""Torch names and layouts: from mappings that models carry, from Flax' own habits, and from contents."""

import enum
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loha_jax.interop import NameMap
from safetensors.numpy import save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.targets.module_names import UnknownNameError

D, N, K, H, F, V, E = 12, 4, 2, 5, 7, 11, 3  # embed, heads, kv heads, head, hidden, vocabulary, experts


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


# Mappings in the form, and with the names, of google-tunix 0.1.7's models.


def llama3():
    layer = r"model\.layers\.([0-9]+)\."
    return {
        r"model\.embed_tokens\.weight": ("embedder.input_embedding", None),
        layer + r"self_attn\.q_proj\.weight": (r"layers.\1.attn.q_proj.w", ((1, 0), (D, N, H))),
        layer + r"self_attn\.k_proj\.weight": (r"layers.\1.attn.k_proj.w", ((1, 0), (D, K, H))),
        layer + r"self_attn\.v_proj\.weight": (r"layers.\1.attn.v_proj.w", ((1, 0), (D, K, H))),
        layer + r"self_attn\.o_proj\.weight": (r"layers.\1.attn.o_proj.w", ((1, 0), (N, H, D))),
        layer + r"mlp\.gate_proj\.weight": (r"layers.\1.mlp.gate_proj.kernel", ((1, 0), None)),
        layer + r"mlp\.down_proj\.weight": (r"layers.\1.mlp.down_proj.kernel", ((1, 0), None)),
        r"model\.norm\.weight": ("final_norm.w", None),
        layer + r"self_attn\.q_norm\.weight": (r"layers.\1.attn.q_norm.w", None),
        layer + r"input_layernorm\.weight": (r"layers.\1.input_layernorm.w", None),
        r"lm_head\.weight": ("lm_head.w", ((1, 0), None)),
    }


def qwen2():
    layer = r"model\.layers\.([0-9]+)\."
    return {
        **{pattern: value for pattern, value in llama3().items() if "q_norm" not in pattern},
        layer + r"self_attn\.q_proj\.bias": (r"layers.\1.attn.q_bias", None),
        layer + r"self_attn\.k_proj\.bias": (r"layers.\1.attn.k_bias", None),
    }


def qwen3():
    layer = r"model\.layers\.([0-9]+)\.mlp\."
    expert = layer + r"experts\.([0-9]+)\.(gate|up|down)_proj\.weight"
    return {
        **llama3(),
        layer + r"gate\.weight": (r"layers.\1.mlp.router.kernel", ((1, 0), None)),
        expert: (r"layers.\1.mlp.experts.\2.\3_proj.kernel", ((1, 0), None)),
    }


def stack_experts(tensors):
    """As tunix' qwen3 loader: experts.<n>.<kind>_proj.kernel of a layer become <kind>_proj."""
    out, groups = {}, {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"(.*)experts\.(\d+)\.(\w+_proj)\.kernel", key):
            groups.setdefault(found[1] + found[3], {})[int(found[2])] = value
        else:
            out[key] = value
    return out | {key: jnp.stack([parts[n] for n in sorted(parts)], 0) for key, parts in groups.items()}


def gemma(prefix=""):
    layer = prefix + r"model\.layers\.([0-9]+)\."
    return {
        prefix + r"model\.embed_tokens\.weight": ("embedder.input_embedding", None),
        layer + r"self_attn\.q_proj\.weight": (r"tmp.layers.\1.attn.q", ((1, 0), (D, N, H))),
        layer + r"self_attn\.k_proj\.weight": (r"tmp.layers.\1.attn.k", ((1, 0), (D, K, H))),
        layer + r"self_attn\.v_proj\.weight": (r"tmp.layers.\1.attn.v", ((1, 0), (D, K, H))),
        layer + r"self_attn\.o_proj\.weight": (r"layers.\1.attn.attn_vec_einsum.w", ((1, 0), (N, H, D))),
        layer + r"(post_feedforward_layernorm|post_ffw_layernorm)\.weight": (r"layers.\1.post_ffw_norm.scale", None),
        r"lm_head\.weight": ("unused.lm_head.weight", None),
        r"lm_head\.bias": ("unused.lm_head.bias", None),
        r".*\.bias": (r"unused.bias", None),
    }


def gemma3():
    return gemma(r"(?:language_model\.)?")


def gemma_preprocess():
    """As tunix' gemma loaders: q becomes [N, D, H], k and v one [2, K, D, H]; a closure with state."""
    pending = {}

    def preprocess(tensors):
        out = dict(tensors)
        for key in list(out):
            if found := re.fullmatch(r"tmp\.layers\.(\d+)\.attn\.([qkv])", key):
                pending.setdefault(found[1], {})[found[2]] = out.pop(key)
        for layer, slots in list(pending.items()):
            if "q" in slots:
                out[f"layers.{layer}.attn.q_einsum.w"] = jnp.transpose(slots.pop("q"), (1, 0, 2))
            if "k" in slots and "v" in slots:
                k, v = (jnp.transpose(slots.pop(name), (1, 0, 2)) for name in ("k", "v"))
                out[f"layers.{layer}.attn.kv_einsum.w"] = jnp.stack([k, v], axis=0)
            if not slots:
                del pending[layer]
        return out

    return preprocess


def torch_tensors(rng, layers=2, kind="llama3", prefix=""):
    def values(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {f"{prefix}model.embed_tokens.weight": values(V, D)}
    for n in range(layers):
        layer = f"{prefix}model.layers.{n}."
        tensors[layer + "self_attn.q_proj.weight"] = values(N * H, D)
        tensors[layer + "self_attn.k_proj.weight"] = values(K * H, D)
        tensors[layer + "self_attn.v_proj.weight"] = values(K * H, D)
        tensors[layer + "self_attn.o_proj.weight"] = values(D, N * H)
        if kind.startswith("gemma"):
            tensors[layer + "post_feedforward_layernorm.weight"] = values(D)
            continue
        tensors[layer + "mlp.down_proj.weight"] = values(D, F)
        if kind == "qwen2":
            tensors[layer + "self_attn.q_proj.bias"] = values(N * H)
        else:
            tensors[layer + "self_attn.q_norm.weight"] = values(H)
        if kind == "qwen3":
            tensors[layer + "mlp.gate.weight"] = values(E, D)
            for e in range(E):
                tensors[layer + f"mlp.experts.{e}.up_proj.weight"] = values(F, D)
    return tensors


def run_loader(mapping, tensors, preprocess=None):
    """What tunix' loader makes of torch tensors, by its own rule."""
    out = {}
    for key, value in tensors.items():
        hits = [(re.sub(p, path, key), t) for p, (path, t) in mapping.items() if re.match(p, key)]
        if len(hits) != 1:
            continue
        permute, reshape = hits[0][1] or (None, None)
        value = value.transpose(permute) if permute else value
        out[hits[0][0]] = jnp.asarray(value.reshape(reshape) if reshape else value)
    return preprocess(out) if preprocess else out


MODELS = {
    "llama3": (llama3, None, "", ("ioo", "iio")),
    "qwen2": (qwen2, None, "", ("ioo", "iio")),
    "qwen3": (qwen3, lambda: stack_experts, "", ("ioo", "iio")),
    "gemma": (gemma, gemma_preprocess, "", ("oio", "iio")),
    "gemma3": (gemma3, gemma_preprocess, "language_model.", ("oio", "iio")),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_mappings_of_tunix_models_give_names_and_layouts(name, tmp_path):
    mapping, make, prefix, (q_word, o_word) = MODELS[name]
    tensors = torch_tensors(np.random.default_rng(0), kind=name, prefix=prefix)
    leaves = run_loader(mapping(), tensors, make() if make else None)
    save_file(tensors, tmp_path / "model.safetensors")
    names = NameMap(mapping(), base=tmp_path, preprocess=make() if make else None)
    assert not names.ambiguous
    assert not names.unmatched
    used = []
    for path, leaf in leaves.items():
        source = names.sources[path]
        used += source.keys
        want = np.stack([tensors[key] for key in source.keys])
        if source.layout is None:
            np.testing.assert_array_equal(np.asarray(leaf).reshape(want.shape), want)
            continue
        np.testing.assert_array_equal(source.layout.unfold(leaf).reshape(want.shape), want)
    assert sorted(used) == sorted(tensors)
    q = "layers.1.attn.q_einsum" if make and "gemma" in name else "layers.1.attn.q_proj"
    assert names(q) == f"{prefix}model.layers.1.self_attn.q_proj"
    assert names.layouts[q].word == q_word
    o = "attn_vec_einsum" if "gemma" in name else "o_proj"
    assert names.layouts[f"layers.0.attn.{o}"].word == o_word
    if "gemma" in name:
        assert names.layouts["layers.0.attn.kv_einsum"].word == "soio"
        kv = [f"{prefix}model.layers.0.self_attn.{n}_proj" for n in "kv"]
        assert list(names("layers.0.attn.kv_einsum")) == kv
    if name == "qwen3":
        assert names.layouts["layers.1.mlp.up_proj"].word == "sio"
        experts = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(E)]
        assert list(names("layers.1.mlp.up_proj")) == experts
    # the tree that the model holds gets the same arrays from load_base
    tree = nested(leaves)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    loaded = interop.load_base(tmp_path, like, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    config = LoHaConfig(r=2, target_modules=r".*\.(q_proj|k_proj|o_proj)")
    adapted = loha_jax.inject(tree, config, key=jax.random.key(0), names=names)
    state = interop.to_peft_state_dict(adapted)
    assert state[f"base_model.model.{prefix}model.layers.1.self_attn.k_proj.hada_w1_a"].shape == (K * H, 2)
    assert state[f"base_model.model.{prefix}model.layers.1.self_attn.o_proj.hada_w1_b"].shape == (2, N * H)


def test_a_mapping_needs_the_names_of_a_checkpoint():
    with pytest.raises(ValueError, match=r"give the checkpoint, or \{name: shape\}, as `base=`"):
        NameMap(llama3())
    down = "model.layers.0.mlp.down_proj"
    names = NameMap(llama3(), base={f"{down}.weight": (D, F), "model.embed_tokens.weight": (7, D)})
    assert names("embedder.input_embedding") == "model.embed_tokens"
    with pytest.raises(UnknownNameError, match=r"layers.0.attn.zzz has no torch name"):
        names("layers.0.attn.zzz")
    tree = {
        "layers": {"0": {"mlp": {"down_proj": {"kernel": jnp.ones((F, D))}, "other": {"kernel": jnp.ones((D, D))}}}}
    }
    config = LoHaConfig(r=2, target_modules=["down_proj"])
    adapted = loha_jax.inject(tree, config, key=jax.random.key(0), names=names)
    assert adapted["layers"]["0"]["mlp"]["down_proj"]["kernel"].names == (down,)
    with pytest.raises(UnknownNameError, match=r"layers.0.mlp.other has no torch name"):
        loha_jax.inject(tree, LoHaConfig(r=2, target_modules=["other"]), key=jax.random.key(0), names=names)


class Bonsai(enum.Enum):
    SCALE = None
    LINEAR = ((1, 0), None, False)
    CONV2D = ((2, 3, 1, 0), None, False)
    ATTN_Q = ((2, 0, 1), (N, H, D), True)
    ATTN_OUT = ((1, 0), (N, H, D), False)
    ATTN_BIAS = (None, (N, H), False)


def test_transforms_of_bonsai_models():
    """jax-bonsai: enum members, reshape first, unescaped dots, anchors."""
    mapping = {
        r"^vit.layer.([0-9]+).q.weight$": (r"layers.\1.q.kernel", Bonsai.ATTN_Q),
        r"^vit.layer.([0-9]+).q.bias$": (r"layers.\1.q.bias", Bonsai.ATTN_BIAS),
        r"^vit.layer.([0-9]+).o.weight$": (r"layers.\1.o.kernel", Bonsai.ATTN_OUT),
        r"^vit.patch.weight$": ("patch.kernel", Bonsai.CONV2D),
        r"^vit.norm.weight$": ("ln.scale", Bonsai.SCALE),
    }
    shapes = {
        "vit.layer.0.q.weight": (N * H, D),
        "vit.layer.0.q.bias": (N * H,),
        "vit.layer.0.o.weight": (D, N * H),
        "vit.patch.weight": (6, 3, 2, 2),
        "vit.norm.weight": (D,),
        "vit.head.weight": (2, D),
    }
    names = NameMap(mapping, base=shapes)
    words = {path: layout.word for path, layout in names.layouts.items()}
    assert words == {"layers.0.q": "ioo", "layers.0.o": "iio", "patch": "kkio"}
    assert names.unused == ("vit.head.weight",)
    assert names.sources["layers.0.q.bias"].axes == ((0, 1),)
    assert names("layers.0.q") == "vit.layer.0.q"
    assert "layers.0.q.kernel" in names.table()
    assert repr(names) == "NameMap(5 leaves, 0 ambiguous, 0 unmatched, 1 unused torch tensors)"


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (((1, 0), (N, D, H)), (N * H, D), "merges axes"),
        (((0, 1, 2), None), (3, 4), "does not take"),
        ((None, (5, 5)), (3, 4), "does not take"),
        (((1, 0), (12,)), (3, 4), "merges axes of the torch tensor in another order"),
    ],
)
def test_transforms_that_no_layout_can_say_are_errors(transform, shape, message, tmp_path):
    names = NameMap({r"a\.weight": ("a.w", transform)}, base={"a.weight": shape})
    assert message in names.unmatched["a.w"]
    with pytest.raises(UnknownNameError, match=message):
        names("a")


def test_forms_that_are_none_are_errors():
    with pytest.raises(ValueError, match=r"is None, \(permute, reshape\)"):
        NameMap({r"a": ("b", (1, 0, 2, 3))}, base={})
    with pytest.raises(ValueError, match="belong to a mapping"):
        NameMap({"a": "b"}, base={})
    many = NameMap({r"a\.(\d)\.weight": ("a.w", None)}, base={"a.0.weight": (2, 2), "a.1.weight": (2, 2)})
    with pytest.raises(UnknownNameError, match=r"the mapping gives it several tensors: a.0.weight, a.1.weight"):
        many("a")
    summed = NameMap(
        {r"a\.(\d)\.weight": (r"a.\1", None)},
        base={"a.0.weight": (2, 3), "a.1.weight": (2, 3)},
        preprocess=lambda t: {"a.w": t["a.0"] + t["a.1"], "b.w": jnp.concatenate([t["a.0"], t["a.1"]])},
    )
    assert set(summed.unmatched) == {"a.w", "b.w"}
    assert "does more with a.0.weight, a.1.weight than permute and stack" in summed.unmatched["a.w"]


def test_functions_and_tables_are_name_maps_too():
    table = NameMap({r"(.*)\.q": r"\1.query"}, layouts={r".*\.q": "oi"})
    tree = {"a": {"q": {"kernel": jnp.ones((3, 4))}}}
    config = LoHaConfig(r=2, target_modules=["query"])
    leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=table)["a"]["q"]["kernel"]
    assert (leaf.names, leaf.layout.word) == (("a.query",), "oi")
    leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=table, layouts={"a.q": "io"})["a"]["q"]["kernel"]
    assert leaf.layout.word == "io"
    assert NameMap(str.upper).then(lambda name: f"model.{name}")("a.q") == "model.A.Q"
    with pytest.raises(ValueError, match=r"names.layouts\['a.q'\] = 'ioo' describes 3 axes"):
        loha_jax.inject(tree, config, key=jax.random.key(0), names=NameMap(table._names, layouts={"a.q": "ioo"}))


def diffusers_rename(key):
    """diffusers 0.39's torch to Flax rule for UNet and VAE names."""
    for part in re.findall(r"\w+[.]\d+", key):
        key = key.replace(part, "_".join(part.split(".")))
    return key


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding.linear_1",
        "conv_in",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.proj_in",
    ],
)
def test_diffusers_names(name):
    assert NameMap.diffusers()(diffusers_rename(name)) == name


def test_diffusers_autoencoders_call_their_attention_otherwise():
    names = NameMap.diffusers()
    for flax, name in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        assert names(f"encoder.mid_block.attentions_0.{flax}") == f"encoder.mid_block.attentions.0.{name}"


# Inference from contents. Each form makes a leaf out of torch weights [out, in, *k] with numpy alone.

LINEAR_FORMS = {
    "io": lambda w, a, b: w.T,
    "oi": lambda w, a, b: w,
    "ioo": lambda w, a, b: w.reshape(a, b, -1).transpose(2, 0, 1),
    "oio": lambda w, a, b: w.reshape(a, b, -1).transpose(0, 2, 1),
    "iio": lambda w, a, b: w.T.reshape(a, b, -1),
    "ioi": lambda w, a, b: w.reshape(-1, a, b).transpose(1, 0, 2),
}
CONV_FORMS = {
    "kkio": lambda w, a, b: w.transpose(2, 3, 1, 0),
    "oikk": lambda w, a, b: w,
    "kio": lambda w, a, b: w[:, :, 0].transpose(2, 1, 0),
}
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


@st.composite
def modules(draw):
    """A leaf and its torch tensors: a kernel of some form, alone or stacked along one or two axes, or a vector."""
    form = draw(st.sampled_from([*LINEAR_FORMS, *CONV_FORMS, "vector", "heads"]))
    a, b, other = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(2, 6))
    if form in ("vector", "heads"):
        shape = (a * b,)
        fold = (lambda w, a, b: w) if form == "vector" else (lambda w, a, b: w.reshape(a, b))
    elif form in LINEAR_FORMS:
        shape = (a * b, other) if form in ("ioo", "oio") else (other, a * b)
        fold = LINEAR_FORMS[form]
    else:
        shape = (other, b, *((1, a) if form == "kio" else (a, draw(st.integers(1, 3)))))
        fold = CONV_FORMS[form]
    stack = draw(st.sampled_from([(), (2,), (3,), (2, 3)]))
    places = [draw(st.integers(0, 5)) for _ in stack]
    bias = draw(st.booleans())
    return form, shape, (lambda w: fold(w, a, b)), stack, places, bias


def build(found, values, file_dtype, leaf_dtype):
    tensors, leaves, truth = {}, {}, {}
    for n, (form, shape, fold, stack, places, bias) in enumerate(found):
        shape = shape[:2] + shape[3:] if form == "kio" else shape
        count = int(np.prod(stack, dtype=int))
        keys = [f"model.m{n}.{k}.weight" for k in range(count)]
        weights = [values(shape).astype(file_dtype) for _ in keys]
        own = [fold(w[:, :, None] if form == "kio" else w) for w in weights]
        leaf = np.stack(own).reshape(*stack, *own[0].shape) if stack else own[0]
        for axis in range(len(stack) - 1, -1, -1):  # each stack axis to some place among the others
            leaf = np.moveaxis(leaf, axis, places[axis] % leaf.ndim if len(stack) == 1 else axis)
        path = f"jax{n}.kernel" if form not in ("vector", "heads") else f"jax{n}.scale"
        leaves[path] = jnp.asarray(leaf.astype(leaf_dtype))
        tensors.update(zip(keys, weights, strict=True))
        truth[path] = keys
        if bias and not stack:
            key = keys[0].replace("weight", "bias")
            tensors[key] = np.zeros(shape[:1], file_dtype)
            leaves[f"jax{n}.bias"] = jnp.zeros(shape[:1], leaf_dtype)
            truth[f"jax{n}.bias"] = [key]
    return tensors, leaves, truth


def rounded(array, *dtypes):
    digits = lambda d: ml_dtypes.finfo(d).nmant  # noqa: E731
    return np.asarray(array).astype(min((np.dtype(d) for d in dtypes), key=digits))


def check_sources(names, leaves, tensors, leaf_dtype, file_dtype):
    """Every source says where its leaf's values are, by its own words and by those of its layout."""
    for path, source in names.sources.items():
        leaf = rounded(leaves[path], leaf_dtype, file_dtype)
        for n, key in enumerate(source.keys):
            want = rounded(tensors[key], leaf_dtype, file_dtype)
            np.testing.assert_array_equal(source.tensor(leaf, n).reshape(want.shape), want)
        if source.layout is not None:
            want = rounded(np.stack([tensors[key] for key in source.keys]), leaf_dtype, file_dtype)
            np.testing.assert_array_equal(np.asarray(source.layout.unfold(leaf)).reshape(want.shape), want)


@pytest.mark.slow
@given(st.lists(modules(), min_size=1, max_size=4), st.sampled_from([*DTYPES]), st.sampled_from([*DTYPES]), st.data())
def test_contents_tell_names_and_layouts(tmp_path_factory, found, file_kind, leaf_kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    file_dtype, leaf_dtype = DTYPES[file_kind], DTYPES[leaf_kind]
    tensors, leaves, truth = build(found, lambda s: rng.standard_normal(s, np.float32), file_dtype, leaf_dtype)
    folder = tmp_path_factory.mktemp("infer")
    tensors = dict(sorted(tensors.items(), key=lambda item: hash(item[0])))
    save_file(tensors, folder / "model.safetensors")
    names = NameMap.infer(nested(leaves), folder)
    check_sources(names, leaves, tensors, leaf_dtype, file_dtype)
    assert not names.unmatched
    assert not names.ambiguous  # random values differ, and a bias of zeros follows its kernel
    for path, keys in truth.items():
        assert names.sources[path].keys == tuple(keys), path


@pytest.mark.slow
@given(st.lists(modules(), min_size=1, max_size=4), st.data())
def test_contents_that_repeat_are_listed_and_never_guessed(tmp_path_factory, found, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    top = data.draw(st.sampled_from([1, 2, 3]))
    tensors, leaves, truth = build(found, lambda s: rng.integers(0, top, s).astype(np.float32), np.float32, np.float32)
    folder = tmp_path_factory.mktemp("repeat")
    save_file(tensors, folder / "model.safetensors")
    names = NameMap.infer(nested(leaves), folder)
    check_sources(names, leaves, tensors, np.float32, np.float32)
    assert not names.unmatched
    for path, keys in truth.items():
        if path in names.ambiguous:
            assert all(any(key in word for word in names.ambiguous[path]) for key in keys)
            module = path.rpartition(".")[0]
            if path.endswith("kernel"):
                with pytest.raises(UnknownNameError, match="do not tell them apart"):
                    names(module)
        else:
            assert names.sources[path].keys == tuple(keys), path


def saved(folder, **tensors):
    save_file({k.replace("__", "."): np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_what_contents_do_not_settle_is_an_error_once_it_is_asked_for(tmp_path):
    zeros, symmetric, good = np.zeros((3, 3), np.float32), random(3, 3), random(3, 4)
    symmetric = symmetric + symmetric.T
    saved(tmp_path, q__weight=zeros, k__weight=zeros, s__weight=symmetric, v__weight=good)
    tree = nested(
        {"q.kernel": zeros, "k.kernel": zeros, "s.kernel": symmetric, "v.kernel": good.T, "x.kernel": good + 1}
    )
    tree = jax.tree.map(jnp.asarray, tree)
    names = NameMap.infer(tree, tmp_path)
    assert set(names.sources) == {"v.kernel"}
    assert set(names.ambiguous["s.kernel"]) == {"s.weight (io)", "s.weight (oi)"}
    assert {"q.weight (io)", "k.weight (io)"} <= set(names.ambiguous["q.kernel"])
    assert "no tensor of the checkpoint" in names.unmatched["x.kernel"]
    for line in ("ambiguous: q.kernel", "unmatched: x.kernel"):
        assert line in names.table()
    key = jax.random.key(0)
    adapted = loha_jax.inject(tree, LoHaConfig(r=2, target_modules=["v"]), key=key, names=names)
    assert adapted["v"]["kernel"].names == ("v",)
    for target, message in {"k": "could be", "s": "could be", "x": "no torch name", "all-linear": "could be"}.items():
        target = target if target == "all-linear" else [target]
        with pytest.raises(UnknownNameError, match=message):
            loha_jax.inject(tree, LoHaConfig(r=2, target_modules=target), key=key, names=names)
    with pytest.raises(ValueError, match=r"s.kernel \[3, 3\]: could be s.weight"):
        interop.load_base(tmp_path, tree, names=names)
    choices = {"q": ("q", "io"), "k": ("k", "oi"), "s.kernel": ("s.weight", "io"), "x": ("x", "oi")}
    settled = names.settle(choices)
    adapted = loha_jax.inject(tree, LoHaConfig(r=2, target_modules=["k", "s", "x"]), key=key, names=settled)
    assert {n: adapted[n]["kernel"].layout.word for n in "ksx"} == {"k": "oi", "s": "io", "x": "oi"}
    assert set(names.sources) == {"v.kernel"}  # the first map is as it was
    for choice, message in [(("v", "io"), "is none of"), ("q", "the layout is one of")]:
        with pytest.raises(ValueError, match=message):
            names.settle({"q": choice})
    with pytest.raises(KeyError, match="is no leaf of this map"):
        names.settle({"zzz": "q"})


def test_given_layouts_come_before_those_of_a_map(tmp_path):
    w = random(4, 4)
    saved(tmp_path, q__weight=w)
    tree = {"q": {"kernel": jnp.asarray(w.T)}}
    names = NameMap.infer(tree, tmp_path)
    config = LoHaConfig(r=2, target_modules=["q"])
    for layouts, word in ((None, "io"), ({"q": "oi"}, "oi")):
        leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=names, layouts=layouts)["q"]["kernel"]
        assert leaf.layout.word == word


def test_tied_copies(tmp_path):
    w, h = random(7, 4), random(7, 4, seed=1)
    saved(tmp_path, embed__weight=w, lm_head__weight=w, other__weight=h)
    tree = jax.tree.map(jnp.asarray, nested({"embed.embedding": w, "a.kernel": h.T, "b.kernel": h}))
    names = NameMap.infer(tree, tmp_path)
    # one leaf, two names: it loads and saves, but an adapter has to say which module it adapts
    assert names.ambiguous == {"embed.embedding": ("embed.weight", "lm_head.weight")}
    assert "embed.weight = lm_head.weight" in names.table()
    with pytest.raises(UnknownNameError, match=r"could be embed.weight, lm_head.weight"):
        names("embed")
    assert names.settle({"embed": "lm_head"})("embed") == "lm_head"
    # two leaves, one name
    assert names("a") == names("b") == "other"
    assert {n: names.layouts[n].word for n in "ab"} == {"a": "io", "b": "oi"}
    jax.tree.map(np.testing.assert_array_equal, interop.load_base(tmp_path, tree, names=names), tree)
    interop.save_merged(tmp_path / "again", tree, names=names, base=tmp_path)
    assert set(interop.load_base(tmp_path / "again", tree, names=names)) == {"embed", "a", "b"}


def test_shapes_have_no_contents(tmp_path):
    saved(tmp_path, q__weight=random(2, 3))
    with pytest.raises(TypeError, match="compares values"):
        NameMap.infer({"q": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}, tmp_path)


def test_an_incomplete_stack_says_which_index_is_missing(tmp_path):
    w = random(3, 4, 5)
    saved(tmp_path, a__weight=w[0].T, b__weight=w[2].T, c__weight=random(5, 4, seed=3))
    names = NameMap.infer({"layers": {"q": {"kernel": jnp.asarray(w)}}}, tmp_path)
    assert names.unmatched == {"layers.q.kernel": "of its stack no tensor holds index 1"}


def test_infer_reads_adapted_trees_and_shards(tmp_path):
    tree = {"q": {"kernel": jnp.asarray(random(6, 8))}, "k": {"kernel": jnp.asarray(random(6, 8, seed=1))}}
    interop.save_merged(tmp_path, tree, max_shard_size=200)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    adapted = loha_jax.inject(tree, LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    names = NameMap.infer(adapted, tmp_path)
    assert {path: source.keys for path, source in names.sources.items()} == {
        "q.kernel": ("q.weight",),
        "k.kernel": ("k.weight",),
    }


def test_fused_kernels_are_unmatched(tmp_path):
    """No layout can say that a leaf holds several tensors, or a part of one."""
    q, k, v, fused = random(4, 6), random(2, 6, seed=1), random(2, 6, seed=2), random(9, 6, seed=3)
    saved(tmp_path, q__weight=q, k__weight=k, v__weight=v, qkv__weight=fused)
    tree = {
        "qkv": {"kernel": jnp.asarray(np.concatenate([q, k, v]).T)},  # JAX holds three torch tensors in one
        "split": {"kernel": jnp.asarray(fused[3:6].T)},  # torch holds three JAX kernels in one
    }
    names = NameMap.infer(tree, tmp_path)
    assert names.sources == {}
    assert {path: reason.split(" in any")[0] for path, reason in names.unmatched.items()} == {
        "qkv.kernel": "no tensor of the checkpoint has its 48 values",
        "split.kernel": "no tensor of the checkpoint has its 18 values",
    }


@pytest.mark.parametrize("known", ["contents", "mapping"])
def test_a_peft_adapter_loads_by_the_names_of_a_map(known, tmp_path):
    """The real PEFT adapts a torch model; a JAX tree of tunix' form gets the adapter, and merges to torch's weights."""
    torch, peft = (pytest.importorskip(name, reason="the main test run has it") for name in ("torch", "peft"))
    tensors = torch_tensors(np.random.default_rng(0))
    save_file(tensors, tmp_path / "model.safetensors")
    tree = nested(run_loader(llama3(), tensors))
    model = torch.nn.Module()
    for key, value in tensors.items():
        if not key.endswith("_proj.weight"):
            continue
        *above, _ = key.split(".")
        node = model
        for part in above[:-1]:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        linear = torch.nn.Linear(*value.shape[::-1], bias=False)
        linear.weight.data = torch.tensor(value)
        node.add_module(above[-1], linear)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    adapted = peft.PeftModel(model, peft.LoHaConfig(r=3, alpha=6, target_modules=targets, init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    want = {k: v.numpy() for k, v in adapted.merge_and_unload().state_dict().items()}
    names = NameMap.infer(tree, tmp_path) if known == "contents" else NameMap(llama3(), base=tmp_path)
    merged = loha_jax.merge(interop.load_peft(tmp_path / "adapter", tree, names=names))
    changed = 0
    for path, leaf in run_loader(llama3(), want).items():
        got = merged
        for part in path.split("."):
            got = got[part]
        np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-5 * np.abs(leaf).max())
        changed += not np.array_equal(got, run_loader(llama3(), tensors)[path])
    assert changed == 2 * len(targets)
