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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.targets.module_names import Names, is_kernel_leaf, module_name, torch_parameter
from loha_jax.targets.row_transforms import row_transform
from loha_jax.targets.used_names import check_used
from loha_jax.tree.leaves import base_of, leaves_by_path
from loha_jax.tree.quantised import wrapped

from ..disk.base_checkpoint import Checkpoint
from .leaf_options import Correspondence, Options
from .leaf_source import Source, make_source
from .settled_names import SettledNames, leaf_path
from .value_hashes import coarser, fingerprint, value_bits

Array = np.ndarray | jax.Array
Groups = tuple[tuple[int, ...], ...]
Shape = tuple[int, ...]
Stack = tuple[int, ...]  # axes of a leaf
Slots = dict[tuple[np.dtype, int, int], list[tuple[int, Stack, tuple[int, ...]]]]
"""By dtype, size and fingerprint the parts of leaves: leaf number, stack axes, index."""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf to be found: its dotted path, the parts of that, its values and their transform."""

    path: str
    parts: tuple[str, ...]
    array: Array
    rows: RowTransform | None

    def part(self, stack: Stack, index: tuple[int, ...]) -> np.ndarray:
        """Return the values at an index of the stack, times the scale that torch's have."""
        part = _slice(self.array, stack, index)
        if self.rows is None or self.rows.scale == 1:
            return part
        scale = RowTransform(scale=self.rows.scale)
        return scale.to_torch(part.reshape(-1), dtype=float32_or_wider(part.dtype)).reshape(
            part.shape
        )

    def bits(self, tensor: np.ndarray) -> np.ndarray | None:
        """Return a tensor's bits in the leaf's order of rows; None for other numbers of rows."""
        if self.rows is None:
            return tensor
        if not tensor.ndim or self.rows.problem(tensor.shape[:1]):
            return None
        return self.rows.unscaled.from_torch(tensor)


class _Hits:
    """The tensors of one shape that fit one way of stacking a leaf.

    Attributes:
        found: for each index of the stack the tensors, each with the axes that correspond.
        constant: whether all values of an index are the same.
    """

    def __init__(self, count: int):
        self.found: list[dict[str, set[Groups]]] = [{} for _ in range(count)]
        self.constant = True

    def ways(self) -> dict[tuple[tuple[str, ...], ...], list[Groups]]:
        """Return, by the tensors at each index, the correspondences that hold for all of them."""
        result: dict[tuple[tuple[str, ...], ...], list[Groups]] = defaultdict(list)
        for groups in sorted({g for index in self.found for own in index.values() for g in own}):
            keys = tuple(
                tuple(key for key, own in index.items() if groups in own) for index in self.found
            )
            if all(keys):
                result[keys].append(groups)
        return result


Hits = dict[tuple[int, Stack, Shape], _Hits]
"""By leaf number, stack axes and the tensors' shape."""


def match_contents(params: PyTree, base: str | Path, names: Names) -> SettledNames:
    """Find each leaf among the tensors of a checkpoint; see `NameMap.infer`.

    Args:
        params, base: as for `NameMap.infer`.
        names: gives the transforms of rows.
    """
    leaves = _leaves(params, names)
    checkpoint = Checkpoint(base)
    if checkpoint.quantisation.scales or checkpoint.quantisation.packed:
        raise ValueError(
            f"NameMap.infer compares values, and {base} is quantised "
            f"({checkpoint.quantisation.example}). Give it the float checkpoint of the same model"
        )
    slots = _slots(leaves, checkpoint)
    hits: Hits = {}
    wanted = {(dtype, size) for dtype, size, _ in slots}
    dtypes = {np.dtype(leaf.array.dtype) for leaf in leaves}
    for key, shape in checkpoint.shapes.items():
        size = math.prod(shape)
        found = {coarser(dtype, checkpoint.dtypes[key]) for dtype in dtypes}
        commons = [dtype for dtype in found if dtype is not None and (dtype, size) in wanted]
        tensor = checkpoint.read(key) if commons else np.zeros(0)
        for common in sorted(commons, key=str):
            bits = value_bits(tensor, common)
            for n, stack, index in slots.get((common, size, fingerprint(bits)), ()):
                leaf, own_bits = leaves[n].array, leaves[n].bits(bits)
                if coarser(leaf.dtype, tensor.dtype) != common or own_bits is None:
                    continue
                part = leaves[n].part(stack, index)
                if groups := _verify(part, common, own_bits, leaf.shape, stack, shape):
                    sizes = [leaf.shape[axis] for axis in stack]
                    own = hits.setdefault((n, stack, shape), _Hits(math.prod(sizes)))
                    own.found[int(np.ravel_multi_index(index, sizes)) if stack else 0][key] = groups
                    own.constant &= bits.size == 0 or bool((bits == bits.flat[0]).all())
    return _resolve(leaves, hits, checkpoint)


def _leaves(params: PyTree, names: Names) -> list[_Leaf]:
    """Return the leaves of a tree that have values to compare.

    Raises:
        TypeError: the tree holds shapes.
        ValueError: a transform of `names` has no module in the tree.
    """
    leaves: list[_Leaf] = []
    found = leaves_by_path(params)
    check_used(names, {module_name(parts) for parts, _ in found})
    for parts, leaf in found:
        leaf = wrapped(base_of(leaf))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                "NameMap.infer compares values, and the tree holds shapes (jax.ShapeDtypeStruct). "
                "Give it the parameters that were loaded from this checkpoint."
            )
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if is_array and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            rows = row_transform(module_name(parts), names)
            leaves.append(_Leaf(leaf_path(parts), parts, leaf, rows))
    return leaves


