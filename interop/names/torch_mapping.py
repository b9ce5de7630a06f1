"""Mappings `{torch_regex: (jax_path, transform)}` of google-tunix and jax-bonsai models.

A torch name that exactly one pattern matches (`re.match`) becomes
`re.sub(pattern, jax_path, name)`. Its tensor is permuted, then reshaped. bonsai's third element
says to reshape first.

Source: `torch_key_to_jax_key` and `load_and_create_model` in tunix 0.1.7, `map_to_bonsai_key` and
`assign_weights` in jax-bonsai.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.runtime._compat import Literal

from ..disk.base_checkpoint import Checkpoint
from .leaf_source import Source, make_source
from .settled_names import SettledNames, leaf_path

Shape = tuple[int, ...]
TorchMapping = Mapping[str, tuple[str, object]]
"""`{torch_regex: (jax_path, transform)}`; see `Transform.of`."""

Preprocess = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
"""The function that a model's loader runs on the transformed tensors."""


def is_torch_mapping(names: object) -> TypeGuard[TorchMapping]:
    """Return whether a table is a mapping, and not `{regex: template}`."""
    return isinstance(names, Mapping) and any(
        isinstance(v, tuple) and len(v) == 2 and not isinstance(v[1], str) for v in names.values()
    )


@dataclasses.dataclass(frozen=True)
class Transform:
    """A permutation of a torch tensor, then a reshape, or the other way round."""

    permute: Shape | None = None
    reshape: Shape | None = None
    reshape_first: bool = False

    @classmethod
    def of(cls, value: object, pattern: str) -> Transform:
        """Parse None, `(permute, reshape[, reshape_first])` or an enum member of such a value."""
        if isinstance(value, enum.Enum):
            value = value.value
        if value is None:
            return cls()
        if not isinstance(value, tuple) or len(value) not in (2, 3):
            raise ValueError(
                f"The transform of {pattern!r} is None, (permute, reshape) or "
                f"(permute, reshape, reshape_first), got {value!r}"
            )
        permute, reshape, *first = value
        return cls(
            None if permute is None else tuple(permute),
            None if reshape is None else tuple(reshape),
            bool(first and first[0]),
        )

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        """Return the tensor with its axes as the JAX model has them."""
        reshape = self.reshape
        if self.reshape_first and reshape is not None:
            tensor, reshape = tensor.reshape(reshape), None
        tensor = tensor.transpose(self.permute) if self.permute else tensor
        return tensor if reshape is None else tensor.reshape(reshape)

    def source(self, key: str, torch_shape: Shape) -> Source:
        """Return which axis is which, from the strides of an array that is transformed as a view.

        Raises:
            ValueError: the transform does not fit the tensor, or mixes axes of the torch tensor in
                one of the leaf.
        """
        probe = np.zeros(torch_shape, np.uint8)  # never read or written, so that it takes no memory
        try:
            moved = self.apply(probe)
        except ValueError as error:
            raise ValueError(
                f"{key} of shape {list(torch_shape)} does not take {self}: {error}"
            ) from error
        # Where numpy had to copy, no strides describe the result.
        if moved.size and not np.may_share_memory(probe, moved):
            raise ValueError(
                f"{key}: {self} merges axes of the torch tensor in another order; "
                "no layout can say so"
            )
        source = _source_of_strides((key,), moved.shape, torch_shape, moved.strides)
        if source is None:
            raise ValueError(f"{key}: {self} merges axes of the torch tensor; no layout can say so")
        return source


def _source_of_strides(
    keys: tuple[str, ...], shape: Sequence[int], torch_shape: Shape, strides: Sequence[int]
) -> Source | None:
    """Return a source from how far apart neighbours along each axis of the leaf are in torch."""
    size = math.prod(torch_shape)
    steps = [math.prod(torch_shape[n + 1 :]) for n in range(len(torch_shape))]
    stack: list[int] = []
    groups: list[list[int]] = [[] for _ in torch_shape]
    for axis in sorted(range(len(shape)), key=lambda axis: -strides[axis]):
        if shape[axis] == 1:
            continue
        if strides[axis] >= size:
            stack.append(axis)
            continue
        owner = next(
            (t for t, step in enumerate(steps) if step <= strides[axis] and torch_shape[t] != 1),
            None,
        )
        if owner is None:
            return None
        groups[owner].append(axis)
    if [math.prod(shape[axis] for axis in group) for group in groups] != list(torch_shape):
        return None
    return make_source(keys, shape, sorted(stack), groups)


class _Tensor(NamedTuple):
    """A tensor of the checkpoint that becomes one leaf of the model's loader."""

    key: str
    shape: Shape
    transform: Transform


