"""The leaves of a tree with their paths, names and layouts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence

from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.convolution_names import is_torch_oriented
from loha_jax.targets.default_layouts import (
    UnknownConvolutionError,
    default_layout,
    is_input_first,
    is_named_convolution,
    is_named_lookup,
    is_output_first,
    is_transposed_convolution,
)
from loha_jax.targets.matching import Match, match_target, name_beginnings
from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import (
    Names,
    NamesWithLayouts,
    UnknownNameError,
    all_names,
    is_kernel_leaf,
    module_name,
    stack_names,
    torch_parameter,
)
from loha_jax.targets.row_transforms import row_transform
from loha_jax.targets.target_advice import require_named_leaves
from loha_jax.targets.used_names import check_used
from loha_jax.tree.leaves import BUFFERS, LoHaWeight, is_adapted, leaves_by_path
from loha_jax.tree.model_layers import layers_layouts
from loha_jax.tree.quantised import wrapped


class NamedTree:
    """The leaves of a tree with their paths, names and layouts.

    Args:
        params, names, layouts: as for `inject`.
        torch_shapes: the shapes that a file shows of its modules, by torch name; see
            `default_layout`.

    Attributes:
        paths, leaves: of all leaves, in the tree's order; adapted leaves are whole. A position is
            an index into them.
        names: default dotted module names of the arrays, by position.
        shape_at: shapes of the arrays, by path.
        modules: names of all modules, those that contain others too.
        weights: positions of the leaves that stand for their module.
        kernels: those of them that can be adapted.
        given_names, given_layouts: the arguments.
        known: what the layers of the tree know.
    """

    def __init__(
        self,
        params: PyTree,
        names: Names | None,
        layouts: Layouts | None,
        torch_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        require_named_leaves(params)
        found = leaves_by_path(params)
        self.paths = [path for path, _ in found]
        self.leaves = [wrapped(leaf) for _, leaf in found]
        self.names = {
            n: module_name(self.paths[n]) for n, leaf in enumerate(self.leaves) if _is_array(leaf)
        }
        self.shape_at = {self.paths[n]: tuple(self.leaves[n].shape) for n in self.names}
        self.modules = {above for name in self.names.values() for above in name_beginnings(name)}
        self.given_names = names
        check_used(names, {*self.names.values()})
        self._torch_shapes = torch_shapes or {}
        self.known: ModelLayouts = layers_layouts(params, layouts)
        self.given_layouts = _as_layouts(self.known)
        mapped = names.layouts or {} if isinstance(names, NamesWithLayouts) else {}
        self._map_layouts = _as_layouts(
            {name: layout for name, layout in mapped.items() if layout is not None}
        )
        vectors = self.known.vectors | {name for name, layout in mapped.items() if layout is None}
        possible = [n for n in self.names if is_kernel_leaf(self.paths[n])]
        matrices = [n for n in possible if self.leaves[n].ndim >= 2]
        unlike = [n for n in matrices if self.names[n] not in vectors]
        self.kernels = {n for n in unlike if not self._has_bias_of_its_shape(n)}
        self.weights = sorted([*matrices, *self._scales({self.names[n] for n in matrices})])
        self._layouts: dict[int, Layout] = {}
        self._by_default: set[int] = set()

    def _has_bias_of_its_shape(self, position: int) -> bool:
        """Return whether a leaf is the scale, or a stack of scales, of a normalisation."""
        *parent, leaf = self.paths[position]
        shape = tuple(self.leaves[position].shape)
        return leaf == "weight" and self.shape_at.get((*parent, "bias")) == shape

    def _scales(self, with_kernel: Collection[str]) -> list[int]:
        """Return the positions of the scales of normalisation layers, modules without a kernel."""
        others = (n for n, name in self.names.items() if name not in with_kernel)
        return [n for n in others if self.paths[n][-1] in ("scale", "weight")]

    def layout(self, position: int) -> Layout:
        """Return the kernel's layout.

        The first of: the given one, that of an earlier adapter, the name map's, the layer's own,
        the default.

        Raises:
            ValueError: it is ambiguous, or the given one does not fit the kernel.
        """
        if position not in self._layouts:
            self._layouts[position] = self._find_layout(position)
        return self._layouts[position]

    def layout_pattern(self, position: int) -> str | None:
        """Return the key of `layouts` that is a kernel's name or a regular expression for it."""
        return _pattern_of(self.names[position], self.given_layouts)

    def _find_layout(self, position: int) -> Layout:
        leaf, name = self.leaves[position], self.names[position]
        if (pattern := self.layout_pattern(position)) is not None:
            word = self.given_layouts[pattern]
            given = _fitting(word, f"layouts[{pattern!r}]", name, leaf.shape)
            if is_adapted(leaf) and leaf.layout not in (None, given):
                raise _made_otherwise(name, given, leaf.layout)
            return given
        if is_adapted(leaf) and leaf.layout is not None:
            return leaf.layout
        if (pattern := _pattern_of(name, self._map_layouts)) is not None:
            mapped = self._map_layouts[pattern]
            if mapped.word == "io" and is_output_first(
                leaf.shape, self.paths[position], self.shape_at
            ):
                raise _output_first(leaf.shape, name)
            return _fitting(mapped, f"names.layouts[{pattern!r}]", name, leaf.shape)
        if name in self.known.own:
            return self.known.own[name]
        if name in self.known.unclear:
            raise _unclear(self.paths[position], leaf.shape, self.known.unclear[name], name)
        self._by_default.add(position)
        return default_layout(
            leaf.shape, self.paths[position], self.shape_at, self._torch_shape(name)
        )

    def contradiction(self, position: int) -> str | None:
        """Describe a kernel whose name says another layout than its bias; None for others."""
        path, shape = self.paths[position], self.shape_at[self.paths[position]]
        word = self.layout(position).word
        if (
            word != "oi"
            or position not in self._by_default
            or not is_torch_oriented(path[-1])
            or not is_input_first(shape, path, self.shape_at)
        ):
            return None
        return _input_first(path, shape, self.names[position])

    def _torch_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape that the file shows of a kernel that is one module."""
        if not self._torch_shapes:
            return None
        try:
            own = all_names(name, self.given_names)
        except UnknownNameError:
            return None
        return self._torch_shapes.get(own[0]) if len(own) == 1 else None

    def is_transposed_convolution(self, position: int) -> bool:
        """Return whether a kernel is a transposed convolution's with other axes in torch."""
        path = self.paths[position]
        named = is_transposed_convolution(path) and not is_torch_oriented(path[-1])
        return named or self.names[position] in self.known.transposed

    def names_of(self, position: int, config: LoHaConfig) -> tuple[str, ...]:
        """Return the torch module names of a weight.

        Raises:
            ValueError: its layout or its name is ambiguous, and the config may target it.
        """
        leaf = self.leaves[position]
        if isinstance(leaf, LoHaWeight):
            return leaf.names
        default = self.names[position]
        stack = None
        try:
            if position in self.kernels:
                stack = self.layout(position).sizes("s", leaf.shape)
        except ValueError:
            if self._may_match(position, config):
                raise
            return (default,)
        try:
            if stack is not None:
                return self.module_names(position, stack)
            return all_names(default, self.given_names)
        except UnknownNameError:
            if self._may_match(position, config):
                raise
            return (default,)

    def module_names(self, position: int, stack: Sequence[int]) -> tuple[str, ...]:
        """Return the torch module names of a leaf with these stack axes; see `stack_names`."""
        name = self.names[position]
        return stack_names(name, stack, self.given_names, self.known.stacks.get(name))

    def known_stacks(self, position: int) -> int:
        """Return in how many stacks the module of a leaf is, as far as the model says it."""
        return len(self.known.stacks.get(self.names[position], ()))

    def rows(self, position: int) -> RowTransform | None:
        """Return how torch's rows of a leaf differ from its own; None where they do not.

        An adapted leaf has the transform that its adapter was made with.

        Raises:
            ValueError: `names` gives an adapted leaf another one, or gives one to a buffer.
        """
        leaf, name = self.leaves[position], self.names[position]
        given = row_transform(name, self.given_names)
        if is_adapted(leaf):
            if given is not None and given != leaf.rows:
                made = "without one" if leaf.rows is None else f"with {leaf.rows}"
                raise ValueError(
                    f"`names` gives {name} {given}, and its adapter was made {made}. Give "
                    "`inject`, loaders and savers the same name map"
                )
            return leaf.rows
        scale = self.known.scales.get(name)
        if scale is not None and given is None and position in self.kernels:
            raise _scaled(self.paths[position], scale, name)
        if given is not None and torch_parameter(self.paths[position]) in BUFFERS:
            raise ValueError(
                f"`names` gives {name} {given}, and it has {'.'.join(self.paths[position])}, a "
                "buffer, which no transform is defined for"
            )
        return given

    def _may_match(self, position: int, config: LoHaConfig) -> bool:
        return any(
            match_target(name, config) is Match.TARGETED for name in self.possible_names(position)
        )

    def possible_names(self, position: int) -> list[str]:
        """Return the names that a leaf's modules could have if its layout is ambiguous."""
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
        """Return the names of a kernel's modules if it is a matrix product, for "all-linear".

        It is one if its leaf is called as a Dense's, or `layouts` or its layer knows it, and if it
        is no lookup table (`infer_layouts`, Equinox, torch's names).
        """
        name, path = self.names[position], self.paths[position]
        if name in self.known.lookups | self.known.left_out:
            return ()
        known = self.layout_pattern(position) is not None or name in self.known.own
        if not known and (path[-1] not in ("kernel", "w", "weight") or is_named_lookup(path)):
            return ()
        if not known and self.leaves[position].ndim > 2 and is_named_convolution(path):
            return ()
        try:
            layout = self.layout(position)
        except ValueError as error:
            # Named by all-linear: hence an error that says how to settle the layout.
            return () if isinstance(error, UnknownConvolutionError) else (self.names[position],)
        if layout.axes("k"):
            return ()
        try:
            return self.module_names(position, layout.sizes("s", self.leaves[position].shape))
        except UnknownNameError:
            return (self.names[position],)


