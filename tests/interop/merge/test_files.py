"""Merging checkpoints file by file.

Values against float64, layout against the base, and runs that are cut off.
"""

import json

import lycoris_samples
import ml_dtypes
import numpy as np
import pytest
from merge_inputs import (
    BF16,
    delta,
    files_in,
    loha,
    normal,
    read_all,
    sharded_base,
    write_adapter,
    write_base,
)
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file

from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.interop.merge.files import merge_checkpoint


def lora(out, in_, r=3):
    return {"lora_A.weight": normal(r, in_), "lora_B.weight": normal(out, r)}


@pytest.mark.parametrize("name", NAMES)
def test_peft_samples(name, tmp_path):
    sample = Sample(name)
    path = sample.folder / "base.safetensors"
    report = merge_checkpoint(path, [(sample.adapter, 1.0)], tmp_path / "out")
    merged, base = load_file(tmp_path / "out" / "base.safetensors"), load_file(path)
    changed = {key.split("::")[1] for key in sample.io if key.startswith("merged_weight::")}
    for module in changed:
        theirs = sample.io[f"merged_weight::{module}"]
        np.testing.assert_allclose(
            merged[f"{module}.weight"].astype(np.float32),
            theirs,
            rtol=0,
            atol=1e-6 * np.abs(theirs).max(),
        )
    saved = {
        key: value
        for key, value in read_adapter(sample.adapter).others.items()
        if ".base_layer." not in key
    }
    for key, value in saved.items():
        np.testing.assert_array_equal(merged[key], value.astype(base[key].dtype))
    for key in base.keys() - {f"{module}.weight" for module in changed} - saved.keys():
        assert merged[key].tobytes() == base[key].tobytes()
    assert report.merged == len(changed)
    old, new = (Checkpoint(p) for p in (path, tmp_path / "out" / "base.safetensors"))
    assert old.header(path).data == new.header(new.files[0]).data


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("form", ["plain", "tucker", "scalar", "dora", "dora_in"])
def test_lycoris_samples(form, weight, tmp_path):
    """Linear, conv 1d to 3d, grouped, cores, and both kinds of weight decomposition.

    The reference is LyCORIS' own ΔW.
    """
    path, _ = lycoris_samples.native(form)
    base_path = lycoris_samples.DATA / "base_tiny.safetensors"
    merge_checkpoint(base_path, [(path, weight)], tmp_path / "out")
    merged, base = load_file(tmp_path / "out" / base_path.name), load_file(base_path)
    deltas = load_file(lycoris_samples.DATA / f"native_{form}_delta.safetensors")
    assert len(deltas) == len(lycoris_samples.LAYERS)
    for module in lycoris_samples.LAYERS:
        key, change = f"{module}.weight", deltas[f"lycoris_{module.replace('.', '_')}.delta"]
        wanted = base[key].astype(np.float64) + weight * change
        np.testing.assert_allclose(merged[key], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BF16, np.float64, np.dtype(ml_dtypes.float8_e4m3fn)]
)
@pytest.mark.parametrize("to", [None, np.float32, BF16])
def test_dtypes_are_rounded_once(dtype, to, tmp_path):
    dtype = np.dtype(dtype)
    base = {
        "q.weight": normal(40, 30, dtype=dtype),
        "bias": normal(40, dtype=dtype),
        "n": np.arange(3),
    }
    path = write_base(tmp_path / "base", base)
    factors = loha(40, 30)
    adapter = write_adapter(tmp_path / "adapter", {"q": factors}, alpha=0.3)
    merge_checkpoint(path, [(adapter, 0.7)], tmp_path / "out", dtype=to)
    merged = read_all(tmp_path / "out")
    target = dtype if to is None else np.dtype(to)
    assert {key: value.dtype for key, value in merged.items()} == {
        "q.weight": target,
        "bias": target,
        "n": np.int64,
    }
    exact = base["q.weight"].astype(np.float64) + 0.7 * delta(factors, 0.1)
    rounded = exact.astype(np.float32 if target.itemsize < 8 else np.float64).astype(target)
    unit = np.abs(
        np.nextafter(rounded, np.array(ml_dtypes.finfo(target).max, target)).astype(np.float64)
        - rounded.astype(np.float64)
    )
    # float32 itself rounds a few times on the way; a narrower dtype hides that but for values
    # halfway between two.
    slack = 4 if target.itemsize >= 4 else 1
    precision = 1e-6 if target != np.float64 else 1e-12
    assert np.all(
        np.abs(merged["q.weight"].astype(np.float64) - rounded.astype(np.float64))
        <= slack * unit + precision
    )
    if target.itemsize < 4:
        assert np.mean(merged["q.weight"].view(np.uint8) == rounded.view(np.uint8)) > 0.99
    np.testing.assert_array_equal(merged["bias"], base["bias"].astype(target))
    np.testing.assert_array_equal(merged["n"], base["n"])


