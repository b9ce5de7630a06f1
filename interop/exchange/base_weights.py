"""`load_base` and `save_merged`: Hugging Face checkpoints into a JAX tree, and an adapted tree back into one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from loha_jax.interop.disk.atomic import whole_folder, write_atomically
from loha_jax.interop.disk.base_checkpoint import (
    Checkpoint,
    read_config,
    side_file_content,
    side_files,
    weight_files,
)
from loha_jax.interop.disk.checkpoint_writer import CheckpointWriter, parse_size
from loha_jax.interop.disk.quantised import is_float8
from loha_jax.interop.disk.tensor_files import FileError
from loha_jax.interop.names.leaf_source import Source
from loha_jax.interop.names.scaled_leaves import quantised_problem, requantised, warn_of_losses
from loha_jax.interop.names.tree_sources import find_sources_in
from loha_jax.interop.updates.rounding import Loss

from loha_jax.targets.module_names import Names
from loha_jax.tree.adapters import adapter_names, check_adapters
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight, is_adapted
from loha_jax.tree.merge import check_rounding, merge, unload
from loha_jax.tree.named_tree import Layouts, NamedTree

# What a torch checkpoint may hold beside weights: no Flax model has a place for it.
_BUFFERS = re.compile(r"(.*\.)?(num_batches_tracked|position_ids|token_type_ids|rotary_emb\.inv_freq)")


@takes_model
def load_base(
    path: str | Path,
    params: Any,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    dtype: Any = None,
    tied: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Any:
    """Reads a Hugging Face checkpoint into a tree like `params`, one tensor at a time.

    Everything is checked on the headers before the first value is read.

    Args:
        path: a safetensors file, or a folder that holds one, or shards with their index.
        params: arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape(model.init, ...)`) that give structure, shapes,
            dtypes and, where they are placed, shardings.
        names: a `NameMap`, or what `inject` takes; by default a leaf's torch name is its path.
        layouts: as for `inject`.
        dtype: of all floating leaves, instead of each leaf's own. Scaled float8 is multiplied by its scales.
        tied: `{name that is missing in the file: name that it shares its values with}`, e.g.
            `{"lm_head.weight": "model.embed_tokens.weight"}`.
        strict: tensors that no leaf takes are an error. Buffers such as `num_batches_tracked` never are.

    Returns:
        A tree with the structure of `params` and new arrays.

    Raises:
        FileNotFoundError: the checkpoint, or one of its shards, is not there.
        FileError: leaves without a tensor, misshapen or of another kind of dtype, and (`strict`) unused tensors, all
            in one error; or a file is broken.
        ValueError: a value that float16 cannot hold; or the tree is adapted.

    Example:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"q.weight": np.ones((3, 4), np.float32)}, f"{folder}/model.safetensors")
        ...     load_base(folder, {"q": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}})["q"]["kernel"].shape
        (4, 3)
    """
    if any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted))):
        raise ValueError("load_base takes the base model's tree: load it first, then inject or load adapters.")
    checkpoint = Checkpoint(path)
    quantisation = checkpoint.quantisation
    tree, sources, problems = find_sources_in(checkpoint, params, names, layouts)
    taken = {key for source in sources.values() for key in (*source.keys, *source.also)}
    missing: list[str] = []
    for position, source in sources.items():
        shape, where = tuple(tree.leaves[position].shape), ".".join(tree.paths[position])
        keys = tuple(k if k in checkpoint.shapes else (tied or {}).get(k, k) for k in source.keys)
        sources[position] = dataclasses.replace(source, keys=keys)
        for key in keys:
            if key not in checkpoint.shapes:
                missing.append(f"{key} (for {where} {list(shape)}{quantisation.why_missing(key)})")
            elif problem := quantised_problem(quantisation, taken, key, _target(tree.leaves[position], dtype)):
                problems.append(f"{where}: {problem}")
            elif not source.fits(shape, checkpoint.shapes[key]):
                need = list(source.torch_shape(shape))
                problems.append(f"{key} is {list(checkpoint.shapes[key])}, {where} {list(shape)} needs {need}")
            elif _kind(checkpoint.dtypes[key]) != _kind(tree.leaves[position].dtype):
                problems.append(f"{key} is {checkpoint.dtypes[key]}, {where} is {tree.leaves[position].dtype}")
    used = {key for source in sources.values() for key in (*source.keys, *source.also)}
    used |= {scale.key for key, scale in quantisation.scales.items() if key in used} | quantisation.extras
    unused = [
        key
        for key in checkpoint.shapes
        if strict and key not in used and not _BUFFERS.fullmatch(key) and not quantisation.owner_is_packed(key)
    ]
    if missing or problems or unused:
        raise FileError(_report(checkpoint.path, missing, problems, unused))
    leaves = list(tree.leaves)
    for position, source in sources.items():
        like = leaves[position]
        target = _target(like, dtype)
        value = np.empty(tuple(like.shape), target)
        for n, key in enumerate(source.keys):
            raw = key in quantisation.scales and quantisation.scales[key].key in taken
            tensor = checkpoint.read(key) if raw else checkpoint.read_values(key)
            source.put(_cast(tensor, target, key), value, n)
        leaves[position] = _place(value, like)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _target(like: Any, dtype: Any) -> np.dtype:
    """The dtype that a leaf gets."""
    return np.dtype(dtype) if dtype is not None and _kind(like.dtype) == "float" else np.dtype(like.dtype)


def _report(path: Path, missing: list[str], problems: list[str], unused: list[str]) -> str:
    titles = (
        ("tensors that are not in the file", missing),
        ("leaves that do not fit", problems),
        ("tensors that no leaf takes", unused),
    )
    found = [f"{title} ({len(items)}): {'; '.join(items)}" for title, items in titles if items]
    hints = []
    if missing:
        hints.append(
            "`names=` says what torch calls a leaf (NameMap.transformers(), NameMap.infer, …), `tied=` whose values a "
            "tied weight has"
        )
    if unused and not missing and not problems:  # else the others may explain them
        hints.append("`strict=False` leaves tensors unread")
    return f"{path} and the tree do not fit; nothing was loaded. {'. '.join(found)}. {'; '.join(hints)}".rstrip()


def _kind(dtype: Any) -> str:
    return "float" if jax.numpy.issubdtype(dtype, np.floating) else np.dtype(dtype).kind


def _cast(tensor: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype, copy=False)
    if dtype == np.float16 and tensor.dtype != np.float16:  # the one common dtype with a smaller range
        lost = ~np.isfinite(result) & np.isfinite(tensor.astype(np.float32, copy=False))
        if lost.any():
            raise ValueError(f"{key} has {int(lost.sum())} values that float16 cannot hold; use bfloat16 or float32")
    return result


def _place(value: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if isinstance(like, jax.Array) and not like.committed:
        sharding = None
    return jax.device_put(value, sharding)


@takes_model(changes=False)
def save_merged(
    folder: str | Path,
    params: Any,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    base: str | Path | None = None,
    adapters: Sequence[str] | None = None,
    dtype: Any = None,
    tied: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    safe: bool = False,
    force: bool = False,
) -> None:
    """Writes a tree, with its adapters merged, as a folder that transformers' `from_pretrained` loads in torch.

    Tensors are merged and written one at a time. A new folder appears whole; in one that holds other files the weights
    appear last, when all are whole.

    Args:
        folder: made if it is not there; may not hold weights.
        params: an adapted tree, or a plain one.
        names, layouts: as for `load_base`. Adapted kernels keep the names and layouts that they have.
        base: the checkpoint that the tree came from (a safetensors file or folder). With it, the result has its
            tensors, names, shapes and dtypes; those that the tree does not hold are copied through, and the files
            beside it (config, tokenizer) too.
        adapters: which to merge; the active ones by default.
        dtype: of all floating tensors, instead of the base's (or without one, each leaf's own).
        tied: as for `load_base`: leaves whose tensor the base does not hold because it is that of another. They must
            have its values still.
        max_shard_size: of one file: bytes, or "5GB".
        safe: refuse a merged weight with NaN or infinity.
        force: write float8 without scales although rounding loses more than half of an update.

    Scaled float8 of the base is quantised again, with a scale that fits; a warning says where that loses more than half
    of an update.

    Raises:
        FileExistsError: the folder holds weights.
        NotADirectoryError: it is a file.
        ValueError: leaves that have no name or no tensor in `base`, or are misshapen, in one error; two leaves with one
            tensor and different values; a leaf that is tied no longer; an unknown adapter; a base that is
            quantised, but not as float8 with scales; float8 without scales that loses the update.
            Nothing is written then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(folder, {"q": {"kernel": jnp.ones((4, 3))}})
        ...     Checkpoint(folder).shapes
        {'q.weight': (3, 4)}
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; save_merged writes a folder")
    if held := weight_files(folder):
        raise FileExistsError(
            f"{folder} already holds weights ({', '.join(held)}). Choose another folder, or empty it."
        )
    check_adapters(params, adapters or ())
    size = parse_size(max_shard_size)
    checkpoint = Checkpoint(base) if base is not None else None
    shapes = checkpoint.shapes if checkpoint else None
    quantisation = checkpoint.quantisation if checkpoint else None
    tree, sources, problems = find_sources_in(checkpoint, params, names, layouts)
    if quantisation is not None and quantisation.is_used and dtype is not None:
        raise ValueError(f"{base} is quantised ({quantisation.example}): leave dtype= out, or give another base")
    tied = dict(tied or {})
    owners: dict[str, list[tuple[int, int]]] = {}
    for position, source in sources.items():
        shape, where = tuple(tree.leaves[position].shape), ".".join(tree.paths[position])
        copies = [(n, key) for n, key in enumerate(source.keys)] + [(0, key) for key in source.also]
        for n, key in copies:
            if shapes is not None and key not in shapes:
                if tied.get(key) not in shapes:
                    why = quantisation.why_missing(key) if quantisation is not None else ""
                    problems.append(f"{key} (for {where} {list(shape)}) is not in the base checkpoint{why}")
                    continue
                key = tied[key]
            if shapes is not None and not source.fits(shape, shapes[key]):
                need = list(source.torch_shape(shape))
                problems.append(f"{key} is {list(shapes[key])} in the base, {where} {list(shape)} gives {need}")
            is_float = _kind(tree.leaves[position].dtype) == "float"
            if quantisation is not None and is_float and key in quantisation.problems:
                problems.append(quantisation.problems[key])
            owners.setdefault(key, []).append((position, n))
    scales = {k: s for k, s in (quantisation.scales if quantisation else {}).items() if k in owners}
    scales = {key: scale for key, scale in scales.items() if scale.key not in owners}
    held = {scale.key for scale in scales.values()}
    losses: dict[str, Loss] = {}
    if problems:
        raise ValueError(f"The tree cannot be saved; nothing was written ({len(problems)}): {'; '.join(problems)}")
    plan = []
    for key in shapes if shapes is not None else owners:
        if key in owners:
            position, _ = owners[key][0]
            own = np.dtype(tree.leaves[position].dtype)
            kind = checkpoint.dtypes[key] if checkpoint else own
            shape = shapes[key] if shapes is not None else sources[position].torch_shape(tree.leaves[position].shape)
        else:
            assert checkpoint is not None
            kind, shape = checkpoint.dtypes[key], checkpoint.shapes[key]
        plan.append((key, np.dtype(dtype) if dtype is not None and _kind(kind) == "float" else kind, tuple(shape)))
    stem = "model"
    if checkpoint is not None:
        stem = "diffusion_pytorch_model" if "_diffusers_version" in read_config(checkpoint.folder) else stem
    with whole_folder(folder) as place, CheckpointWriter(place, plan, size, stem, {"format": "pt"}) as writer:
        for key, target, shape in plan:
            if key in held:
                continue  # written with its tensor
            if key not in owners:
                assert checkpoint is not None
                writer.write(key, _cast(checkpoint.read(key), target, key))
                continue
            first, *others = owners[key]
            value = _merged(tree, sources, *first, adapters, safe, force)
            for other in others:
                if not np.array_equal(
                    value, _merged(tree, sources, *other, adapters, safe, force).reshape(value.shape)
                ):
                    raise ValueError(
                        f"{' and '.join('.'.join(tree.paths[p]) for p, _ in owners[key])} are both {key} in torch, and "
                        "have different values now. The weight is tied: adapt or change all of its copies alike. "
                        "Nothing was written."
                    )
            if key in scales:
                assert checkpoint is not None
                values, scale = requantised(checkpoint, key, value.reshape(shape), losses)
                writer.write(key, values)
                writer.write(scales[key].key, scale)
                continue
            stored = _cast(value, target, key)
            if is_float8(target) and not is_float8(value.dtype) and is_adapted(tree.leaves[first[0]]):
                base_value = _of_base(tree, sources, *first)
                check_rounding(stored, value, base_value, key, force)
            writer.write(key, stored.reshape(shape))
        warn_of_losses(losses)
        if checkpoint is not None:
            for file in side_files(checkpoint.folder):
                if not (place / file.name).exists():  # an author's own stays
                    write_atomically(place / file.name, side_file_content(file, dtype))
        writer.commit()


def _merged(
    tree: NamedTree,
    sources: Mapping[int, Source],
    position: int,
    index: int,
    adapters: Sequence[str] | None,
    safe: bool,
    force: bool,
) -> np.ndarray:
    """One torch tensor of a leaf; of an adapted stack, only the module that is asked for is merged."""
    leaf, source = tree.leaves[position], sources[position]
    if is_adapted(leaf):
        own = None if adapters is None else [name for name in adapters if name in adapter_names(leaf)]
        stack = leaf.layout.axes("s") if isinstance(leaf, LoHaWeight) else ()
        if stack and stack == source.stack and stack == tuple(range(len(stack))):
            where = np.unravel_index(index, leaf.shape[: len(stack)])
            leaf = jax.tree.map(lambda array: array[where], leaf)
            leaf = dataclasses.replace(leaf, layout=leaf.layout.strip(leaf.ndim), names=(leaf.names[index],))
            moved = tuple(tuple(axis - len(stack) for axis in group) for group in source.axes)
            source, index = Source(source.keys[index : index + 1], (), moved), 0
        leaf = merge(leaf, own, safe=safe, force=force)
    return source.tensor(np.asarray(leaf), index)


def _of_base(tree: NamedTree, sources: Mapping[int, Source], position: int, index: int) -> np.ndarray:
    """One torch tensor of an adapted leaf's base."""
    return sources[position].tensor(np.asarray(unload(tree.leaves[position])), index)
