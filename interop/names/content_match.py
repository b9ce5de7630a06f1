"""Leaves found among the tensors of a torch checkpoint by their contents only.

One tensor is in memory at a time.

A sum of hashed values is the same in whatever order an array keeps them: it finds the tensors that
a leaf, or each index of its stack, may hold. Their contents are then compared under every way to
permute and merge axes that the two shapes allow.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import is_kernel_leaf, torch_parameter

from ..disk.base_checkpoint import Checkpoint
from .leaf_source import Source, make_source
from .value_hashes import coarser, fingerprint, value_bits

Groups = tuple[tuple[int, ...], ...]
Array = np.ndarray | jax.Array
Stack = tuple[int, ...]  # axes of a leaf


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf to be found: its dotted path, the parts of that, and its values."""

    path: str
    parts: tuple[str, ...]
    array: Array


@dataclasses.dataclass(frozen=True)
class Correspondence:
    """One way in which a leaf may be made of torch tensors.

    Attributes:
        keys: for each index of the leaf's stack the tensors that have its contents.
        forms: the ways in which axes may correspond, as sources without names.
        constant: whether all values of an index are the same.
    """

    keys: tuple[tuple[str, ...], ...]
    forms: tuple[Source, ...]
    constant: bool

    @property
    def words(self) -> Iterator[str]:
        """One text per option."""
        if len(self.keys) > 1:
            layouts = " or ".join(str(form.layout or form.axes) for form in self.forms)
            yield f"{', '.join(' or '.join(keys) for keys in self.keys)} ({layouts})"
            return
        for key, form in itertools.product(itertools.chain(*self.keys), self.forms):
            yield f"{key} ({form.layout})" if form.layout else key


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a leaf that contents do not settle."""

    ways: tuple[Correspondence, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """One text per option."""
        return tuple(dict.fromkeys(word for way in self.ways for word in way.words))

    @property
    def keys(self) -> tuple[str, ...]:
        """All torch names that occur."""
        return tuple(dict.fromkeys(key for way in self.ways for own in way.keys for key in own))

    def choose(self, keys: Sequence[str], layout: Layout | None) -> Source:
        """Return the source with these names and this layout.

        Raises:
            ValueError: they are no option, or leave several.
        """
        ways = [way for way in self.ways if _holds(way, keys)]
        if not ways:
            raise ValueError(f"{', '.join(keys)} is none of {'; '.join(self.words)}")
        forms = [
            form for way in ways for form in way.forms if layout is None or form.layout == layout
        ]
        if len(forms) != 1:
            known = ", ".join(str(form.layout) for way in ways for form in way.forms)
            raise ValueError(f"the layout is one of {known}; give (name, layout)")
        return dataclasses.replace(forms[0], keys=tuple(keys))


def _holds(way: Correspondence, keys: Sequence[str]) -> bool:
    return len(keys) == len(way.keys) and all(
        key in own for key, own in zip(keys, way.keys, strict=True)
    )


@dataclasses.dataclass
class Found:
    """The result: by leaf path the sources, the options of what is ambiguous, and why others are unmatched."""

    sources: dict[str, Source]
    ambiguous: dict[str, Options]
    unmatched: dict[str, str]
    unused: list[str]


class _Hits:
    """By index of one way of stacking a leaf, the tensors of one shape that fit, each with the axes that correspond."""

    def __init__(self, count: int):
        self.found: list[dict[str, set[Groups]]] = [{} for _ in range(count)]
        self.constant = True

    def ways(self) -> dict[tuple[tuple[str, ...], ...], list[Groups]]:
        """By the tensors at each index the correspondences under which all of them hold."""
        result: dict[tuple[tuple[str, ...], ...], list[Groups]] = defaultdict(list)
        for groups in sorted({g for index in self.found for own in index.values() for g in own}):
            keys = tuple(
                tuple(key for key, own in index.items() if groups in own) for index in self.found
            )
            if all(keys):
                result[keys].append(groups)
        return result


def match_contents(leaves: Sequence[Leaf], checkpoint: Checkpoint) -> Found:
    """Find every leaf; see `NameMap.infer`."""
    slots = _slots(leaves, checkpoint)
    hits: dict[tuple[int, Stack, tuple[int, ...]], _Hits] = {}
    wanted = {(dtype, size) for dtype, size, _ in slots}
    for key, shape in checkpoint.shapes.items():
        size = math.prod(shape)
        kinds = {
            (own, common)
            for own, common, n in _kinds(leaves, checkpoint, key)
            if (common, n) in wanted
        }
        if not kinds:
            continue
        tensor = checkpoint.read(key)
        for common in sorted({common for _, common in kinds}, key=str):
            bits = value_bits(tensor, common)
            for n, stack, index in slots.get((common, size, fingerprint(bits)), ()):
                leaf = leaves[n].array
                if coarser(leaf.dtype, tensor.dtype) != common:
                    continue
                groups = _verify(_slice(leaf, stack, index), common, bits, leaf.shape, stack, shape)
                if groups:
                    sizes = [leaf.shape[axis] for axis in stack]
                    own = hits.setdefault((n, stack, shape), _Hits(math.prod(sizes)))
                    own.found[int(np.ravel_multi_index(index, sizes)) if stack else 0][key] = groups
                    own.constant &= bits.size == 0 or bool((bits == bits.flat[0]).all())
    return _resolve(leaves, hits, checkpoint)


def _kinds(
    leaves: Sequence[Leaf], checkpoint: Checkpoint, key: str
) -> Iterator[tuple[np.dtype, np.dtype, int]]:
    size = math.prod(checkpoint.shapes[key])
    for dtype in {np.dtype(leaf.array.dtype) for leaf in leaves}:
        if (common := coarser(dtype, checkpoint.dtypes[key])) is not None:
            yield dtype, common, size


def _slots(leaves: Sequence[Leaf], checkpoint: Checkpoint) -> dict[Any, list[Any]]:
    """Fingerprints of every leaf and of every index of every way to stack it that the sizes of the tensors allow."""
    sizes = Counter(math.prod(shape) for shape in checkpoint.shapes.values())
    slots: dict[Any, list[Any]] = defaultdict(list)
    for n, leaf in enumerate(leaves):
        shape = tuple(leaf.array.shape)
        found = (coarser(leaf.array.dtype, dtype) for dtype in set(checkpoint.dtypes.values()))
        commons = {common for common in found if common is not None}
        for stack in _stacks(shape, sizes):
            for index in np.ndindex(*(shape[axis] for axis in stack)):
                part = _slice(leaf.array, stack, index)
                for common in commons:
                    bits = value_bits(part, common)
                    slots[common, bits.size, fingerprint(bits)].append((n, stack, index))
    return slots


def _stacks(shape: tuple[int, ...], sizes: Mapping[int, int]) -> Iterator[Stack]:
    """No axis, each axis and each pair, where the checkpoint has enough tensors of the remaining size."""
    total = math.prod(shape)
    for length in range(3):
        for stack in itertools.combinations(range(len(shape)), length):
            count = math.prod(shape[axis] for axis in stack)
            if any(shape[axis] == 1 for axis in stack) or not count:
                continue
            if sizes.get(total // count, 0) >= count:
                yield stack


def _slice(leaf: Array, stack: Stack, index: tuple[int, ...]) -> np.ndarray:
    where: list[int | slice] = [slice(None)] * len(leaf.shape)
    for axis, n in zip(stack, index, strict=True):
        where[axis] = n
    return np.asarray(leaf)[tuple(where)]


def _verify(
    part: np.ndarray,
    dtype: np.dtype,
    bits: np.ndarray,
    shape: Sequence[int],
    stack: Stack,
    torch_shape: Sequence[int],
) -> set[Groups]:
    """All correspondences of axes under which a part of a leaf is the tensor."""
    own = value_bits(part, dtype)
    axes = [axis for axis in range(len(shape)) if axis not in stack]
    verified = set()
    for groups in _correspondences([(a, shape[a]) for a in axes if shape[a] != 1], torch_shape):
        order = [axes.index(axis) for group in groups for axis in group]
        ones = [n for n, axis in enumerate(axes) if shape[axis] == 1]
        moved = own.transpose([*order, *ones])
        if _equal(moved, bits.reshape(moved.shape)):
            verified.add(groups)
    return verified


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.size > 4096:  # a wrong order almost always shows in a few places
        some = np.unravel_index(np.random.default_rng(1).integers(0, a.size, 256), a.shape)
        if not np.array_equal(a[some], b[some]):
            return False
    return np.array_equal(a, b)


def _correspondences(axes: list[tuple[int, int]], torch_shape: Sequence[int]) -> Iterator[Groups]:
    """Every way to make each torch axis out of some axes of the leaf, in some order, using each once."""
    if not torch_shape:
        if not axes:
            yield ()
        return
    for group, rest in _products(axes, torch_shape[0]):
        for others in _correspondences(rest, torch_shape[1:]):
            yield (group, *others)


def _products(
    axes: list[tuple[int, int]], size: int
) -> Iterator[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    if size == 1:
        yield (), axes
        return
    for n, (axis, length) in enumerate(axes):
        if size % length == 0 and length:
            for group, rest in _products(axes[:n] + axes[n + 1 :], size // length):
                yield (axis, *group), rest


def _resolve(
    leaves: Sequence[Leaf],
    hits: Mapping[tuple[int, Stack, tuple[int, ...]], _Hits],
    checkpoint: Checkpoint,
) -> Found:
    """Settle leaves by contents, then by a settled neighbour in the same module; list the rest."""
    ways: dict[int, list[Correspondence]] = defaultdict(list)
    for (n, stack, _), own in hits.items():
        for keys, groups in own.ways().items():
            shape, names = tuple(leaves[n].array.shape), tuple(itertools.chain(*keys))
            forms = (make_source(names, shape, stack, group) for group in groups)
            ways[n].append(
                Correspondence(
                    keys, tuple(dataclasses.replace(form, keys=()) for form in forms), own.constant
                )
            )
    claims = Counter(
        key for own in ways.values() for way in own for index in way.keys for key in index
    )
    result = Found({}, {}, {}, [])
    for n, own in ways.items():
        keys, also = _keys(own[0], claims)
        if len(own) == 1 and len(own[0].forms) == 1 and keys is not None:
            result.sources[leaves[n].path] = dataclasses.replace(
                own[0].forms[0], keys=keys, also=also
            )
    modules: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for leaf in leaves:
        if (source := result.sources.get(leaf.path)) and not source.also:
            modules[leaf.parts[:-1]].add(tuple(key.rpartition(".")[0] for key in source.keys))
    for n, leaf in enumerate(leaves):
        if leaf.path in result.sources:
            continue
        if n not in ways:
            result.unmatched[leaf.path] = _why(
                leaf, [own for (m, stack, _), own in hits.items() if m == n and stack]
            )
        elif source := _of_neighbour(leaf, ways[n], modules.get(leaf.parts[:-1], set()), claims):
            result.sources[leaf.path] = source
        else:
            result.ambiguous[leaf.path] = Options(tuple(ways[n]))
    result.sources = {
        leaf.path: result.sources[leaf.path] for leaf in leaves if leaf.path in result.sources
    }
    used = {key for own in hits.values() for index in own.found for key in index}
    result.unused = [key for key in checkpoint.shapes if key not in used]
    return result


def _keys(
    way: Correspondence, claims: Mapping[str, int]
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The torch names of a leaf where contents settle them, and further names of the same values."""
    contested = any(claims[key] > 1 for own in way.keys for key in own)
    several = any(len(own) > 1 for own in way.keys)
    if (way.constant and (contested or several)) or (several and (contested or len(way.keys) > 1)):
        return None, ()
    keys = tuple(next(iter(own)) for own in way.keys)
    also = tuple(key for own in way.keys for key in own if key not in keys)
    return (keys, also) if len(set(keys)) == len(keys) else (None, ())


