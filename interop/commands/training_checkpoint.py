"""`read_training_checkpoint`: the adapters in a folder that Orbax has written.

loha_jax.checkpoint, tunix, MaxText and most trainers of JAX save with Orbax. Only the factors are
read; other arrays are described by what the folder says of them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from loha_jax.checkpoint import description_file
from loha_jax.checkpoint.orbax_arrays import patient_handlers
from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError

from ..formats.adapter_file import AdapterModule

_TREE = "_METADATA"
"""The file that Orbax keeps beside the arrays of a tree."""

_FINISHED = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that Orbax writes into the folder of a finished checkpoint."""

_PART = "|".join(FACTOR_NAMES)

_BESIDE = re.compile(rf"(?P<kernel>.+)_lora_(?:(?P<adapter>.+)_)?(?P<part>{_PART})")
"""The name of a factor in an NNX model, where it stands beside its kernel."""

_IN_LEAF = re.compile(rf"params(?P<leaf>.*)\.adapters\['(?P<adapter>.*)'\]\.(?P<part>{_PART})")
"""The name of a factor in the description that `loha_jax.checkpoint` writes."""

_OPTIMIZER = re.compile("opt_?state|optimizer(_state)?|ema(_params)?")
"""Parts of the paths of an optimizer's arrays and of averages, named as what they belong to.

Not `mu` or `v`, as optax calls its moments: modules are called so too.
"""