def map_sources(
    mapping: TorchMapping,
    base: str | Path | Mapping[str, Sequence[int]],
    preprocess: Preprocess | None,
) -> SettledNames:
    """Apply a mapping to the names and shapes of a checkpoint; see `NameMap`.

    Args:
        mapping: `{torch_regex: (jax_path, transform)}`.
        base: the checkpoint, or torch shapes by name.
        preprocess: the function that the model's loader runs on the transformed tensors (tunix'
            `preprocess_fn`, which stacks q, k and v or experts). It is run on index numbers, which
            show where each element comes from.
    """
    shapes = base if isinstance(base, Mapping) else Checkpoint(base).shapes
    parsed = [(re.compile(p), path, Transform.of(t, p)) for p, (path, t) in mapping.items()]
    found: dict[str, list[_Tensor]] = {}
    unused: list[str] = []
    for key, shape in shapes.items():
        hits = [(pattern, path, t) for pattern, path, t in parsed if pattern.match(key)]
        if len(hits) != 1:
            unused.append(key)
            continue
        ((pattern, path, transform),) = hits
        tensor = _Tensor(key, tuple(shape), transform)
        found.setdefault(pattern.sub(path, key), []).append(tensor)
    keys_of = {path: [tensor.key for tensor in own] for path, own in found.items()}
    problems = {
        _without_box(path): f"the mapping gives it several tensors: {', '.join(own)}"
        for path, own in keys_of.items()
        if len(own) > 1
    }
    single = {path: own[0] for path, own in found.items() if len(own) == 1}
    sources: dict[str, Source] = {}
    for path, inputs in _dependencies(preprocess, single).items():
        try:
            if preprocess is None or inputs == [path]:
                tensor = single[path]
                source = tensor.transform.source(tensor.key, tensor.shape)
            else:
                source = _preprocessed(preprocess, path, {p: single[p] for p in inputs})
            sources[_without_box(path)] = source
        except ValueError as error:
            problems[_without_box(path)] = str(error)
    return SettledNames(sources, problems, tuple(unused))


def _without_box(path: str) -> str:
    """Return a JAX path without the attribute that boxes the array, as tunix' gemma4 has it."""
    return leaf_path(path.removesuffix(".value").removesuffix(".raw_value").split("."))


def _dependencies(
    preprocess: Preprocess | None, tensors: Mapping[str, _Tensor]
) -> dict[str, list[str]]:
    """Return the inputs that each output of `preprocess` is made of.

    An output that only hands on an input depends only on that one, and has its name.
    """
    if preprocess is None:
        return {path: [path] for path in tensors}

    def shape(tensor: _Tensor) -> jax.ShapeDtypeStruct:
        moved = tensor.transform.apply(np.zeros(tensor.shape, np.uint8))
        return jax.ShapeDtypeStruct(moved.shape, jnp.uint32)

    inputs = {path: shape(tensor) for path, tensor in tensors.items()}
    closed, outputs = jax.make_jaxpr(preprocess, return_shape=True)(inputs)
    names = sorted(inputs)  # as jax flattens a dict
    depends = {var: {name} for var, name in zip(closed.jaxpr.invars, names, strict=True)}
    for equation in closed.jaxpr.eqns:
        variables = [v for v in equation.invars if not isinstance(v, Literal)]
        united = set().union(*(depends.get(v, set()) for v in variables))
        depends.update(dict.fromkeys(equation.outvars, united))
    return {
        name: sorted(depends.get(var, ())) if not isinstance(var, Literal) else []
        for name, var in zip(sorted(outputs), closed.jaxpr.outvars, strict=True)
    }


def _preprocessed(preprocess: Preprocess, path: str, tensors: Mapping[str, _Tensor]) -> Source:
    """Return the source of an output of `preprocess`, from where the elements of its inputs go."""
    keys = tuple(tensor.key for tensor in tensors.values())
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"it is made of tensors of different shapes, {', '.join(keys)}; no layout can say so"
        )
    shape = (len(keys), *shapes.pop())
    if (size := math.prod(shape)) > np.iinfo(np.uint32).max:
        raise ValueError(f"it has {size} elements, more than can be followed through `preprocess`")
    numbers = np.arange(size, dtype=np.uint32).reshape(shape)  # a different one for every element
    moved = (t.transform.apply(own) for t, own in zip(tensors.values(), numbers, strict=True))
    outputs = preprocess(dict(zip(tensors, map(jnp.asarray, moved), strict=True)))
    source = _source_of_numbers(keys, np.asarray(outputs.get(path, ())), numbers)
    if source is None:
        raise ValueError(
            f"`preprocess` does more with {', '.join(keys)} than permute and stack; "
            "no layout can say so"
        )
    return source


def _source_of_numbers(
    keys: tuple[str, ...], leaf: np.ndarray, numbers: np.ndarray
) -> Source | None:
    """Return the source of a leaf that holds the numbers of stacked tensors, or None."""
    if leaf.dtype != numbers.dtype or leaf.size != numbers.size or not leaf.size:
        return None
    size = numbers[0].size
    strides: list[int] = []
    for axis, n in enumerate(leaf.shape):
        after = leaf[tuple(int(n > 1 and other == axis) for other in range(leaf.ndim))]
        step = int(after) - int(leaf.flat[0])
        # The inputs come in any order, so a step between two of them may be negative.
        strides.append(size if n > 1 and abs(step) >= size and step % size == 0 else step)
    if min(strides, default=0) < 0:
        return None
    source = _source_of_strides(keys, leaf.shape, numbers.shape[1:], strides)
    if source is None or math.prod(leaf.shape[a] for a in source.stack) != len(keys):
        return None
    order = [int(source.part(leaf, n).flat[0]) // size for n in range(len(keys))]
    if sorted(order) != list(range(len(keys))):
        return None
    expected = np.empty_like(leaf)
    for n, k in enumerate(order):
        source.put(numbers[k], expected, n)
    if not np.array_equal(expected, leaf):
        return None
    return dataclasses.replace(source, keys=tuple(keys[k] for k in order))