def _unclear(
    path: Sequence[str], shape: Sequence[int], axes: Sequence[str], name: str
) -> ValueError:
    return ValueError(
        f"The kernel {'.'.join(path)} of shape {tuple(shape)} has the axes {', '.join(axes)}, and "
        "no known layer says which of them are inputs and outputs. Settle it with "
        f"layouts={{r'{re.escape(name)}': '...'}}, one letter for each axis: s (stack), i (in), o "
        "(out), k (spatial)."
    )


def _input_first(path: Sequence[str], shape: Sequence[int], name: str) -> str:
    return (
        f"{'.'.join(path)} of shape {shape} is called as torch's [out, in], and its bias, or that "
        "of a module near it, says [in, out], as of GPT-2. Settle it with "
        f"layouts={{r'{re.escape(name)}': 'io'}} or 'oi' (a pattern may stand for the names of "
        "several), or let the model say it with layouts=loha_jax.infer_layouts(fn, params, *args)"
    )


def _output_first(shape: Sequence[int], name: str) -> ValueError:
    return ValueError(
        f"`names` has the layout 'io' for {name} of shape {tuple(shape)}, and its bias, or that "
        "of a module near it, says [out, in], as in Flax' GPT-2. Give "
        f"layouts={{r'{re.escape(name)}': 'oi'}}; for GPT-2 itself, "
        "names=NameMap.transformers('gpt2')."
    )


