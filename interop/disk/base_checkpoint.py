"""`Checkpoint`: safetensors files in Hugging Face's form, read one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from loha_jax.runtime.untrusted import FileError, parse_json, read_json, read_text

from .bitsandbytes import Packed, packed_weights
from .quantised import Quantisation, dequantised
from .safetensors_file import Header, SafetensorsFile, without_wrappers

T = TypeVar("T")

INDEX = ".index.json"
_STEMS = ("model", "diffusion_pytorch_model")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|index\.json)")
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)(\.index\.json)?")
_CONVERT = (
    "Base checkpoints are read from safetensors only: load the model in torch and save it with "
    "safe_serialization=True "
    "(`AutoModel….from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)`)"
)

_WANTED = ". Give a safetensors file, or a folder with one, or with shards and their index"


class Checkpoint:
    """The tensors of one or several safetensors files, by name; values are read on request.

    Args:
        path: a file; or a folder that holds `model.safetensors`,
            `diffusion_pytorch_model.safetensors`, one of these in shards with
            `*.safetensors.index.json`, or a single safetensors file of any name.

    Attributes:
        shapes, dtypes: of each tensor by name, in the order of the files; read from the headers
            only. Names are without the parts that torch's wrappers add (`_orig_mod`).
        stored_names: what the files call the tensors whose names have lost wrappers.
        files: the safetensors files.
        index: the file that names the shards, or None.

    Raises:
        FileNotFoundError: there is no such file, or a shard of the index is missing.
        ValueError: the folder holds several checkpoints, a file is broken, or index and shards do
            not agree.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._prefix = ""
        self._packed: dict[str, Packed] = {}
        self.stored_names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._files: dict[str, SafetensorsFile] = {}
        self.files, self.index, weight_map = _find_files(self.path)
        self._opened = {path: SafetensorsFile(path) for path in self.files}
        for path, file in self._opened.items():
            if again := next((key for key in file.shapes if key in self._files), None):
                raise FileError(f"{again} is in {self._files[again].path} and again in {path}")
            self._files.update(dict.fromkeys(file.shapes, file))
            self.shapes.update(file.shapes)
            self.dtypes.update(file.dtypes)
            self.stored_names.update(file.stored_names)
        lost = sorted(key for key in weight_map or () if without_wrappers(key) not in self._files)
        if lost:
            raise FileError(
                f"The index of {self.path} names tensors that its shards do not hold: "
                f"{', '.join(lost)}"
            )

    def drop_prefix(self, prefix: str) -> None:
        """Remove a prefix from all names (`module.` of DataParallel), if every name has it."""
        if not all(key.startswith(prefix) for key in self.shapes):
            return
        self._files = _without(prefix, self._files)
        self.shapes = _without(prefix, self.shapes)
        self.dtypes = _without(prefix, self.dtypes)
        self._packed = {
            key: dataclasses.replace(packed, key=key)
            for key, packed in _without(prefix, self._packed).items()
        }
        self._prefix = prefix + self._prefix

    def unpack(self) -> None:
        """Present the weights that bitsandbytes has packed as the floating ones.

        Raises:
            FileError: the tensors of a packed weight do not fit together.
        """
        self._packed = packed_weights(self.shapes, self.dtypes, self.read, self.path)
        for key, weight in self._packed.items():
            self.shapes[key], self.dtypes[key] = weight.shape, weight.dtype
            for part in weight.parts:
                del self.shapes[part], self.dtypes[part]

    @property
    def folder(self) -> Path:
        """The folder, also of a single file."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def modules(self) -> list[str]:
        """The names of the modules that have a weight, also one packed into other tensors."""
        plain = [key.removesuffix(".weight") for key in self.shapes if key.endswith(".weight")]
        return list(dict.fromkeys([*plain, *self.quantisation.packed]))

    @functools.cached_property
    def quantisation(self) -> Quantisation:
        """The tensors that are quantised."""
        return Quantisation(self.shapes, self.dtypes, read_config(self.folder), self._elsewhere())

    def _elsewhere(self) -> list[str]:
        """Return the tensors in other shards, if the file is one shard of an index beside it."""
        if self.index is not None or self.path.is_dir():
            return []
        for stem in _STEMS:
            if (index := self.folder / f"{stem}.safetensors{INDEX}").is_file():
                weight_map = _from_index(index, missing_is_fine=True)[2]
                if self.path.name in weight_map.values():
                    return [key for key, name in weight_map.items() if name != self.path.name]
        return []

    def read_scale(self, key: str) -> np.ndarray:
        """Return the scale of a float8 tensor, as it is stored.

        Raises:
            FileError: it holds values that are negative or not finite.
        """
        name = self.quantisation.scales[key].key
        values = self.read(name)
        wide = values.astype(np.float32)
        if not np.isfinite(wide).all() or (wide < 0).any():
            raise FileError(
                f"{self.file_of(name)}: the scale {name} holds values that are negative or not "
                "finite"
            )
        return values

    def read_values(self, key: str) -> np.ndarray:
        """Return the values of a tensor; scaled float8 in float32, multiplied by the scale."""
        values, scale = self.read(key), self.quantisation.scales.get(key)
        if scale is None:
            return values
        return dequantised(values, scale.rows(self.read_scale(key), values.shape))

    def check_readable(self, key: str) -> None:
        """Raise FileError where a tensor is quantised in a form that cannot be read as values."""
        if key in self.quantisation.problems:
            raise FileError(f"{self.path}: {self.quantisation.problems[key]}")

    @property
    def is_whole_folder(self) -> bool:
        """True if the files beside the weights (config, tokenizer) belong to them."""
        named = self.path.name.startswith(tuple(f"{stem}." for stem in _STEMS))
        beside = named and (self.folder / "config.json").is_file()
        return self.path.is_dir() or self.index is not None or beside

    def read(self, key: str) -> np.ndarray:
        """Return the values of a tensor, as they are stored; unpacked after `unpack`."""
        if key in self._packed:
            return self._packed[key].values(self._stored)
        return self._stored(key)

    def _stored(self, key: str) -> np.ndarray:
        return self._files[key].read(self._prefix + key)

    def file_of(self, key: str) -> Path:
        """Return the file that holds a tensor."""
        return self._files[key].path

    def header(self, file: Path) -> Header:
        """Return the header of one of `files`."""
        return self._opened[file].header


def _without(prefix: str, table: Mapping[str, T]) -> dict[str, T]:
    return {key.removeprefix(prefix): value for key, value in table.items()}


def _find_files(path: Path) -> tuple[list[Path], Path | None, dict[str, str] | None]:
    if path.is_file():
        if _PICKLES.fullmatch(path.name):
            raise FileError(f"{path} is a torch pickle. {_CONVERT}")
        if not path.name.endswith(INDEX):
            return [path], None, None
        return _from_index(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{path}'")
    for stem in _STEMS:
        if (file := path / f"{stem}.safetensors").is_file():
            return [file], None, None
        if (index := path / f"{stem}.safetensors{INDEX}").is_file():
            return _from_index(index)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, None, None
    if found:
        raise FileError(
            f"'{path}' holds several safetensors files and no index: "
            f"{', '.join(f.name for f in found)}. Give the path of one of them."
        )
    other = sorted(p.name for p in path.iterdir() if _WEIGHTS.fullmatch(p.name))
    hint = f"; it has {', '.join(other)}. {_CONVERT}" if other else _WANTED
    raise FileNotFoundError(f"Can't find a safetensors file at '{path}'{hint}")


def _from_index(
    index: Path, *, missing_is_fine: bool = False
) -> tuple[list[Path], Path, dict[str, str]]:
    values = parse_json(read_text(index), index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise FileError(
            f"{index} is not an index of safetensors shards: it has no `weight_map` of file names"
        )
    # A file of another folder could be anything that this user may read.
    names = list(dict.fromkeys(weight_map.values()))
    if outside := [
        repr(n[:100]) for n in names if n in (".", "..") or not re.fullmatch(r"[^/\\\0]{1,255}", n)
    ]:
        raise FileError(f"{index} names shards that are no files beside it: {', '.join(outside)}")
    files = [index.parent / name for name in names]
    if not missing_is_fine and (missing := [str(file) for file in files if not file.is_file()]):
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
    return files, index, weight_map


def is_floating(dtype: Any) -> bool:
    """Return whether a dtype is a floating-point one, including bfloat16 and float8."""
    return jnp.issubdtype(dtype, np.floating)


def accumulator(*dtypes: np.dtype) -> np.dtype:
    """Return the dtype to add values of these dtypes in: float64 if one of them is, else float32.

    Integers of 64 bits count as float64.
    """
    return np.dtype(np.float64 if any(dtype.itemsize > 4 for dtype in dtypes) else np.float32)


def written_dtype(own: DTypeLike, dtype: DTypeLike | None) -> np.dtype:
    """Return the dtype that a tensor is written in: `dtype` for a floating one, else its own."""
    return np.dtype(dtype if dtype is not None and is_floating(own) else own)


_SIDE_FILE = re.compile(
    r"(.*config(_.*)?|.*tokenizer.*|special_tokens_map|added_tokens|vocab.*|merges|chat_template|modules|model_index"
    r"|normalizer|preprocessor)\.json"
    r"|(vocab|merges|spiece|sentencepiece|tokenizer).*\.(txt|model|bpe)|.*\.(jinja|tiktoken|spm)|(source|target)\.spm"
    r"|(modeling|configuration|tokenization|processing|image_processing|feature_extraction)_.*\.py"
    r"|(README|LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)([._-].*)?"
)


def side_files(folder: Path) -> list[Path]:
    """List the files beside a checkpoint's weights that belong to it.

    These are configs, tokenizer, licence and model code. A folder may hold anything: other files
    are not copied into what may be published.

    Raises:
        FileError: one is a link that leads out of the folder.
    """
    found = sorted(p for p in folder.iterdir() if p.is_file() and _SIDE_FILE.fullmatch(p.name))
    real = folder.resolve()
    own = (real, real.parent.parent / "blobs")  # Hugging Face's cache links to the latter
    if outside := [p for p in found if not any(p.resolve().is_relative_to(place) for place in own)]:
        raise FileError(
            f"{folder} links to files elsewhere, which would be copied: "
            f"{', '.join(p.name for p in outside)}. Remove the links, or put the files themselves "
            "there."
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed `config.json` of a checkpoint's folder; {} if there is none.

    Raises:
        FileError: it is not a JSON object.
    """
    return read_json(file) if (file := folder / "config.json").is_file() else {}


def side_file_content(file: Path, dtype: Any) -> bytes:
    """Return the content of a file beside the weights; `config.json` with the new dtype, if any."""
    if file.name == "config.json" and dtype is not None:
        config = read_config(file.parent)
        for field in ("dtype", "torch_dtype"):
            if field in config:
                config[field] = np.dtype(dtype).name
        return (json.dumps(config, indent=2) + "\n").encode()
    return file.read_bytes()


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that hold or index weights."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(filter(_WEIGHTS.fullmatch, names))