def _slots(leaves: Sequence[_Leaf], checkpoint: Checkpoint) -> Slots:
    """Fingerprint every leaf, and every index of every way to stack it.

    Only stacks that the sizes of the tensors allow are tried.
    """
    sizes = Counter(math.prod(shape) for shape in checkpoint.shapes.values())
    slots: Slots = defaultdict(list)
    for n, leaf in enumerate(leaves):
        shape = tuple(leaf.array.shape)
        found = (coarser(leaf.array.dtype, dtype) for dtype in set(checkpoint.dtypes.values()))
        commons = {common for common in found if common is not None}
        for stack in _stacks(shape, sizes):
            for index in np.ndindex(*(shape[axis] for axis in stack)):
                part = leaf.part(stack, index)
                for common in commons:
                    bits = value_bits(part, common)
                    slots[common, bits.size, fingerprint(bits)].append((n, stack, index))
    return slots


def _stacks(shape: Shape, sizes: Mapping[int, int]) -> Iterator[Stack]:
    """Yield no axis, each axis and each pair for which there are enough tensors."""
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
    """Return all correspondences of axes under which a part of a leaf is the tensor."""
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
    """Yield every way to make each torch axis out of some axes of the leaf, in any order."""
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


def _resolve(leaves: Sequence[_Leaf], hits: Hits, checkpoint: Checkpoint) -> SettledNames:
    """Settle leaves by contents, then by a settled neighbour in the same module; list the rest."""
    ways = _ways(leaves, hits)
    claims = Counter(
        key for own in ways.values() for way in own for index in way.keys for key in index
    )
    settled: dict[int, Source] = {}
    modules: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for n, own in ways.items():
        keys, also = _keys(own[0], claims)
        if len(own) == 1 and len(own[0].forms) == 1 and keys is not None:
            settled[n] = dataclasses.replace(own[0].forms[0], keys=keys, also=also)
            if not also:
                modules[leaves[n].parts[:-1]].add(tuple(key.rpartition(".")[0] for key in keys))
    sources: dict[str, Source] = {}
    options: dict[str, Options] = {}
    unmatched: dict[str, str] = {}
    for n, leaf in enumerate(leaves):
        if n not in ways:
            unmatched[leaf.path] = _why(
                leaf, [h for (m, stack, _), h in hits.items() if m == n and stack]
            )
            continue
        owners = modules.get(leaf.parts[:-1], set())
        source = settled.get(n) or _of_neighbour(leaf, ways[n], owners, claims)
        if source is not None:
            sources[leaf.path] = source
        else:
            options[leaf.path] = Options(tuple(ways[n]))
    used = {key for own in hits.values() for index in own.found for key in index}
    return SettledNames(
        sources,
        unmatched,
        tuple(key for key in checkpoint.shapes if key not in used),
        options,
        frozenset(path for path, source in sources.items() if source.also),
        {leaf.path: tuple(leaf.array.shape) for leaf in leaves},
    )


def _ways(leaves: Sequence[_Leaf], hits: Hits) -> dict[int, list[Correspondence]]:
    """Return the ways in which each leaf may be made of tensors, by leaf number."""
    ways: dict[int, list[Correspondence]] = defaultdict(list)
    for (n, stack, _), own in hits.items():
        for keys, groups in own.ways().items():
            shape, names = tuple(leaves[n].array.shape), tuple(itertools.chain(*keys))
            forms = (make_source(names, shape, stack, group) for group in groups)
            nameless = tuple(dataclasses.replace(form, keys=()) for form in forms)
            ways[n].append(Correspondence(keys, nameless, own.constant))
    return ways


def _keys(
    way: Correspondence, claims: Mapping[str, int]
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the torch names of a leaf if contents settle them, and others of the same values."""
    contested = any(claims[key] > 1 for own in way.keys for key in own)
    several = any(len(own) > 1 for own in way.keys)
    if (way.constant and (contested or several)) or (several and (contested or len(way.keys) > 1)):
        return None, ()
    keys = tuple(next(iter(own)) for own in way.keys)
    also = tuple(key for own in way.keys for key in own if key not in keys)
    return (keys, also) if len(set(keys)) == len(keys) else (None, ())


def _of_neighbour(
    leaf: _Leaf,
    ways: Sequence[Correspondence],
    owners: set[tuple[str, ...]],
    claims: Mapping[str, int],
) -> Source | None:
    """Return the source of a parameter whose contents fit the module that holds its neighbour."""
    keys = None
    if len(owners) == 1:
        keys = tuple(f"{module}.{torch_parameter(leaf.parts)}" for module in next(iter(owners)))
        ways = [way for way in ways if way.holds(keys)]
    elif len(ways) == 1:
        keys, _ = _keys(ways[0], claims)
    if keys is None or len(ways) != 1:
        return None
    form, *others = ways[0].forms
    if others and (is_kernel_leaf(leaf.parts) or len(form.axes) != 1):
        return None
    # A bias that is equal in any order of its axes has the natural one.
    return dataclasses.replace(form, keys=keys)


def _why(leaf: _Leaf, stacked: Sequence[_Hits]) -> str:
    best = max(stacked, key=lambda own: sum(map(bool, own.found)), default=None)
    if best is not None and (lost := [str(n) for n, index in enumerate(best.found) if not index]):
        return f"of its stack no tensor holds index {', '.join(lost)}"
    size = math.prod(leaf.array.shape)
    moved = "" if leaf.rows is None else f", with {leaf.rows}"
    return f"no tensor of the checkpoint has its {size} values in any order of its axes{moved}"