class SavedArray(NamedTuple):
    """An array of a checkpoint that is no factor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class _Place(NamedTuple):
    """Which adapter of which leaf a factor belongs to."""

    leaf: str
    adapter: str
    part: str


@dataclasses.dataclass
class TrainingCheckpoint:
    """What a folder of Orbax holds.

    Attributes:
        step: of the checkpoint that was read, the last one of a run; None if the folder has no
            number for a name.
        steps: of all finished checkpoints of the run.
        items: Orbax' names of the trees in the checkpoint.
        modules: alpha is r where the folder does not say it: only `loha_jax.checkpoint` saves it.
        others: the other arrays.
        remarks: what could not be read, and what is not known.
    """

    step: int | None
    steps: list[int]
    items: list[str]
    modules: list[AdapterModule]
    others: list[SavedArray]
    remarks: list[str]


def is_training_checkpoint(path: Path) -> bool:
    """Return whether a path is a folder of Orbax: a checkpoint, a tree in it, or a whole run."""
    return path.is_dir() and (_is_one(path) or bool(_steps_of(path)))


def read_training_checkpoint(path: Path) -> TrainingCheckpoint:
    """Read the factors in a checkpoint; in the folder of a run, those of its last step.

    Raises:
        FileError: Orbax cannot read the folder.
    """
    path = path.absolute()  # Orbax takes no other
    steps = {} if _is_one(path) else _steps_of(path)
    folder = steps[max(steps)] if steps else path
    found = TrainingCheckpoint(_step_of(folder), sorted(steps), [], [], [], [])
    try:
        described = _description(folder)
        trees = [folder] if (folder / _TREE).exists() else sorted(folder.glob(f"*/{_TREE}"))
        for tree in trees:
            item = tree if tree == folder else tree.parent
            found.items.append(item.name)
            _read_tree(item, described, found)
        if not trees:
            raise ValueError("it holds no tree of arrays")
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise FileError(f"{folder} was written by Orbax and cannot be read: {error}") from error
    return found


def _is_one(path: Path) -> bool:
    return any((path / name).exists() for name in (*_FINISHED, _TREE))


def _steps_of(path: Path) -> dict[int, Path]:
    """Return the folders of the finished checkpoints of a run: `5`, `00000005`, `ckpt_5`."""
    folders = {step: p for p in path.iterdir() if (step := _step_of(p)) is not None}
    return {step: p for step, p in folders.items() if _is_one(p)}


def _step_of(folder: Path) -> int | None:
    number = re.fullmatch(r"(?:.*_)?(\d+)", folder.name)
    return int(number[1]) if number else None


def _description(folder: Path) -> Mapping[str, Any] | None:
    """Return the description that `loha_jax.checkpoint` has written, or None."""
    from etils import epath

    if not (folder / description_file.ITEM / description_file.NAME).exists():
        return None
    if not folder.name.isdigit():
        raise ValueError("a checkpoint of loha_jax.checkpoint is in a folder called as its step")
    return description_file.read(epath.Path(folder), int(folder.name))


def _read_tree(item: Path, described: Mapping[str, Any] | None, found: TrainingCheckpoint) -> None:
    """Add the modules and the other arrays of a tree."""
    import orbax.checkpoint as ocp
    from etils import epath

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is normal here
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=patient_handlers())
    folder = epath.Path(item)
    leaves, structure = jax.tree_util.tree_flatten_with_path(handler.metadata(folder).tree)
    saved = described["leaves"].items() if described else ()
    names = {leaf["item"]: name for name, leaf in saved if "item" in leaf}
    places: list[_Place | None] = []
    for path, leaf in leaves:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = names.get(parts[0], ".".join(parts))
        if described:
            places.append(_place_in_ours(name))
        else:
            places.append(None if _OPTIMIZER.fullmatch(item.name) else _place(parts))
        if places[-1] is None and getattr(leaf, "shape", None) is not None:
            found.others.append(SavedArray(name, tuple(leaf.shape), np.dtype(leaf.dtype)))
    wanted = [x if place else ocp.PLACEHOLDER for (_, x), place in zip(leaves, places, strict=True)]
    as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
    read = handler.restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item=structure.unflatten(wanted), restore_args=structure.unflatten(as_numpy)
        ),
    )
    adapters: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for value, place in zip(structure.flatten_up_to(read), places, strict=True):
        if place:
            adapters.setdefault((place.leaf, place.adapter), {})[place.part] = value
    for (leaf, adapter), arrays in adapters.items():
        about = described["adapters"][f"params{leaf}"] if described else None
        try:
            found.modules.extend(_modules(leaf, adapter, arrays, about))
        except ValueError as error:
            found.remarks.append(f"{leaf}: {error}")
    if adapters and not described:
        found.remarks.append("the folder does not say alpha: alpha/r counts as 1 here")
    if described is None and (item.parent / description_file.ITEM).exists():
        found.remarks.append(
            f"the names of these arrays stand in the folder above: inspect {item.parent}"
        )


def _place(parts: list[str]) -> _Place | None:
    """Return where the array with this path belongs; None if it is no factor."""
    if any(_OPTIMIZER.fullmatch(part) for part in parts[:-1]):
        return None
    for n, part in enumerate(parts):
        if part == "adapters" and n + 2 < len(parts) and parts[n + 2] in FACTOR_NAMES:
            return _Place(".".join(parts[:n]), parts[n + 1], parts[n + 2])
        if beside := _BESIDE.fullmatch(part):
            leaf = ".".join([*parts[:n], beside["kernel"]])
            return _Place(leaf, beside["adapter"] or "default", beside["part"])
    return None


def _place_in_ours(name: str) -> _Place | None:
    inside = _IN_LEAF.fullmatch(name)
    return _Place(inside["leaf"], inside["adapter"], inside["part"]) if inside else None


def _modules(
    leaf: str, adapter: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any] | None
) -> Iterator[AdapterModule]:
    """Yield one module for each kernel of a leaf, which may be a stack of them.

    Args:
        leaf, adapter, arrays: the factors, and what they belong to.
        about: what `loha_jax.checkpoint` says of the leaf, or None.

    Raises:
        ValueError: factors are missing, or it cannot be told which axis counts the kernels.
    """
    slices = _slices(arrays, 0 if about else None)
    r = slices[0]["hada_w1_b"].shape[0]
    names = [leaf] if len(slices) == 1 else [f"{leaf}[{n}]" for n in range(len(slices))]
    ranks, alphas = [r] * len(slices), [float(r)] * len(slices)
    if about:
        settings = about[f"adapter {adapter}"]
        names, ranks = about["names"], settings["ranks"]
        alphas = [alpha * settings["multiplier"] for alpha in settings["alphas"]]
    for name, rank, alpha, one in zip(names, ranks, alphas, slices, strict=True):
        if rank:  # 0: the config does not target this one of a stack
            label = name if adapter == "default" else f"{name} ({adapter})"
            yield AdapterModule(label, "loha", rank, alpha, one)


def _slices(arrays: Mapping[str, np.ndarray], axis: int | None) -> list[dict[str, np.ndarray]]:
    """Return the factors of each kernel in a stack.

    The axes that count the kernels begin at `axis`; None: it is a single one that is to be found.
    """
    needed = [name for name in FACTOR_NAMES if "_t" not in name]
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(f"{', '.join(missing)} is missing")
    count = arrays["hada_w1_a"].ndim - 2
    if axis is None and count:
        axis = _stack_axis(arrays)
        arrays = {name: np.moveaxis(x, axis, 0) for name, x in arrays.items()}
    flat = {name: x.reshape(-1, *x.shape[count:]) for name, x in arrays.items()}
    return [{name: x[n] for name, x in flat.items()} for n in range(len(flat["hada_w1_a"]))]


def _stack_axis(arrays: Mapping[str, np.ndarray]) -> int:
    """Return the axis without which the factors are `[out, r]` and `[r, in]`."""
    a, b = arrays["hada_w1_a"].shape, arrays["hada_w1_b"].shape
    fits = [
        axis
        for axis in range(3)
        if len(a) == len(b) == 3
        and a[axis] == b[axis]
        and np.delete(a, axis)[1] == np.delete(b, axis)[0]
    ]
    if len(fits) != 1 or "hada_t1" in arrays:
        raise ValueError(
            f"the shapes {list(a)} and {list(b)} do not show which axis counts the kernels"
        )
    return fits[0]
