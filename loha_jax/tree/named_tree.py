"""The leaves of a tree with their paths, names and layouts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.default_layouts import (
    default_layout,
    is_named_convolution,
    is_named_lookup,
    is_torch_oriented,
    is_transposed_convolution,
)
from loha_jax.targets.matching import Match, match_target
from loha_jax.targets.module_names import (
    Names,
    UnknownNameError,
    all_names,
    is_kernel_leaf,
    module_name,
    path_parts,
    stack_names,
)
from loha_jax.targets.target_advice import require_named_leaves
from loha_jax.tree.equinox_layers import equinox_layers
from loha_jax.tree.leaves import LoHaWeight, is_adapted

Layouts = Mapping[str, "str | Layout"]
"""How `inject` takes layouts: by default dotted name, or by a regular expression for the whole of it."""


class ModelLayouts(dict[str, "str | Layout"]):
    """Layouts that a user gave for a model, with those that its layers have by themselves.

    Attributes:
        own: by default dotted name; they come after the layouts that `names` has, which may split what is one kernel
            to a layer (a fused projection) into the modules that torch has.
        lookups, heads: see `InferredLayouts`; those of the given layouts.
        transposed: names of transposed convolutions.
    """

    def __init__(self, given: Layouts, own: Mapping[str, Layout], transposed: Collection[str] = ()):
        super().__init__(given)
        self.own = dict(own)
        self.lookups = frozenset(getattr(given, "lookups", ()))
        self.heads = frozenset(getattr(given, "heads", ()))
        self.transposed = frozenset(transposed)


class NamedTree:
    """The leaves of a tree with their paths, names and layouts.

    Args:
        params, names, layouts: as for `inject`.
        torch_shapes: what a file shows of its modules, by torch name; see `default_layout`.
    """

    def __init__(
        self,
        params: Any,
        names: Names | None,
        layouts: Layouts | None,
        torch_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        require_named_leaves(params)
        flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)
        self.given_names = names
        self._torch_shapes = torch_shapes or {}
        self.given_layouts = _as_layouts(layouts)
        equinox = equinox_layers(params)
        self.own_layouts: dict[str, Layout] = getattr(layouts, "own", equinox.layouts)
        self.lookups: frozenset[str] = getattr(layouts, "lookups", frozenset()) | equinox.lookups
        self._heads: frozenset[str] = getattr(layouts, "heads", frozenset())
        self._transposed: frozenset[str] = getattr(layouts, "transposed", frozenset()) | equinox.transposed
        known = getattr(names, "layouts", None) or {}
        self.map_layouts = _as_layouts({name: layout for name, layout in known.items() if layout is not None})
        vectors = {name for name, layout in known.items() if layout is None} | equinox.vectors
        self.paths: list[tuple[str, ...]] = []
        self.leaves: list[Any] = []
        self.weights: list[int] = []  # positions of the leaf that stands for its module
        self.kernels: set[int] = set()  # those that can be adapted
        self.names: dict[int, str] = {}
        self._layouts: dict[int, Layout] = {}
        for position, (path, leaf) in enumerate(flat):
            parts = path_parts(path)
            self.paths.append(parts)
            self.leaves.append(leaf)
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                continue
            self.names[position] = module_name(parts)
            if is_kernel_leaf(parts) and leaf.ndim >= 2:
                if self.names[position] not in vectors:
                    self.kernels.add(position)
                self.weights.append(position)
        self.shape_at = {self.paths[n]: tuple(self.leaves[n].shape) for n in self.names}
        for position in list(self.kernels):  # a normalisation over several axes, or a stack of such
            parts, shape = self.paths[position], tuple(self.leaves[position].shape)
            if parts[-1] == "weight" and self.shape_at.get((*parts[:-1], "bias")) == shape:
                self.kernels.discard(position)
        with_kernel = {self.names[n] for n in self.weights}
        for position, name in self.names.items():  # normalisation layers: modules without a kernel
            parts = self.paths[position]
            if position not in self.kernels and name not in with_kernel and parts[-1] in ("scale", "weight"):
                self.weights.append(position)
        self.weights.sort()
        self.modules = {
            ".".join(name.split(".")[: n + 1]) for name in self.names.values() for n in range(name.count(".") + 1)
        }

    def layout(self, position: int) -> Layout:
        """The kernel's layout: given, kept from an earlier adapter, or the default.

        Raises:
            ValueError: it is ambiguous, or the given one does not fit the kernel.
        """
        if position not in self._layouts:
            self._layouts[position] = self._find_layout(position)
        return self._layouts[position]

    def layout_pattern(self, position: int) -> str | None:
        """The key of `layouts` that names a kernel, itself or as a regular expression for the whole name."""
        return _pattern_of(self.names[position], self.given_layouts)

    def _find_layout(self, position: int) -> Layout:
        leaf, name = self.leaves[position], self.names[position]
        if (pattern := self.layout_pattern(position)) is not None:
            return _fitting(self.given_layouts[pattern], f"layouts[{pattern!r}]", name, leaf)
        if is_adapted(leaf) and leaf.layout is not None:
            return leaf.layout
        if (pattern := _pattern_of(name, self.map_layouts)) is not None:
            return _fitting(self.map_layouts[pattern], f"names.layouts[{pattern!r}]", name, leaf)
        if name in self.own_layouts:
            return self.own_layouts[name]
        return default_layout(leaf.shape, self.paths[position], self.shape_at, self._torch_shape(name))

    def _torch_shape(self, name: str) -> tuple[int, ...] | None:
        """What the file shows of a kernel that is one module."""
        if not self._torch_shapes:
            return None
        try:
            own = all_names(name, self.given_names)
        except UnknownNameError:
            return None
        return self._torch_shapes.get(own[0]) if len(own) == 1 else None

    def is_transposed_convolution(self, position: int) -> bool:
        """Whether a kernel is a transposed convolution's that torch does not keep as it is kept here."""
        path = self.paths[position]
        named = is_transposed_convolution(path) and not is_torch_oriented(path[-1])
        return named or self.names[position] in self._transposed

    def names_of(self, position: int, config: LoHaConfig) -> tuple[str, ...]:
        """The torch module names of a weight; an ambiguous layout is an error only where it may be targeted."""
        leaf = self.leaves[position]
        if isinstance(leaf, LoHaWeight):
            return leaf.names
        default = self.names[position]
        try:
            stack = self.layout(position).sizes("s", leaf.shape) if position in self.kernels else None
        except ValueError:
            if self._may_match(position, config):
                raise
            return (default,)
        try:
            return all_names(default, self.given_names) if stack is None else self.module_names(position, stack)
        except UnknownNameError:
            if self._may_match(position, config):
                raise
            return (default,)

    def module_names(self, position: int, stack: Sequence[int]) -> tuple[str, ...]:
        """The torch module names of a leaf with these stack axes; see `stack_names`."""
        return stack_names(self.names[position], stack, self.given_names)

    def _may_match(self, position: int, config: LoHaConfig) -> bool:
        return any(match_target(name, config) is Match.TARGETED for name in self.possible_names(position))

    def possible_names(self, position: int) -> list[str]:
        """Names that a leaf's modules could have, for one whose layout, and so its stack axes, may be ambiguous."""
        default, shape = self.names[position], self.leaves[position].shape
        possible = [default]
        try:
            all_names(default, self.given_names)
        except UnknownNameError as error:
            return [default, *error.candidates]
        for stack in ((), (1,), (1, 1)):
            try:
                possible += stack_names(default, stack, self.given_names)
            except ValueError:  # a template for another number of indices
                continue
        if self.given_names is not None:
            with contextlib.suppress(ValueError):
                possible += stack_names(default, shape[:1], self.given_names)
        return possible

    def linear_names(self, position: int) -> tuple[str, ...]:
        """Names of a kernel's modules if it is a matrix product, for "all-linear": a Dense by its leaf's name, or a
        kernel that `layouts` or its layer knows, unless as a lookup table (`infer_layouts`, Equinox, torch's names).
        """
        name, path = self.names[position], self.paths[position]
        if name in self.lookups or name in self._heads:
            return ()
        known = self.layout_pattern(position) is not None or name in self.own_layouts
        if not known and (path[-1] not in ("kernel", "w", "weight") or is_named_lookup(path)):
            return ()
        if not known and self.leaves[position].ndim > 2 and is_named_convolution(path):
            return ()
        try:
            layout = self.layout(position)
        except ValueError:
            return (self.names[position],)  # named by all-linear, hence an error that says how to settle it
        if layout.axes("k"):
            return ()
        try:
            return self.module_names(position, layout.sizes("s", self.leaves[position].shape))
        except UnknownNameError:
            return (self.names[position],)


def _as_layouts(layouts: Layouts | None) -> dict[str, Layout]:
    return {p: w if isinstance(w, Layout) else Layout(w) for p, w in (layouts or {}).items()}


def _pattern_of(name: str, layouts: Mapping[str, Layout]) -> str | None:
    return name if name in layouts else next((p for p in layouts if re.fullmatch(p, name)), None)


def _fitting(layout: Layout, origin: str, name: str, leaf: Any) -> Layout:
    if layout.ndim != leaf.ndim:
        raise ValueError(
            f"{origin} = {layout.word!r} describes {layout.ndim} axes, the kernel of {name} has shape "
            f"{tuple(leaf.shape)}"
        )
    return layout