def _made_otherwise(name: str, given: Layout, own: Layout) -> ValueError:
    return ValueError(
        f"`layouts` gives {name} the layout {given.word!r}, and it has an adapter that was made "
        f"with {own.word!r}. A kernel has one layout: leave it out, or `unload` the tree first"
    )


def _scaled(path: Sequence[str], scale: float, name: str) -> ValueError:
    return ValueError(
        f"The layer of {'.'.join(path)} multiplies it by {scale} (muP), and files hold the "
        "product. Give `inject`, loaders and savers names="
        f"NameMap(names, rows={{r'{re.escape(name)}': RowTransform(scale={scale})}})"
    )


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _as_layouts(layouts: Layouts | None) -> dict[str, Layout]:
    return {p: w if isinstance(w, Layout) else Layout(w) for p, w in (layouts or {}).items()}


def _pattern_of(name: str, layouts: Mapping[str, Layout]) -> str | None:
    return name if name in layouts else next((p for p in layouts if re.fullmatch(p, name)), None)


def _fitting(layout: Layout, origin: str, name: str, shape: tuple[int, ...]) -> Layout:
    if layout.ndim != len(shape):
        raise ValueError(
            f"{origin} = {layout.word!r} describes {layout.ndim} axes, the kernel of {name} has "
            f"shape {tuple(shape)}"
        )
    return layout