def test_several_adapters_of_both_kinds(tmp_path):
    base = {"a.q.weight": normal(20, 12), "a.k.weight": normal(12, 12)}
    path = write_base(tmp_path / "base", base)
    first, second = {"a.q": loha(20, 12), "a.k": loha(12, 12)}, {"a.q": lora(20, 12, r=2)}
    adapters = [
        (write_adapter(tmp_path / "first", first), 0.8),
        (write_adapter(tmp_path / "second", second, alpha=3), -0.5),
        (tmp_path / "first", 0.1),
    ]
    merge_checkpoint(path, adapters, tmp_path / "out")
    merged = read_all(tmp_path / "out")
    q = base["a.q.weight"] + 0.9 * delta(first["a.q"], 2) - 0.5 * delta(second["a.q"], 1.5)
    np.testing.assert_allclose(merged["a.q.weight"], q, rtol=0, atol=1e-5 * np.abs(q).max())
    k = base["a.k.weight"] + 0.9 * delta(first["a.k"], 2)
    np.testing.assert_allclose(merged["a.k.weight"], k, rtol=0, atol=1e-5 * np.abs(k).max())


def test_dora_of_peft_and_two_decompositions(tmp_path):
    base = {"q.weight": normal(20, 12)}
    path = write_base(tmp_path / "base", base)
    factors, norms = [lora(20, 12), lora(20, 12)], [np.abs(normal(20)) + 1 for _ in range(2)]
    for n in range(2):
        parts = {**factors[n], "lora_magnitude_vector": norms[n]}
        write_adapter(tmp_path / f"a{n}", {"q": parts}, use_dora=True)
    merge_checkpoint(path, [(tmp_path / "a0", 1.0), (tmp_path / "a1", 0.25)], tmp_path / "out")
    w = base["q.weight"].astype(np.float64)
    wanted = w.copy()
    for n, weight in enumerate((1.0, 0.25)):
        v = w + delta(factors[n], 2)
        wanted += weight * (norms[n][:, None] / np.linalg.norm(v, axis=1, keepdims=True) * v - w)
    np.testing.assert_allclose(
        read_all(tmp_path / "out")["q.weight"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("square_is_turned", [True, False])
def test_gpt2_weights_are_in_out(square_is_turned, tmp_path):
    """A square weight goes by the others of its name, or by the config."""
    shapes = {"h.0.attn.c_attn": (12, 36), "h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (12, 48)}
    modules = {name: loha(shape[1], shape[0]) for name, shape in shapes.items()}
    base = {
        f"{name}.weight": normal(*(shape if square_is_turned else shape[::-1]))
        for name, shape in shapes.items()
    }
    path = write_base(tmp_path / "base", base)
    merge_checkpoint(path, [(write_adapter(tmp_path / "adapter", modules), 1.0)], tmp_path / "out")
    for key, value in read_all(tmp_path / "out").items():
        change = delta(modules[key.removesuffix(".weight")], 2)
        wanted = base[key] + (change.T if square_is_turned else change)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_square_gpt2_weight_alone_goes_by_the_config(tmp_path):
    modules = {"h.0.attn.c_proj": loha(12, 12)}
    base = {"h.0.attn.c_proj.weight": normal(12, 12)}
    path = write_base(tmp_path / "base", base, config={"model_type": "gpt2"})
    merge_checkpoint(path, [(write_adapter(tmp_path / "adapter", modules), 1.0)], tmp_path / "out")
    wanted = base["h.0.attn.c_proj.weight"] + delta(modules["h.0.attn.c_proj"], 2).T
    merged = read_all(tmp_path / "out")["h.0.attn.c_proj.weight"]
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_shards_index_order_and_side_files_are_the_bases(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in (0, 3)}
    report = merge_checkpoint(
        path, [(write_adapter(tmp_path / "adapter", modules), 1.0)], tmp_path / "out"
    )
    out = tmp_path / "out"
    assert files_in(out) == sorted(set(files_in(path)) - {"weights.bin"})
    assert len(report.files) > 3
    index = "model.safetensors.index.json"
    assert (out / index).read_text() == (path / index).read_text()
    for name in (*report.files, "config.json", "tokenizer.json"):
        assert (out / name).stat().st_size == (path / name).stat().st_size
        header = (
            int.from_bytes((path / name).read_bytes()[:8], "little") if name in report.files else 0
        )
        assert (out / name).read_bytes()[: 8 + header] == (path / name).read_bytes()[: 8 + header]
    assert report.merged == 2
    assert report.copied == len(base) - 2
    assert files_in(tmp_path) == ["adapter", "base", "out"]


def test_a_new_dtype_changes_headers_index_and_config(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {"model.layers.1.q": loha(64, 48)}
    merge_checkpoint(
        path, [(write_adapter(tmp_path / "a", modules), 1.0)], tmp_path / "out", dtype=np.float32
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "vocab_size": 7,
    }
    merged = read_all(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.values())
    for key in base.keys() - {"model.layers.1.q.weight"}:
        np.testing.assert_array_equal(merged[key], base[key].astype(merged[key].dtype))
    assert Checkpoint(tmp_path / "out").header(
        tmp_path / "out" / "model-00001-of-00004.safetensors"
    ).metadata == {
        "format": "pt",
        "note": "kept",
    }


def test_files_beside_a_single_file_stay_where_they_are(tmp_path):
    save_file({"q.weight": normal(6, 4)}, tmp_path / "some.safetensors")
    (tmp_path / "private.txt").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", {"q": loha(6, 4)})
    merge_checkpoint(tmp_path / "some.safetensors", [(adapter, 1.0)], tmp_path / "out")
    assert files_in(tmp_path / "out") == ["some.safetensors"]
