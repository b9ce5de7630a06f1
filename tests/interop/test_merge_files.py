"""Merging checkpoints file by file: values against float64, layout against the base, and runs that are cut off."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import lycoris_samples
import ml_dtypes
import numpy as np
import pytest
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.disk.checkpoint_writer import CheckpointWriter
from loha_jax.interop.disk.tensor_files import FileError, safetensors_bytes
from loha_jax.interop.formats.adapter_file import AdapterModule
from loha_jax.interop.formats.module_lookup import ModuleLookup
from loha_jax.interop.formats.read_adapter import read_adapter
from loha_jax.interop.merge import files as merge_files
from loha_jax.interop.merge import shard as merge_shard
from loha_jax.interop.merge.files import merge_checkpoint
from loha_jax.interop.updates.low_rank_update import LowRankUpdate
from loha_jax.interop.updates.norms import difference_norm, update_norm
from peft_samples import NAMES, Sample
from safetensors.numpy import load_file, save_file

from loha_jax import LoHaConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
RANDOM = np.random.default_rng(7)


def normal(*shape, dtype=np.float32, scale=1.0):
    return (scale * RANDOM.standard_normal(shape)).astype(dtype)


def loha(out, in_, r=3, dtype=np.float32):
    a, b = [normal(out, r, dtype=dtype) for _ in range(2)], [normal(r, in_, dtype=dtype) for _ in range(2)]
    return {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1]}


def lora(out, in_, r=3):
    return {"lora_A.weight": normal(r, in_), "lora_B.weight": normal(out, r)}


def delta(tensors, scale):
    """ΔW in float64."""
    t = {key: value.astype(np.float64) for key, value in tensors.items()}
    if "lora_A.weight" in t:
        return scale * (t["lora_B.weight"] @ t["lora_A.weight"])
    return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def write_adapter(folder, modules, alpha=6, others=None, **config):
    """A PEFT folder of modules with one rank."""
    folder.mkdir()
    state = {f"base_model.model.{name}.{part}": t for name, parts in modules.items() for part, t in parts.items()}
    state |= {f"base_model.model.{key}": value for key, value in (others or {}).items()}
    parts = next(iter(modules.values()))
    if "lora_A.weight" in parts:
        r = len(parts["lora_A.weight"])
        text = json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(modules), **config})
    else:
        text = LoHaConfig(r=len(parts["hada_w1_b"]), alpha=alpha, target_modules=list(modules), **config).to_json()
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))
    return folder


def write_base(folder, tensors, shard_size=1 << 30, config=None):
    folder.mkdir()
    described = [(key, value.dtype, value.shape) for key, value in tensors.items()]
    with CheckpointWriter(folder, described, shard_size, metadata={"format": "pt", "note": "kept"}) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
        writer.commit()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_all(path):
    checkpoint = Checkpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint.shapes}


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


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
            merged[f"{module}.weight"].astype(np.float32), theirs, rtol=0, atol=1e-6 * np.abs(theirs).max()
        )
    saved = {key: value for key, value in read_adapter(sample.adapter).others.items() if ".base_layer." not in key}
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
    """Linear, conv 1d to 3d, grouped, cores, and weight decompositions of both kinds, against LyCORIS' own ΔW."""
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


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64, np.dtype(ml_dtypes.float8_e4m3fn)])
@pytest.mark.parametrize("to", [None, np.float32, BF16])
def test_dtypes_are_rounded_once(dtype, to, tmp_path):
    dtype = np.dtype(dtype)
    base = {"q.weight": normal(40, 30, dtype=dtype), "bias": normal(40, dtype=dtype), "n": np.arange(3)}
    path = write_base(tmp_path / "base", base)
    factors = loha(40, 30)
    adapter = write_adapter(tmp_path / "adapter", {"q": factors}, alpha=0.3)
    merge_checkpoint(path, [(adapter, 0.7)], tmp_path / "out", dtype=to)
    merged = read_all(tmp_path / "out")
    target = dtype if to is None else np.dtype(to)
    assert {key: value.dtype for key, value in merged.items()} == {"q.weight": target, "bias": target, "n": np.int64}
    exact = base["q.weight"].astype(np.float64) + 0.7 * delta(factors, 0.1)
    rounded = exact.astype(np.float32 if target.itemsize < 8 else np.float64).astype(target)
    unit = np.abs(
        np.nextafter(rounded, np.array(ml_dtypes.finfo(target).max, target)).astype(np.float64)
        - rounded.astype(np.float64)
    )
    # float32 itself rounds a few times on the way; a narrower dtype hides that but for values halfway between two.
    slack = 4 if target.itemsize >= 4 else 1
    precision = 1e-6 if target != np.float64 else 1e-12
    assert np.all(
        np.abs(merged["q.weight"].astype(np.float64) - rounded.astype(np.float64)) <= slack * unit + precision
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
    np.testing.assert_allclose(read_all(tmp_path / "out")["q.weight"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("square_is_turned", [True, False])
def test_gpt2_weights_are_in_out(square_is_turned, tmp_path):
    """A square weight goes by the others of its name, or by the config."""
    shapes = {"h.0.attn.c_attn": (12, 36), "h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (12, 48)}
    modules = {name: loha(shape[1], shape[0]) for name, shape in shapes.items()}
    base = {f"{name}.weight": normal(*(shape if square_is_turned else shape[::-1])) for name, shape in shapes.items()}
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


def sharded_base(tmp_path, dtype=BF16):
    base = {f"model.layers.{n}.q.weight": normal(64, 48, dtype=dtype) for n in range(4)}
    base |= {"model.norm.weight": normal(48, dtype=dtype), "model.ids": np.arange(5)}
    path = write_base(tmp_path / "base", base, 64 * 48 * 2 + 200, config={"torch_dtype": "bfloat16", "vocab_size": 7})
    (path / "tokenizer.json").write_text("{}")
    for name in ("id_rsa", "train.py", "data.csv", ".env"):  # a folder may hold anything
        (path / name).write_text("private")
    (path / "weights.bin").write_bytes(b"not a side file")
    return base, path


def test_shards_index_order_and_side_files_are_the_bases(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in (0, 3)}
    report = merge_checkpoint(path, [(write_adapter(tmp_path / "adapter", modules), 1.0)], tmp_path / "out")
    out = tmp_path / "out"
    assert files_in(out) == sorted(set(files_in(path)) - {"weights.bin", "id_rsa", "train.py", "data.csv", ".env"})
    assert len(report.files) > 3
    index = "model.safetensors.index.json"
    assert (out / index).read_text() == (path / index).read_text()
    for name in (*report.files, "config.json", "tokenizer.json"):
        assert (out / name).stat().st_size == (path / name).stat().st_size
        header = int.from_bytes((path / name).read_bytes()[:8], "little") if name in report.files else 0
        assert (out / name).read_bytes()[: 8 + header] == (path / name).read_bytes()[: 8 + header]
    assert report.merged == 2
    assert report.copied == len(base) - 2
    assert files_in(tmp_path) == ["adapter", "base", "out"]


def test_a_new_dtype_changes_headers_index_and_config(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {"model.layers.1.q": loha(64, 48)}
    merge_checkpoint(path, [(write_adapter(tmp_path / "a", modules), 1.0)], tmp_path / "out", dtype=np.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32", "vocab_size": 7}
    merged = read_all(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.values())
    for key in base.keys() - {"model.layers.1.q.weight"}:
        np.testing.assert_array_equal(merged[key], base[key].astype(merged[key].dtype))
    assert Checkpoint(tmp_path / "out").header(tmp_path / "out" / "model-00001-of-00004.safetensors").metadata == {
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


@pytest.mark.parametrize(
    ("names", "modules", "found"),
    [
        (["model.a.q", "model.a.k", "head"], ["a.q", "a.k"], "model.a.q"),
        (["a.q", "a.k"], ["base_model.model.a.q", "base_model.model.a.k"], "a.q"),
        (["transformer.a.q", "a.z"], ["a.q"], "transformer.a.q"),
        (["a.q", "model.a.q"], ["a.q"], "a.q"),  # a name as it is comes first
        (["b.q"], ["a.q"], None),
        (["x.a.q", "x.a.k", "y.a.q"], ["a.q", "a.k"], "x.a.q"),  # only one has both
    ],
)
def test_a_prefix_may_be_absent(names, modules, found):
    lookup = ModuleLookup(names, [AdapterModule(name, "loha", 1, 1.0, {}) for name in modules])
    assert lookup.find(modules[0], "") == (found or modules[0])
    assert bool(lookup.notes) == (found not in (None, modules[0]))


def test_two_prefixes_that_would_do_are_an_error():
    with pytest.raises(ValueError, match=r"'decoder\.' or 'encoder\.'"):
        ModuleLookup(["encoder.a.q", "decoder.a.q"], [AdapterModule("a.q", "loha", 1, 1.0, {})])


def test_an_underscored_name_finds_a_prefixed_module():
    lookup = ModuleLookup(["model.a.q_proj"], [AdapterModule("a_q_proj", "loha", 1, 1.0, {}, prefix="lycoris_")])
    assert lookup.find("a_q_proj", "lycoris_") == "model.a.q_proj"


def refused(tmp_path, base, modules, match, config=None, error=ValueError, others=None, **options):
    path = write_base(tmp_path / "base", base, config=config)
    adapter = write_adapter(tmp_path / "adapter", modules, others=others)
    with pytest.raises(error, match=match):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", **options)
    assert files_in(tmp_path) == ["adapter", "base"]


def test_all_missing_and_misshapen_tensors_are_named_before_anything_is_written(tmp_path):
    base = {"a.weight": normal(6, 4), "b.weight": normal(6, 5), "c.weight": np.ones((6, 4), np.int8)}
    modules = {name: loha(6, 4) for name in ("a", "b", "c", "x.y", "z")}
    refused(
        tmp_path,
        base,
        modules,
        r"(?s)does not have \(2\): x\.y\.weight; z\.weight.*b\.weight is \[6, 5\].*c\.weight holds int8",
    )


def test_a_tied_head_is_said_so(tmp_path):
    base = {"model.embed_tokens.weight": normal(9, 4)}
    refused(tmp_path, base, {"lm_head": loha(9, 4)}, r"tied: the base has model\.embed_tokens\.weight for both")


def test_a_head_that_loading_would_tie_is_refused(tmp_path):
    base = {"model.embed_tokens.weight": normal(9, 4), "lm_head.weight": normal(9, 4)}
    config = {"tie_word_embeddings": True}
    refused(tmp_path, base, {"lm_head": loha(9, 4)}, r"tied to the embeddings \(tie_word_embeddings", config=config)


def test_a_broken_adapter_is_refused(tmp_path):
    factors = loha(6, 4)
    factors["hada_w1_b"][0, 1] = np.nan
    refused(tmp_path, {"q.weight": normal(6, 4)}, {"q": factors}, r"hada_w1_b", error=FileError)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    factors = {key: 100 * value for key, value in loha(6, 4).items()}
    base = {"q.weight": normal(6, 4, dtype=np.float16)}
    refused(tmp_path, base, {"q": factors}, r"q\.weight has values that float16 cannot hold")


def test_two_adapters_that_replace_one_tensor_differently(tmp_path):
    base = write_base(tmp_path / "base", {"q.weight": normal(6, 4), "head.weight": normal(3, 6)})
    for n in "12":
        head = {"head.weight": normal(3, 6)}
        write_adapter(tmp_path / n, {"q": loha(6, 4)}, others=head, modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"each hold values for head\.weight"):
        merge_checkpoint(base, [(tmp_path / "1", 1.0), (tmp_path / "2", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norm_layers_of_lycoris_are_added(tmp_path):
    base = {"blocks.0.norm.weight": normal(6), "blocks.0.norm.bias": normal(6), "blocks.0.q.weight": normal(6, 4)}
    w_norm, b_norm = normal(6), normal(6)
    factors = loha(6, 4, r=2)
    state = {f"lycoris_blocks_0_q.{key}": value for key, value in factors.items()}
    state |= {"lycoris_blocks_0_q.alpha": np.array(1.0, np.float32)}
    state |= {"lycoris_blocks_0_norm.w_norm": w_norm, "lycoris_blocks_0_norm.b_norm": b_norm}
    save_file(state, tmp_path / "adapter.safetensors")
    path = write_base(tmp_path / "base", base)
    merge_checkpoint(path, [(tmp_path / "adapter.safetensors", 0.5)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    np.testing.assert_allclose(merged["blocks.0.norm.weight"], base["blocks.0.norm.weight"] + 0.5 * w_norm, rtol=1e-6)
    np.testing.assert_allclose(merged["blocks.0.norm.bias"], base["blocks.0.norm.bias"] + 0.5 * b_norm, rtol=1e-6)
    wanted = base["blocks.0.q.weight"] + 0.5 * delta(factors, 0.5)
    np.testing.assert_allclose(merged["blocks.0.q.weight"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_only_some_modules(tmp_path):
    base = {"a.weight": normal(6, 4), "b.weight": normal(6, 4)}
    path = write_base(tmp_path / "base", base)
    adapter = write_adapter(tmp_path / "adapter", {"a": loha(6, 4), "b": loha(6, 4), "not.there": loha(6, 4)})
    assert merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", only="a").merged == 1
    np.testing.assert_array_equal(read_all(tmp_path / "out")["b.weight"], base["b.weight"])
    with pytest.raises(ValueError, match=r"has no module whose whole name .*; it has a, b, not\.there"):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "other", only="c")


def test_what_is_there_is_replaced_only_with_force(tmp_path):
    path = write_base(tmp_path / "base", {"q.weight": normal(6, 4)})
    adapter = [(write_adapter(tmp_path / "adapter", {"q": loha(6, 4)}), 1.0)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="`force=True`"):
        merge_checkpoint(path, adapter, out)
    assert files_in(out) == ["mine.txt"]
    merge_checkpoint(path, adapter, out, force=True)
    assert files_in(out) == ["model.safetensors"]
    assert files_in(tmp_path) == ["adapter", "base", "out"]
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match="holds the base checkpoint"):
            merge_checkpoint(path, adapter, place, force=True)


def test_one_run_at_a_time(tmp_path):
    path = write_base(tmp_path / "base", {"q.weight": normal(6, 4)})
    adapter = [(write_adapter(tmp_path / "adapter", {"q": loha(6, 4)}), 1.0)]

    def second(done, total):
        with pytest.raises(FileExistsError, match="Another run is writing"):
            merge_checkpoint(path, adapter, tmp_path / "out")

    merge_checkpoint(path, adapter, tmp_path / "out", progress=second)
    assert (tmp_path / "out").is_dir()


def test_a_disk_that_is_too_small_is_seen_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_files.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"takes .* GB more"):
        test_only_some_modules(tmp_path)
    assert files_in(tmp_path) == ["adapter", "base"]


def test_a_disk_that_fills_up_leaves_no_result_and_the_next_run_goes_on(tmp_path, monkeypatch):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter = [(write_adapter(tmp_path / "adapter", modules), 1.0)]
    written = 0
    real = merge_shard.write_at

    def write(descriptor, place, data):
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, place, data)

    monkeypatch.setattr(merge_shard, "write_at", write)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoint(path, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.merging" / "files").glob(".*"))  # nothing that is not whole
    monkeypatch.setattr(merge_shard, "write_at", real)
    report = merge_checkpoint(path, adapter, tmp_path / "out")
    assert report.kept
    check_merged(tmp_path / "out", base, modules)
    assert files_in(tmp_path) == ["adapter", "base", "out"]


def check_merged(out, base, modules, weight=1.0):
    merged = read_all(out)
    assert merged.keys() == base.keys()
    for key, value in merged.items():
        module = modules.get(key.removesuffix(".weight"))
        if module is None:
            assert value.tobytes() == base[key].tobytes()
        else:
            wanted = base[key].astype(np.float64) + weight * delta(module, 2)
            np.testing.assert_allclose(value.astype(np.float64), wanted, rtol=2**-8, atol=1e-5)


KILLED = """
import os, signal, sys
from loha_jax.interop.merge import shard as merge_shard
from loha_jax.interop.merge.files import merge_checkpoint
merge_shard._BLOCK = 1024
def progress(done, total):
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
merge_checkpoint(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], progress=progress)
"""


def test_a_run_that_was_killed_is_continued(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter, out = write_adapter(tmp_path / "adapter", modules), tmp_path / "out"
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    finished = 0
    for share in (0.05, 0.4, 0.45, 0.93):
        command = [sys.executable, "-c", KILLED, path, adapter, out, str(int(share * total))]
        done = subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        now = len(list((tmp_path / ".out.merging" / "files").glob("*.safetensors")))
        assert now >= finished
        finished = now
    assert finished >= 2
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.merging" / "files").glob("*.safetensors")}
    report = merge_checkpoint(path, [(adapter, 1.0)], out)
    assert len(report.kept) == finished
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    check_merged(out, base, modules)
    assert files_in(tmp_path) == ["adapter", "base", "out"]


@pytest.mark.parametrize("change", ["weight", "adapter", "base", "dtype"])
def test_shards_of_another_merge_are_not_kept(change, tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter = write_adapter(tmp_path / "adapter", modules)

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", progress=stop)
    assert list((tmp_path / ".out.merging" / "files").glob("*.safetensors"))
    weight, dtype = 1.0, None
    if change == "weight":
        weight = 0.5
    elif change == "dtype":
        dtype = BF16
    elif change == "adapter":
        file = adapter / "adapter_model.safetensors"
        state = load_file(file)
        state["base_model.model.model.layers.0.q.hada_w1_a"] *= 2
        modules["model.layers.0.q"]["hada_w1_a"] *= 2
        save_file(state, file)
    else:
        file = path / "model-00001-of-00004.safetensors"
        os.utime(file, ns=(1, 1))
    report = merge_checkpoint(path, [(adapter, weight)], tmp_path / "out", dtype=dtype)
    assert not report.kept
    check_merged(tmp_path / "out", base, modules, weight)


@pytest.mark.parametrize("ranks", [(4, 4), (16, 16), (3,), (1, 1)])
@pytest.mark.parametrize("shape", [(50, 30), (7, 90)])
def test_norms_and_differences_without_the_matrix(ranks, shape):
    def update(scale):
        pairs = tuple((normal(shape[0], r), normal(r, shape[1])) for r in ranks)
        return LowRankUpdate(pairs, scale)

    def dense(u):
        product = math.prod((a.astype(np.float64) @ b.astype(np.float64) for a, b in u.pairs), start=np.float64(1))
        return u.scale * product

    a, b = update(0.5), update(-1.5)
    np.testing.assert_allclose(update_norm(a), np.linalg.norm(dense(a)), rtol=1e-12)
    np.testing.assert_allclose(difference_norm(a, b), np.linalg.norm(dense(a) - dense(b)), rtol=1e-12)
    (left, right), *others = a.pairs
    near = LowRankUpdate(((left * np.float32(1 + 2**-20), right), *others), a.scale)
    np.testing.assert_allclose(difference_norm(a, near), np.linalg.norm(dense(a) - dense(near)), rtol=1e-6)
    assert difference_norm(a, a) == 0


def test_compiled_sums_match_numpy_whatever_the_block(tmp_path, monkeypatch):
    base = {"q.weight": normal(67, 33)}
    path = write_base(tmp_path / "base", base)
    factors = loha(67, 33, r=12)  # above what is unrolled
    adapter = write_adapter(tmp_path / "adapter", {"q": factors})
    for block in (1, 133 * 4, 1 << 20):
        monkeypatch.setattr(merge_shard, "_BLOCK", block)
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / f"{block}")
        wanted = base["q.weight"] + delta(factors, 0.5)
        merged = read_all(tmp_path / f"{block}")["q.weight"]
        np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