def _of_neighbour(
    leaf: Leaf,
    ways: Sequence[Correspondence],
    owners: set[tuple[str, ...]],
    claims: Mapping[str, int],
) -> Source | None:
    """The source of a parameter whose contents fit, among others, the module that holds its neighbour."""
    keys = None
    if len(owners) == 1:
        keys = tuple(f"{module}.{torch_parameter(leaf.parts)}" for module in next(iter(owners)))
        ways = [way for way in ways if _holds(way, keys)]
    elif len(ways) == 1:
        keys, _ = _keys(ways[0], claims)
    if keys is None or len(ways) != 1:
        return None
    form, *others = ways[0].forms
    if others and (is_kernel_leaf(leaf.parts) or len(form.axes) != 1):
        return None
    return dataclasses.replace(
        form, keys=keys
    )  # of a bias that is equal in any order of its axes, the natural one


def _why(leaf: Leaf, stacked: Sequence[_Hits]) -> str:
    best = max(stacked, key=lambda own: sum(map(bool, own.found)), default=None)
    if best is not None and (lost := [str(n) for n, index in enumerate(best.found) if not index]):
        return f"of its stack no tensor holds index {', '.join(lost)}"
    return f"no tensor of the checkpoint has its {math.prod(leaf.array.shape)} values in any order of its axes"
