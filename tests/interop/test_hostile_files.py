"""Tricks that a stranger could put into an adapter or a checkpoint; test_fuzz.py has accidents."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_samples import Sample
from safetensors.numpy import save_file

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.disk.tensor_files import read_safetensors
from loha_jax.runtime.untrusted import fullmatch, parse_json, read_text

SLOW = (
    r"([a-z.]|[a-z.][a-z.])+\d"  # Fibonacci numbers of ways to match, none of which ends in a digit
)
LONG = "block" * 12
BASE = {LONG: {"q": {"kernel": jnp.ones((4, 4))}}}


def write_header(path, header, values=b"", claimed=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + values
    )


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "a header longer than the file": ({}, b"", 2**40),
    "a header of gigabytes": ({}, b"", 2**32),
    "a tensor that claims a petabyte": ({"a": entry([2**48], [0, 2**50])}, b"1234", None),
    "sizes whose product overflows": ({"a": entry([2**40, 2**40], [0, 4])}, b"1234", None),
    "overlapping offsets": (
        {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
        b"123456789012",
        None,
    ),
    "a hole between tensors": (
        {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])},
        b"123456789012",
        None,
    ),
    "offsets that run backwards": ({"a": entry([1], [4, 0])}, b"1234", None),
    "bytes that no tensor has": ({"a": entry([1], [0, 4])}, b"12345678", None),
    "truncated values": ({"a": entry([2], [0, 8])}, b"1234", None),
    "a shape of other size than its bytes": ({"a": entry([3], [0, 8])}, b"12345678", None),
    "a dtype that numpy lacks": ({"a": entry([4], [0, 4], "F8_E8M0")}, b"1234", None),
    "a dtype that nothing has": ({"a": entry([1], [0, 4], "F31")}, b"1234", None),
    "nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", None),
    "no JSON": (b"{" * 50, b"", None),
    "no UTF-8": (b'{"\xff\xfe": 1}', b"", None),
    "a list": (b"[]", b"", None),
    "metadata that are no strings": ({"__metadata__": {"format": 1}}, b"", None),
}


@pytest.mark.parametrize("trick", HEADERS)
def test_headers_of_safetensors_files(trick, tmp_path):
    header, values, claimed = HEADERS[trick]
    path = tmp_path / "adapter_model.safetensors"
    write_header(path, header, values, claimed)
    for read in (read_safetensors, Checkpoint):
        with pytest.raises(interop.FileError, match=r"adapter_model\.safetensors"):
            read(path)


def test_more_axes_than_numpy_has(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    write_header(path, {"a": entry([1] * 300, [0, 4])}, b"1234")
    with pytest.raises(interop.FileError, match=r"adapter_model\.safetensors: a cannot be read"):
        read_safetensors(path)


def test_empty_and_short_files(tmp_path):
    for size in (0, 1, 7, 8):
        (path := tmp_path / f"{size}.safetensors").write_bytes(b"\0" * size)
        with pytest.raises(interop.FileError, match="not a readable safetensors file"):
            read_safetensors(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "circle", "folder"])
def test_what_is_no_file_is_not_read(kind, name, tmp_path):
    """A pipe would be waited for, /dev/zero never ends."""
    folder = tmp_path / "adapter"
    shutil.copytree(Sample("linear").adapter, folder)
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path.mkdir()
    with pytest.raises((interop.FileError, FileNotFoundError), match=name.split(".")[0]):
        interop.load_peft(folder, Sample("linear").params())
    with pytest.raises((interop.FileError, FileNotFoundError)):
        read_text(path)


def save_adapter(folder, **changes):
    params = loha_jax.inject(BASE, LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
    interop.save_peft(folder, params)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": SLOW}, "more than a second"),
        ({"exclude_modules": SLOW}, "more than a second"),
        ({"rank_pattern": {SLOW: 2}}, "more than a second"),
        ({"modules_to_save": [SLOW]}, "more than a second"),
        ({"layers_pattern": SLOW, "layers_to_transform": [0]}, "more than a second"),
        ({"target_modules": "(" * 5000}, "not a regular expression"),
        ({"target_modules": "q" * 100_000}, "more than 10,000"),
        ({"r": 10**9}, "misshapen"),
        ({"r": 2**40}, "positive integer"),
        ({"r": -1}, "positive integer"),
        ({"alpha": 10**400}, "finite number"),
        ({"alpha": float("nan")}, "finite number"),
        ({"alpha": [1]}, "finite number"),
        ({"rank_dropout": float("inf")}, "probability"),
        ({"layers_to_transform": 1.5}, "should hold integers"),
        ({"target_modules": {"q": 1}, "rank_pattern": [1]}, "should be a dict"),
        ({"peft_type": ["LOHA"]}, "reads 'LOHA' only"),
        ({"peft_type": "LORA"}, "reads 'LOHA' only"),
    ],
)
def test_configurations(changes, message, tmp_path):
    folder = save_adapter(tmp_path, **changes)
    started = time.monotonic()
    with pytest.raises(interop.FileError, match=message) as caught:
        interop.load_peft(folder, BASE)
    assert str(folder) in str(caught.value)
    assert time.monotonic() - started < 60  # it ends: without the limit, not in a lifetime


def test_patterns_that_end_are_those_of_re():
    assert fullmatch(r".*\.(q|v)_proj", "layers.0.q_proj")
    assert not fullmatch(r".*\.(q|v)_proj", "layers.0.q_proj.x")


def test_deep_and_large_json(tmp_path):
    with pytest.raises(interop.FileError, match=r"x\.json: JSON nested"):
        parse_json("[" * 100 + "]" * 100, "x.json")
    with pytest.raises(interop.FileError, match=r"x\.json: JSON nested"):
        parse_json('{"a":' * 100_000 + "1" + "}" * 100_000, "x.json")
    with pytest.raises(interop.FileError, match="is not JSON"):
        parse_json("1" * 10_000, "x.json")
    with open(path := tmp_path / "adapter_config.json", "wb") as file:
        file.truncate(2**40)  # a terabyte that takes no room
    with pytest.raises(interop.FileError, match="has 1,099,511,627,776 bytes"):
        interop.load_peft(tmp_path, BASE)
    assert path.stat().st_size == 2**40


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/hostname",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "x" * 300,
    ],
)
def test_an_index_names_files_beside_itself_alone(shard, tmp_path):
    save_file({"q.weight": np.ones((2, 2), np.float32)}, tmp_path / "outside.safetensors")
    (folder := tmp_path / "model").mkdir()
    index = {"weight_map": {"q.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(interop.FileError, match="names shards that are no files beside it"):
        Checkpoint(folder)


def test_links_that_lead_out_of_a_checkpoint_are_not_copied(tmp_path):
    (folder := tmp_path / "model").mkdir()
    save_file({"q.weight": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    (tmp_path / "secret").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    tree = {"q": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(interop.FileError, match=r"links to files elsewhere.*LICENSE"):
        interop.save_merged(tmp_path / "out", tree, base=folder)
    assert not list((tmp_path / "out").glob("*"))
    # Hugging Face's cache links its snapshots to blobs.
    (blobs := tmp_path / "hub" / "blobs").mkdir(parents=True)
    (snapshot := tmp_path / "hub" / "snapshots" / "1234").mkdir(parents=True)
    shutil.move(folder / "model.safetensors", blobs / "abc")
    (blobs / "def").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    (snapshot / "config.json").symlink_to(blobs / "def")
    interop.save_merged(tmp_path / "out", tree, base=snapshot)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "config.json").is_symlink()


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "a\\b", "..", ".", "a.b", "", "a\0", "a\n", "C:x", "x" * 201]
)
def test_names_of_adapters_are_no_paths(name, tmp_path):
    config = LoHaConfig(r=2, target_modules=["q"])
    with pytest.raises(ValueError, match="An adapter's name is a string"):
        loha_jax.inject(BASE, config, key=jax.random.key(0), adapter_name=name)
    with pytest.raises(ValueError, match="An adapter's name is a string"):
        interop.load_peft(save_adapter(tmp_path), BASE, adapter_name=name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, jnp.bfloat16])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype, tmp_path):
    folder = save_adapter(tmp_path)
    state = {
        k: v.astype(dtype)
        for k, v in read_safetensors(folder / "adapter_model.safetensors").items()
    }
    key = f"base_model.model.{LONG}.q.hada_w2_a"
    state[key][1, 0] = value
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(interop.FileError, match=rf"NaN or infinite values, in {key}: "):
        interop.load_peft(folder, BASE)


def test_saving_replaces_a_link_and_never_writes_through_it(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (folder := tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(tmp_path / "precious")
    save_adapter(folder)
    assert (tmp_path / "precious").read_text() == "precious"
    assert interop.load_peft(folder, BASE)[LONG]["q"]["kernel"].names == (f"{LONG}.q",)
