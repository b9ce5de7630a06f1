"""`NameMap(rows=...)`: all that reads or writes through a map applies it, or refuses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merge_inputs import read_all
from quantised_bases import E4M3, FORMS, SHAPE, quantised, write
from safetensors.numpy import load_file, save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop import NameMap, RowTransform

RNG = np.random.default_rng(0)
ROWS = RowTransform([1, 0], scale=2)
CONFIG = LoHaConfig(r=2, target_modules=["query"], init_weights=False)
KEY = jax.random.key(0)


def params():
    return {
        "query": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)},
        "value": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)},
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plain tree's files of each format, by their readers and writers."""
    folder = tmp_path_factory.mktemp("files")
    tree = loha_jax.inject(params(), CONFIG, key=KEY)
    interop.save_peft(folder / "peft", tree)
    interop.save_lora(folder / "lora", tree)
    interop.save_lycoris(folder / "lycoris.safetensors", tree)
    interop.save_merged(folder / "base", params())
    return folder


PLACES = {
    "inject": lambda f, p, names: loha_jax.inject(p, CONFIG, key=KEY, names=names),
    "load_peft": lambda f, p, names: interop.load_peft(f / "peft", p, names=names),
    "load_lora": lambda f, p, names: interop.load_lora(f / "lora", p, names=names),
    "load_lycoris": lambda f, p, names: interop.load_lycoris(
        f / "lycoris.safetensors", p, names=names
    ),
    "load_base": lambda f, p, names: interop.load_base(f / "base", p, names=names),
    "save_merged": lambda f, p, names: interop.save_merged(f / "never", p, names=names),
}

MORE = {
    "to_lora": lambda f, p, names: interop.to_lora(
        loha_jax.inject(p, CONFIG, key=KEY), names=names
    ),
    "infer": lambda f, p, names: NameMap.infer(p, f / "base", rows=names.rows),
}


@pytest.mark.parametrize("place", [*PLACES, *MORE])
def test_a_transform_for_no_module_is_an_error(place, files):
    message = r"transforms of rows for '.*quary', which match no module.*nearest.*'query'"
    rows = {"value": ROWS, ".*quary": ROWS}
    with pytest.raises(ValueError, match=message):
        {**PLACES, **MORE}[place](files, params(), NameMap(rows=rows))
    assert not (files / "never").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_transform_of_another_size_is_an_error(place, files):
    names = NameMap(rows={"query": RowTransform([2, 0, 1])})
    with pytest.raises(ValueError, match=r"query.*blocks of 3 rows, and it has 8.*of one head"):
        PLACES[place](files, params(), names)
    assert not (files / "never").exists()


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_keeps_its_transform(place, files):
    """A second map may not give it another one, nor `save_merged` miss it."""
    own = NameMap(rows={"query": ROWS})
    with_rows = loha_jax.inject(params(), CONFIG, key=KEY, names=own, adapter_name="own")
    plain = loha_jax.inject(params(), CONFIG, key=KEY, adapter_name="own")
    if place == "load_base":
        return  # which takes no adapted tree
    with pytest.raises(ValueError, match=r"made without one.*the same name map"):
        PLACES[place](files, plain, own)
    other = NameMap(rows={"query": ROWS.unscaled})
    with pytest.raises(ValueError, match=r"scale=1\), and its adapter was made with .*scale=2\)"):
        PLACES[place](files, with_rows, other)
    if place == "save_merged":
        for names in (None, NameMap(), {"query": "query"}):
            with pytest.raises(ValueError, match="the name map that `inject` or the loader took"):
                PLACES[place](files, with_rows, names)
        assert not (files / "never").exists()
        return
    more = PLACES[place](files, with_rows, None)
    assert more["query"]["kernel"].rows == ROWS
    assert len(more["query"]["kernel"].adapters) == 2


def test_a_transform_ends_where_heads_do(tmp_path):
    """The axes of a kernel say how large a head is."""
    names = NameMap(layouts={"q": "ioo"}, rows={"q": RowTransform.rotary(4)})
    tree = {"q": {"kernel": jnp.ones((6, 2, 8)), "bias": jnp.ones((2, 8))}}
    config = LoHaConfig(r=2, target_modules=["q"])
    with pytest.raises(ValueError, match=r"q\.kernel.*blocks of 4 rows, and it has 16 = 2 x 8"):
        loha_jax.inject(tree, config, key=KEY, names=names)
    with pytest.raises(ValueError, match=r"q\.bias .*blocks of 4 rows, and it has 16 = 2 x 8"):
        interop.save_merged(tmp_path / "never", tree, names=names)


