"""Mappings `{torch_regex: (jax_path, transform)}` of google-tunix and jax-bonsai models.

Source: `torch_key_to_jax_key` and `load_and_create_model` in tunix 0.1.7, `map_to_bonsai_key` and
`assign_weights` in jax-bonsai: a torch name that exactly one pattern matches (`re.match`) becomes
`re.sub(pattern, jax_path, name)`, its tensor is permuted, then reshaped; bonsai's third element
says to reshape first.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.runtime._compat import Literal

from .leaf_source import Source, make_source

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
                f"The transform of {pattern!r} is None, (permute, reshape) or (permute, reshape, reshape_first), got "
                f"{value!r}"
            )
        permute, reshape, *first = value
        return cls(
            None if permute is None else tuple(permute),
            None if reshape is None else tuple(reshape),
            bool(first and first[0]),
        )

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        """Return the tensor with its axes as the JAX model has them."""
        if self.reshape_first and self.reshape is not None:
            tensor = tensor.reshape(self.reshape)
        if self.permute:
            tensor = tensor.transpose(self.permute)
        if not self.reshape_first and self.reshape is not None:
            tensor = tensor.reshape(self.reshape)
        return tensor

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
        if moved.size and not np.may_share_memory(
            probe, moved
        ):  # numpy had to copy: no strides describe the result
            raise ValueError(
                f"{key}: {self} merges axes of the torch tensor in another order; no layout can say so"
            )
        source = _source_of_strides((key,), moved.shape, torch_shape, moved.strides)
        if source is None:
            raise ValueError(f"{key}: {self} merges axes of the torch tensor; no layout can say so")
        return source


def _source_of_strides(
    keys: tuple[str, ...], shape: Sequence[int], torch_shape: Shape, strides: Sequence[int]
) -> Source | None:
    """A source from the distance that one step along each axis of the leaf makes in the (stacked) torch tensors."""
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


@dataclasses.dataclass
class MappedSources:
    """The result of a mapping that was run on a checkpoint.

    Attributes:
        sources: by JAX path.
        problems: why a JAX path that the mapping names has no source.
        unused: torch names that no pattern matches, or more than one.
    """

    sources: dict[str, Source]
    problems: dict[str, str]
    unused: list[str]


def map_sources(
    mapping: TorchMapping,
    shapes: Mapping[str, Shape],
    preprocess: Preprocess | None = None,
) -> MappedSources:
    """Apply a mapping to the names and shapes of a checkpoint.

    Args:
        mapping: `{torch_regex: (jax_path, transform)}`.
        shapes: torch shapes by name.
        preprocess: the function that the model's loader runs on the transformed tensors (tunix'
            `preprocess_fn`, which stacks q, k and v or experts). It is run on index numbers, which
            show where each element comes from.
    """
    parsed = [(re.compile(p), path, Transform.of(t, p)) for p, (path, t) in mapping.items()]
    found: dict[str, list[tuple[str, Transform]]] = {}
    unused: list[str] = []
    for key in shapes:
        hits = [
            (pattern.sub(path, key), transform)
            for pattern, path, transform in parsed
            if pattern.match(key)
        ]
        if len(hits) == 1:
            found.setdefault(hits[0][0], []).append((key, hits[0][1]))
        else:
            unused.append(key)
    result = MappedSources({}, {}, unused)
    single: dict[str, tuple[str, Transform]] = {}
    for path, entries in found.items():
        if len(entries) == 1:
            single[path] = entries[0]
        else:
            result.problems[path] = (
                f"the mapping gives it several tensors: {', '.join(k for k, _ in entries)}"
            )
    if preprocess is None:
        for path, (key, transform) in single.items():
            try:
                result.sources[path] = transform.source(key, shapes[key])
            except ValueError as error:
                result.problems[path] = str(error)
        return result
    for path, inputs in _dependencies(preprocess, single, shapes).items():
        try:
            if inputs == [path]:
                result.sources[path] = single[path][1].source(
                    single[path][0], shapes[single[path][0]]
                )
            else:
                result.sources[path] = _preprocessed(
                    preprocess, path, {p: single[p] for p in inputs}, shapes
                )
        except ValueError as error:
            result.problems[path] = str(error)
    return result


def _dependencies(
    preprocess: Preprocess,
    entries: Mapping[str, tuple[str, Transform]],
    shapes: Mapping[str, Shape],
) -> dict[str, list[str]]:
    """The inputs that each output of `preprocess` is made of; one that is handed on depends only on itself."""

    def shape(key: str, transform: Transform) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            transform.apply(np.zeros(shapes[key], np.uint8)).shape, jnp.uint32
        )

    inputs = {path: shape(*entry) for path, entry in entries.items()}
    closed, outputs = jax.make_jaxpr(preprocess, return_shape=True)(inputs)
    names = sorted(inputs)  # as jax flattens a dict
    depends = {var: {name} for var, name in zip(closed.jaxpr.invars, names, strict=True)}
    for equation in closed.jaxpr.eqns:
        united = set().union(
            *(depends.get(v, set()) for v in equation.invars if not isinstance(v, Literal))
        )
        depends.update(dict.fromkeys(equation.outvars, united))
    return {
        name: sorted(depends.get(var, ())) if not isinstance(var, Literal) else []
        for name, var in zip(sorted(outputs), closed.jaxpr.outvars, strict=True)
    }


def _preprocessed(
    preprocess: Preprocess,
    path: str,
    entries: Mapping[str, tuple[str, Transform]],
    shapes: Mapping[str, Shape],
) -> Source:
    """The source of an output of `preprocess`, from where the elements of its inputs go."""
    keys = [key for key, _ in entries.values()]
    torch_shape = shapes[keys[0]] if keys else ()
    size = math.prod(torch_shape)
    if not keys or len({shapes[key] for key in keys}) != 1:
        raise ValueError(
            f"it is made of tensors of different shapes, {', '.join(keys)}; no layout can say so"
        )
    if size * len(keys) > np.iinfo(np.uint32).max:
        raise ValueError(
            f"it has {size * len(keys)} elements, more than can be followed through `preprocess`"
        )
    tensors = [
        np.arange(n * size, (n + 1) * size, dtype=np.uint32).reshape(torch_shape)
        for n in range(len(keys))
    ]
    inputs = {p: jnp.asarray(t.apply(tensors[n])) for n, (p, (_, t)) in enumerate(entries.items())}
    outputs = preprocess(inputs)
    leaf = np.asarray(outputs[path]) if path in outputs else np.zeros(0, np.uint32)
    error = ValueError(
        f"`preprocess` does more with {', '.join(keys)} than permute and stack; no layout can say so"
    )
    if leaf.dtype != np.uint32 or leaf.size != size * len(keys):
        raise error
    corner = (0,) * leaf.ndim
    first = int(leaf[corner])
    strides = []
    for axis, n in enumerate(leaf.shape):
        step = int(leaf[(*corner[:axis], 1, *corner[axis + 1 :])]) - first if n > 1 else 0
        # the inputs come in any order, so that a step between two of them may be negative
        strides.append(size if n > 1 and abs(step) >= size and step % size == 0 else step)
    source = (
        _source_of_strides(tuple(keys), leaf.shape, torch_shape, strides)
        if min(strides, default=0) >= 0
        else None
    )
    if source is None or math.prod(leaf.shape[a] for a in source.stack) != len(keys):
        raise error
    heads = [int(source.part(leaf, n).reshape(-1)[0]) for n in range(len(keys))]
    if any(head % size for head in heads):
        raise error
    order = [head // size for head in heads]
    expected = np.empty_like(leaf)
    for n, k in enumerate(order):
        source.put(tensors[k], expected, n)
    if sorted(order) != list(range(len(keys))) or not np.array_equal(expected, leaf):
        raise error
    return dataclasses.replace(source, keys=tuple(keys[k] for k in order))
