"""`load_base`: a Hugging Face checkpoint into a JAX tree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import flatten_whole, is_adapted, leaves_by_path
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.placement import chosen_sharding
from loha_jax.tree.quantised import is_quantised

from ..disk.base_checkpoint import Checkpoint, is_floating, written_dtype
from ..names.leaf_source import Source
from ..names.scaled_leaves import quantised_problem, rows_problem
from ..names.tree_sources import find_sources_in
from .mismatch import Mismatch

T = TypeVar("T")

# Tensors of a torch checkpoint that no Flax model has a place for.
_BUFFERS = re.compile(
    r"(.*\.)?(num_batches_tracked|position_ids|token_type_ids|rotary_emb\.inv_freq)"
)
_TITLES = "tensors that no leaf takes", "tensors that are not in the file", "leaves that do not fit"


@takes_model
def load_base(
    path: str | Path,
    params: T,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    dtype: DTypeLike | None = None,
    tied: Mapping[str, str] | None = None,
    strict: bool = True,
) -> T:
    """Read a Hugging Face checkpoint into a tree like `params`, one tensor at a time.

    Everything is checked on the headers before the first value is read.

    Args:
        path: a safetensors file, or a folder that holds one, or shards with their index.
        params: arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape(model.init, ...)`) that give
            structure, shapes, dtypes and, where they are placed, shardings.
        names: a `NameMap`, or what `inject` takes; by default a leaf's torch name is its path.
        layouts: as for `inject`.
        dtype: of all floating leaves, instead of each leaf's own. Scaled float8 is multiplied by
            its scales. 4-bit and 8-bit weights of bitsandbytes are unpacked.
        tied: `{name that is missing in the file: name that it shares its values with}`, e.g.
            `{"lm_head.weight": "model.embed_tokens.weight"}`.
        strict: tensors that no leaf takes are an error. Buffers such as `num_batches_tracked` never
            are.

    Returns:
        A tree with the structure of `params` and new arrays.

    Raises:
        FileNotFoundError: the checkpoint, or one of its shards, is not there.
        FileError: leaves without a tensor, misshapen or of another kind of dtype, and (`strict`)
            unused tensors, all in one error; or a file is corrupted.
        ValueError: a value that float16 cannot hold; or the tree is adapted, or quantised.

    Example:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> like = {"q": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"q.weight": np.ones((3, 4), np.float32)}, f"{folder}/model.safetensors")
        ...     load_base(folder, like)["q"]["kernel"].shape
        (4, 3)
    """
    if any(map(is_adapted, flatten_whole(params)[0])):
        raise ValueError(
            "load_base takes the base model's tree: load it first, then inject or load adapters."
        )
    leaves = leaves_by_path(params)
    if quantised := [".".join(path) for path, leaf in leaves if is_quantised(leaf)]:
        raise ValueError(
            f"load_base fills floating leaves, and {', '.join(quantised[:3])} are quantised "
            f"({len(quantised)} in all). Load the float parameters (`params` may be their "
            "shapes), and quantise what is loaded"
        )
    checkpoint = Checkpoint(path)
    checkpoint.unpack()
    tree, sources, problems = find_sources_in(checkpoint, params, names, layouts)
    mismatch = Mismatch(misshapen=problems, titles=_TITLES)
    tied = {name: own for name, own in (tied or {}).items() if name not in checkpoint.shapes}
    for position, source in sources.items():
        keys = tuple(tied.get(key, key) for key in source.keys)
        sources[position] = dataclasses.replace(source, keys=keys)
    taken = {key for source in sources.values() for key in (*source.keys, *source.also)}
    for position, source in sources.items():
        target = written_dtype(tree.leaves[position].dtype, dtype)
        _check_leaf(checkpoint, tree, position, source, target, taken, mismatch)
    if strict:
        mismatch.unexpected += _unused(checkpoint, taken)
    sentence = f"{checkpoint.path} and the tree do not fit; nothing was loaded"
    mismatch.check(sentence, _hint(mismatch), FileError)
    leaves = list(tree.leaves)
    for position, source in sources.items():
        leaf = leaves[position]
        target = written_dtype(leaf.dtype, dtype)
        leaves[position] = _read_leaf(checkpoint, source, leaf, target, taken)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _check_leaf(
    checkpoint: Checkpoint,
    tree: NamedTree,
    position: int,
    source: Source,
    target: np.dtype,
    taken: Collection[str],
    mismatch: Mismatch,
) -> None:
    """Note the tensors of a leaf that the checkpoint lacks, and those that do not fit."""
    leaf, where = tree.leaves[position], ".".join(tree.paths[position])
    shape, quantisation = tuple(leaf.shape), checkpoint.quantisation
    if problem := rows_problem(quantisation, source, taken):
        mismatch.misshapen.append(f"{where}: {problem}")
        return
    for key in source.keys:
        if key not in checkpoint.shapes:
            mismatch.missing.append(
                f"{key} (for {where} {list(shape)}{quantisation.why_missing(key)})"
            )
        elif problem := quantised_problem(quantisation, taken, key, target):
            mismatch.misshapen.append(f"{where}: {problem}")
        elif not source.fits(shape, checkpoint.shapes[key]):
            need = list(source.torch_shape(shape))
            found = list(checkpoint.shapes[key])
            what = f" is {found} in the file, a leaf {list(shape)} needs {need}"
            mismatch.shapes.append((f"{key} (for {where})", what))
        elif _kind_of(checkpoint.dtypes[key]) != _kind_of(leaf.dtype):
            what = f" is {checkpoint.dtypes[key]}, the leaf {leaf.dtype}"
            mismatch.shapes.append((f"{key} (for {where})", what))


def _unused(checkpoint: Checkpoint, used: Collection[str]) -> list[str]:
    """Return the tensors that no leaf takes, without those that no Flax model has a place for."""
    quantisation = checkpoint.quantisation
    scales = {scale.key for key, scale in quantisation.scales.items() if key in used}
    known = {*used, *scales, *quantisation.extras}
    return [
        key
        for key in checkpoint.shapes
        if key not in known
        and not _BUFFERS.fullmatch(key)
        and not quantisation.owner_is_packed(key)
    ]


def _hint(mismatch: Mismatch) -> str:
    hints = []
    if mismatch.missing:
        hints.append(
            "`names=` says what torch calls a leaf (NameMap.transformers(), NameMap.infer, …), "
            "`tied=` whose values a tied weight has"
        )
    # Entries that are missing or misshapen may explain unexpected ones.
    if mismatch.unexpected and not (mismatch.missing or mismatch.misshapen or mismatch.shapes):
        hints.append("`strict=False` leaves tensors unread")
    return "; ".join(hints)


def _read_leaf(
    checkpoint: Checkpoint,
    source: Source,
    like: jax.Array | jax.ShapeDtypeStruct,
    target: np.dtype,
    taken: Collection[str],
) -> jax.Array:
    """Read the tensors of a leaf into a new array, placed as the leaf is."""
    scales = checkpoint.quantisation.scales
    value = np.empty(tuple(like.shape), target)
    for n, key in enumerate(source.keys):
        raw = key in scales and scales[key].key in taken  # the tree holds the scale too
        tensor = checkpoint.read(key) if raw else checkpoint.read_values(key)
        # A transform of rows rounds once, after its scale.
        tensor = cast_values(tensor, target, key) if source.rows is None else tensor
        source.put(tensor, value, n)
    return jax.device_put(value, chosen_sharding(like))


def _kind_of(dtype: DTypeLike) -> str:
    """Return "float" for every floating dtype, else numpy's letter."""
    return "float" if is_floating(dtype) else np.dtype(dtype).kind


def cast_values(tensor: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    """Return a tensor in another dtype.

    Raises:
        ValueError: a value is too large for float16.
    """
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype, copy=False)
    # float16 is the one common dtype with a smaller range.
    if dtype == np.float16 and tensor.dtype != np.float16:
        lost = ~np.isfinite(result) & np.isfinite(tensor.astype(np.float32, copy=False))
        if lost.any():
            raise ValueError(
                f"{key} has {int(lost.sum())} values that float16 cannot hold; use bfloat16 or "
                "float32"
            )
    return result
