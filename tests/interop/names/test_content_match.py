import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch_names import llama3, nested, run_loader, torch_tensors

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop import NameMap
from loha_jax.targets.module_names import UnknownNameError

# Inference from contents. Each form makes a leaf out of torch weights [out, in, *k] with numpy
# alone.

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
    """A leaf and its torch tensors.

    A kernel of some form, alone or stacked along one or two axes, or a vector.
    """
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
    def digits(d):
        return ml_dtypes.finfo(d).nmant

    return np.asarray(array).astype(min((np.dtype(d) for d in dtypes), key=digits))


def check_sources(names, leaves, tensors, leaf_dtype, file_dtype):
    """Check where every source says that its leaf's values are.

    Its own words and those of its layout have to agree.
    """
    for path, source in names.sources.items():
        leaf = rounded(leaves[path], leaf_dtype, file_dtype)
        for n, key in enumerate(source.keys):
            want = rounded(tensors[key], leaf_dtype, file_dtype)
            np.testing.assert_array_equal(source.tensor(leaf, n).reshape(want.shape), want)
        if source.layout is not None:
            want = rounded(np.stack([tensors[key] for key in source.keys]), leaf_dtype, file_dtype)
            np.testing.assert_array_equal(
                np.asarray(source.layout.unfold(leaf)).reshape(want.shape), want
            )


@pytest.mark.slow
@given(
    st.lists(modules(), min_size=1, max_size=4),
    st.sampled_from([*DTYPES]),
    st.sampled_from([*DTYPES]),
    st.data(),
)
def test_contents_tell_names_and_layouts(tmp_path_factory, found, file_kind, leaf_kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    file_dtype, leaf_dtype = DTYPES[file_kind], DTYPES[leaf_kind]
    tensors, leaves, truth = build(
        found, lambda s: rng.standard_normal(s, np.float32), file_dtype, leaf_dtype
    )
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
    tensors, leaves, truth = build(
        found, lambda s: rng.integers(0, top, s).astype(np.float32), np.float32, np.float32
    )
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
    save_file(
        {k.replace("__", "."): np.ascontiguousarray(v) for k, v in tensors.items()},
        folder / "model.safetensors",
    )


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_what_contents_do_not_settle(tmp_path):
    """An ambiguity of contents is an error once it matters."""
    zeros, symmetric, good = np.zeros((3, 3), np.float32), random(3, 3), random(3, 4)
    symmetric = symmetric + symmetric.T
    saved(tmp_path, q__weight=zeros, k__weight=zeros, s__weight=symmetric, v__weight=good)
    tree = nested(
        {
            "q.kernel": zeros,
            "k.kernel": zeros,
            "s.kernel": symmetric,
            "v.kernel": good.T,
            "x.kernel": good + 1,
        }
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
    for target, message in {
        "k": "could be",
        "s": "could be",
        "x": "no torch name",
        "all-linear": "could be",
    }.items():
        target = target if target == "all-linear" else [target]
        with pytest.raises(UnknownNameError, match=message):
            loha_jax.inject(tree, LoHaConfig(r=2, target_modules=target), key=key, names=names)
    with pytest.raises(ValueError, match=r"s.kernel \[3, 3\]: could be s.weight"):
        interop.load_base(tmp_path, tree, names=names)
    choices = {"q": ("q", "io"), "k": ("k", "oi"), "s.kernel": ("s.weight", "io"), "x": ("x", "oi")}
    settled = names.settle(choices)
    adapted = loha_jax.inject(
        tree, LoHaConfig(r=2, target_modules=["k", "s", "x"]), key=key, names=settled
    )
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
        leaf = loha_jax.inject(tree, config, key=jax.random.key(0), names=names, layouts=layouts)[
            "q"
        ]["kernel"]
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
    jax.tree.map(
        np.testing.assert_array_equal, interop.load_base(tmp_path, tree, names=names), tree
    )
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
    tree = {
        "q": {"kernel": jnp.asarray(random(6, 8))},
        "k": {"kernel": jnp.asarray(random(6, 8, seed=1))},
    }
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
        "qkv": {
            "kernel": jnp.asarray(np.concatenate([q, k, v]).T)
        },  # JAX holds three torch tensors in one
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
    """The real PEFT adapts a torch model.

    A JAX tree of tunix' form gets the adapter, and merges to torch's weights.
    """
    torch, peft = (
        pytest.importorskip(name, reason="the main test run has it") for name in ("torch", "peft")
    )
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
    adapted = peft.PeftModel(
        model, peft.LoHaConfig(r=3, alpha=6, target_modules=targets, init_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    want = {k: v.numpy() for k, v in adapted.merge_and_unload().state_dict().items()}
    names = (
        NameMap.infer(tree, tmp_path) if known == "contents" else NameMap(llama3(), base=tmp_path)
    )
    merged = loha_jax.merge(interop.load_peft(tmp_path / "adapter", tree, names=names))
    changed = 0
    for path, leaf in run_loader(llama3(), want).items():
        got = merged
        for part in path.split("."):
            got = got[part]
        np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-5 * np.abs(leaf).max())
        changed += not np.array_equal(got, run_loader(llama3(), tensors)[path])
    assert changed == 2 * len(targets)
