"""Torch pickles of strangers: no code runs, and nothing unpacks to more than the file."""

import io
import pickle
import zipfile

import pytest
import torch
from peft_samples import Sample

from loha_jax import interop
from loha_jax.interop.disk.tensor_files import read_torch_pickle


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def saved(value):
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def compressed(data):
    """The same archive with its entries compressed, and a megabyte of zeros more in one of them."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(
                name, old.read(name) + (b"\0" * 2**20 if name.endswith("/data/0") else b"")
            )
    return buffer.getvalue()


TRICKS = {
    "code": (
        lambda folder: saved({"a": Payload(folder / "ran")}),
        "not a torch file that holds only tensors",
    ),
    "code in an old pickle": (
        lambda folder: pickle.dumps({"a": Payload(folder / "ran")}),
        "since PyTorch 1.6",
    ),
    "an old format": (
        lambda folder: _legacy({"a": torch.ones(2)}),
        "since PyTorch 1.6",
    ),
    "one element shown a billion times": (
        lambda folder: saved({"a": torch.ones(1).expand(10**12)}),
        "claims to be larger than the file",
    ),
    "compressed zeros": (
        lambda folder: compressed(saved({"a": torch.ones(4)})),
        "compressed entries",
    ),
    "a sparse tensor": (
        lambda folder: saved({"a": torch.eye(2).to_sparse()}),
        "no plain tensor",
    ),
    "a complex dtype is read": (
        lambda folder: saved({"a": torch.ones(2, dtype=torch.complex64)}),
        None,
    ),
    "a list": (lambda folder: saved([torch.ones(2)]), "does not hold a dict of tensors"),
    "numbers for keys": (
        lambda folder: saved({1: torch.ones(2)}),
        "does not hold a dict of tensors",
    ),
    "nested dicts": (
        lambda folder: saved({"a": {"b": torch.ones(2)}}),
        "does not hold a dict of tensors",
    ),
    "a float8 dtype": (
        lambda folder: saved({"a": torch.ones(2).to(torch.float8_e5m2)}),
        "numpy has no type for",
    ),
    "nothing": (lambda folder: b"", "since PyTorch 1.6"),
}


def _legacy(value):
    torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("trick", TRICKS)
def test_pickles(trick, tmp_path):
    make, message = TRICKS[trick]
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(make(tmp_path))
    if message is None:
        assert list(read_torch_pickle(path)) == ["a"]
    else:
        with pytest.raises(interop.FileError, match=message):
            read_torch_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_the_folder_of_a_pickle_is_refused_before_anything_is_loaded(tmp_path):
    sample = Sample("linear_bin")
    (tmp_path / "adapter_config.json").write_bytes(
        (sample.adapter / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.bin").write_bytes(
        saved({"base_model.model.x": Payload(tmp_path / "ran")})
    )
    with pytest.raises(interop.FileError, match=r"adapter_model\.bin"):
        interop.load_peft(tmp_path, sample.params())
    assert not (tmp_path / "ran").exists()