def test_what_is_no_transform():
    with pytest.raises(TypeError, match=r"rows\['q'\] is a RowTransform, got \[1, 0\]"):
        NameMap(rows={"q": [1, 0]})
    tree = {"norm": {"scale": jnp.ones(4), "mean": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"norm\.mean, a buffer"):
        interop.save_merged("never", tree, names=NameMap(rows={"norm": ROWS}))


def test_a_mapping_of_torchs_names_takes_transforms(tmp_path):
    """The axes are the mapping's, and the rows those of the torch tensor."""
    weight = RNG.normal(size=(8, 6)).astype(np.float32)
    save_file({"l.0.q.weight": weight}, tmp_path / "model.safetensors")
    names = NameMap(
        {r"l\.(\d)\.q\.weight": (r"layers.\1.q.w", ((1, 0), (6, 2, 4)))},
        base=tmp_path,
        rows={r"layers\.\d\.q": RowTransform.rotary(4, 2)},
    ).then({"(.*)": r"\1"})
    like = {"layers": [{"q": {"w": jax.ShapeDtypeStruct((6, 2, 4), jnp.float32)}}]}
    leaf = interop.load_base(tmp_path, like, names=names)["layers"][0]["q"]["w"]
    pairs = np.stack([weight.reshape(2, 4, 6)[:, :2], weight.reshape(2, 4, 6)[:, 2:]], 2)
    np.testing.assert_array_equal(leaf, pairs.reshape(2, 4, 6).transpose(2, 0, 1) / 2)
    interop.save_merged(tmp_path / "out", {"layers": [{"q": {"w": leaf}}]}, names=names)
    out = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(out["l.0.q.weight"], weight)
    source = names.source("layers.0.q.w")
    assert source.rows == names.sources["layers.0.q.w"].rows == RowTransform.rotary(4, 2)
    np.testing.assert_array_equal(source.tensor(np.asarray(leaf)), weight)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_names_are_inferred_with_transforms_applied(dtype, tmp_path):
    """Heads, stacks, and biases; a power of two is found bit for bit."""
    rows = RowTransform.rotary(4, 8)
    q = RNG.normal(size=(3, 8, 6)).astype(np.float32)
    bias = RNG.normal(size=(3, 8)).astype(np.float32)
    tensors = {f"l.{n}.q.weight": q[n] for n in range(3)}
    save_file(tensors | {f"l.{n}.q.bias": bias[n] for n in range(3)}, tmp_path / "m.safetensors")
    kernel = np.stack([rows.from_torch(x) for x in q]).transpose(2, 0, 1).reshape(6, 3, 2, 4)
    moved = np.stack([rows.from_torch(x) for x in bias]).reshape(3, 2, 4)
    tree = {"layers": {"q": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(moved)}}}
    names = NameMap.infer(tree, tmp_path, rows={"layers.q": rows})
    assert not names.unmatched
    assert not names.ambiguous
    assert names.layouts["layers.q"].word == "isoo"
    assert "rows: layers.q: RowTransform((0, 2, 1, 3), scale=8)" in names.table()
    again = interop.load_base(tmp_path, tree, names=names)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    plain = NameMap.infer(tree, tmp_path)
    assert {*plain.unmatched} == {"layers.q.kernel", "layers.q.bias"}
    wrong = NameMap.infer(tree, tmp_path, rows={"layers.q": RowTransform([2, 1, 0])})
    assert "with RowTransform((2, 1, 0), scale=1)" in wrong.unmatched["layers.q.kernel"]


def test_a_stack_of_norms_without_a_base_is_an_error(tmp_path):
    """Only the base says which axis is that of the stack; no name with {} is written."""
    tree, names = (
        {"layers": {"norm": {"scale": jnp.arange(10.0).reshape(5, 2)}}},
        {r"layers\.norm": "l.{}.norm"},
    )
    with pytest.raises(ValueError, match=r"l\.\{\}\.norm\.weight has a place for the index"):
        interop.save_merged(tmp_path / "out", tree, names=names)
    norms = {f"l.{n}.norm.weight": np.zeros(5, np.float32) for n in range(2)}
    save_file(norms, tmp_path / "base.safetensors")
    interop.save_merged(tmp_path / "out", tree, names=names, base=tmp_path / "base.safetensors")
    out = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(out["l.1.norm.weight"], [1, 3, 5, 7, 9])


@pytest.mark.parametrize("form", ["tensor", "row", "blocks"])
def test_scaled_float8_has_torchs_rows(form, tmp_path):
    """It is multiplied by its scales first; a tree with the stored values is refused."""
    tensors, weight, _, config = quantised(form)
    base = write(tmp_path / "base", tensors, config)
    names, rows = NameMap(rows={"q": ROWS}), ROWS
    like = {"q": {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], jnp.float32)}}
    tree = interop.load_base(base, like, names=names)
    np.testing.assert_array_equal(tree["q"]["kernel"], rows.from_torch(weight).T)
    interop.save_merged(tmp_path / "same", tree, names=names, base=base)
    same = read_all(tmp_path / "same")
    assert all(same[key].tobytes() == tensors[key].tobytes() for key in tensors)
    name, shape, _, _ = FORMS[form]
    stored = {"kernel": jax.ShapeDtypeStruct(SHAPE[::-1], E4M3)}
    stored[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=r"q\.weight is float8 as stored.*tree without the scale"):
        interop.load_base(base, {"q": stored}, names=names)
    held = {"kernel": jnp.zeros(SHAPE[::-1], E4M3), name: jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"q\.weight is float8 as stored.*tree without the scale"):
        interop.save_merged(tmp_path / "never", {"q": held}, names=names, base=base)
