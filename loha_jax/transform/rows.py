"""`in_axes` of `loha_jax.adapt`: which arguments of a function have a row per example."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.transform.arguments import flatten, flatten_with_path, is_array
from loha_jax.tree.containers import adapted_leaves, is_model_part
from loha_jax.tree.leaves import is_adapted


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array with its axis of rows, in the place of the array. Not a pytree, but a leaf."""

    array: jax.Array
    axis: int


def mark_rows(
    fn: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    in_axes: object,
    batch: int,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments with `Rows` in place of the arrays that have rows.

    Args:
        fn: names the arguments.
        args, kwargs: of `fn`.
        in_axes: as for `loha_jax.adapt`.
        batch: number of rows.

    Raises:
        ValueError: `in_axes` does not fit the arguments; or it is not given, and the arguments do
            not decide it.
    """
    given = [_Argument(name, value) for name, value in (*enumerate(args), *kwargs.items())]
    names = _names(fn, args, kwargs)
    for argument, name in zip(given, names, strict=True):
        argument.label = name
    _spread(given, len(args), in_axes)
    if undecided := [argument for argument in given if argument.axes is None]:
        _decide(undecided, given, batch)
    marked = [argument.marked(batch) for argument in given]
    if not any(
        isinstance(leaf, Rows)
        for value in marked
        for leaf in jax.tree.leaves(value, is_leaf=_is_leaf)
    ):
        raise ValueError(
            f"No argument has a row for each of the {batch} entries of adapter_index: in_axes, or "
            f"a first axis of {batch} of the one array besides the adapted tree, says which do"
        )
    return tuple(marked[: len(args)]), dict(zip(kwargs, marked[len(args) :], strict=True))


@dataclasses.dataclass
class _Argument:
    """One argument of a call.

    Attributes:
        key: its position or its keyword.
        value: the argument.
        label: the name that errors give it.
        axes: for each leaf the axis of rows, or None; None as a whole is not decided yet.
    """

    key: int | str
    value: object
    label: str = ""
    axes: list[int | None] | None = None

    def __post_init__(self) -> None:
        paths, self.treedef = flatten_with_path(self.value, is_leaf=_is_leaf)
        self.paths, self.leaves = [path for path, _ in paths], [leaf for _, leaf in paths]
        self.is_adapted = bool(adapted_leaves(self.value))
        self.unadapted: set[object] = _unadapted_parts(self.value) if self.is_adapted else set()

    @property
    def entry(self) -> str:
        """A proposal for its place in `in_axes`."""
        if not self.unadapted:
            return "None" if self.is_adapted else "0"
        entries = {key: 0 if key in self.unadapted else None for key, _ in _parts(self.value)}
        return repr(entries if isinstance(self.value, Mapping) else tuple(entries.values()))

    def arrays(self) -> Iterator[tuple[str, jax.Array]]:
        """Yield the arrays that may have rows, which weights cannot, with a readable name."""
        for path, leaf in zip(self.paths, self.leaves, strict=True):
            first = getattr(path[0], "key", getattr(path[0], "idx", None)) if path else None
            if self.is_adapted and not (path and first in self.unadapted):
                continue
            if is_array(leaf) and leaf.ndim:
                yield f"{self.label}{jax.tree_util.keystr(path)}", leaf

    def marked(self, batch: int) -> object:
        """Return the argument with `Rows`."""
        leaves = list(self.leaves)
        for n, (leaf, axis) in enumerate(zip(leaves, self.axes or (), strict=True)):
            name = f"{self.label}{jax.tree_util.keystr(self.paths[n])}"
            if axis is None or not (is_array(leaf) or is_adapted(leaf) or is_model_part(leaf)):
                continue
            if not is_array(leaf):
                raise ValueError(
                    f"{name} is adapted: it has no rows, and its place in in_axes is None"
                )
            if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != batch:
                raise ValueError(
                    f"in_axes says {axis} for {name} of shape {leaf.shape}: that axis does not "
                    f"hold the {batch} rows of adapter_index"
                )
            leaves[n] = Rows(leaf, axis % leaf.ndim)
        return self.treedef.unflatten(leaves)


def _parts(value: object) -> list[tuple[object, object]]:
    """Return the items of a mapping or a tuple, with their keys; of anything else none."""
    if isinstance(value, Mapping):
        return list(cast(Mapping[object, object], value).items())
    return list(enumerate(cast(tuple[object, ...], value))) if type(value) is tuple else []


def _unadapted_parts(value: object) -> set[object]:
    """Return the keys of the parts of an adapted argument that hold no weights.

    These are `cache` besides Flax' `params`, and other items of a tuple.
    """
    if isinstance(value, Mapping) and "params" not in value:
        return set()
    parts = _parts(cast(object, value))
    return {key for key, part in parts if key != "params" and not adapted_leaves(part)}


def _is_leaf(x: object) -> bool:
    return is_adapted(x) or is_model_part(x)


def _names(
    fn: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> list[str]:
    """Return the function's own names of its arguments."""
    numbered = [f"argument {n}" for n in range(len(args))]
    try:
        bound = inspect.signature(fn).bind_partial(*args).arguments
        parameters = [p for p in inspect.signature(fn).parameters.values() if p.name in bound]
    except (TypeError, ValueError):
        parameters = []
    plain = [p.name for p in parameters if p.kind != inspect.Parameter.VAR_POSITIONAL]
    return [*plain, *numbered[len(plain) :], *kwargs]


def _spread(given: Sequence[_Argument], count: int, in_axes: object) -> None:
    """Set the axes of the arguments that `in_axes` names."""
    if in_axes is None:
        return
    if _is_int(in_axes):
        for argument in given:
            argument.axes = [None if argument.is_adapted else int(in_axes)] * len(argument.leaves)
        return
    if isinstance(in_axes, Mapping):
        by_name: dict[object, _Argument] = {argument.label: argument for argument in given}
        by_name |= {argument.key: argument for argument in given}
        named = cast(Mapping[object, object], in_axes)
        if unknown := [name for name in named if name not in by_name]:
            raise ValueError(f"in_axes names {unknown[0]!r}, which is no argument of this call")
        said = [(by_name[name], axes) for name, axes in named.items()]
    elif isinstance(in_axes, tuple | list) and len(cast(Sequence[object], in_axes)) == count:
        said = list(zip(given, cast(Sequence[object], in_axes), strict=False))
    else:
        raise ValueError(
            f"in_axes is an integer, one entry for each of the {count} positional arguments, or a "
            f"dict by the names of arguments, got {in_axes!r}"
        )
    for argument, axes in said:
        argument.axes = spread(axes, argument.value, f"in_axes for {argument.label}")


def spread(axes: object, tree: object, what: str) -> list[int | None]:
    """Return a prefix of a tree, of integers and None, as one entry for each leaf.

    Raises:
        ValueError: it is no prefix, or holds something else; the message begins with `what`.
    """
    result: list[int | None] = []

    def add(axis: object, part: object) -> None:
        if axis is not None and not _is_int(axis):
            raise ValueError(f"{what} holds {axis!r}, which is neither an integer nor None")
        result.extend([int(axis) if _is_int(axis) else None] * len(flatten(part, _is_leaf)[0]))

    try:
        jax.tree.map(add, axes, tree, is_leaf=lambda axis: axis is None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {axes!r} is no prefix of its tree: {error}") from None
    return result


def _decide(undecided: Sequence[_Argument], given: Sequence[_Argument], batch: int) -> None:
    """Give the one array that has an axis of the batch's size rows along its first axis.

    Raises:
        ValueError: several arrays have one.
    """
    for argument in undecided:
        argument.axes = [None for _ in argument.leaves]
    fitting = [
        (argument, name, array)
        for argument in undecided
        for name, array in argument.arrays()
        if any(size == batch for size in array.shape)
    ]
    if not fitting:
        return
    said = len(undecided) < len(given) and any(
        axis is not None for a in given for axis in a.axes or ()
    )
    argument, _, array = fitting[0]
    if len(fitting) == 1 and not said and array.shape[0] == batch and not _may_be_key(array):
        argument.axes = [0 if leaf is array else None for leaf in argument.leaves]
        return
    listed = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for _, name, array in fitting)
    entries = (
        f"({', '.join(argument.entry for argument in given if isinstance(argument.key, int))})"
    )
    if any(
        isinstance(argument.key, str) for argument, _, _ in fitting
    ):  # keyword arguments have no place in a tuple
        entries = f"{{{', '.join(f'{argument.label!r}: {argument.entry}' for argument in given)}}}"
    raise ValueError(
        f"It is open which arguments have a row for each of the {batch} entries of adapter_index: "
        f"an axis of that size is in {listed}. Say it as for jax.vmap, such as adapt(fn, "
        f"adapter_index=..., in_axes={entries}) with None for what is the same for all rows, or "
        "in_axes={name: 0, ...} by the arguments' names."
    )


def _is_int(axis: object) -> TypeGuard[int]:
    return isinstance(axis, int | np.integer) and not isinstance(axis, bool)


def _may_be_key(array: jax.Array) -> bool:
    """Return whether an array may be a random key for all rows, or one for each."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key) or (
        array.dtype == np.uint32 and array.shape[-1] in (2, 4)
    )
