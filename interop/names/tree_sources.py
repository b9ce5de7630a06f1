"""The torch tensors that hold the values of each leaf of a tree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
from jaxtyping import PyTree

from loha_jax.targets.convolution_names import is_torch_oriented
from loha_jax.targets.default_layouts import UnknownConvolutionError, is_torchs_transposed
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import KERNEL_LEAVES, Names, is_kernel_leaf, torch_parameter
from loha_jax.targets.row_transforms import row_transform
from loha_jax.targets.transposed_doubt import may_be_transposed
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.named_tree import NamedTree

from ..disk.base_checkpoint import Checkpoint
from .conv1d import is_conv1d, looks_like_conv1d
from .leaf_source import Source, convolution_source
from .name_map import NameMap
from .settled_names import leaf_path

Shapes = Mapping[str, tuple[int, ...]]

_GROWS = re.compile(r"(.*\.)?(c_attn|c_fc)\.weight")
"""GPT-2's weights that have more outputs than inputs."""


def find_sources_in(
    checkpoint: Checkpoint | None, params: PyTree, names: Names | None, layouts: Layouts | None
) -> tuple[NamedTree, dict[int, Source], list[str]]:
    """Return the tree, the sources of its leaves by flat position, and why others have none.

    The names in the checkpoint may all begin with DataParallel's "module.".
    """
    found = _find_sources(params, names, layouts, checkpoint.shapes if checkpoint else None)
    if checkpoint and not any(
        key in checkpoint.shapes for source in found[1].values() for key in source.keys
    ):
        checkpoint.drop_prefix("module.")
        return _find_sources(params, names, layouts, checkpoint.shapes)
    return found


def _find_sources(
    params: PyTree, names: Names | None, layouts: Layouts | None, shapes: Shapes | None
) -> tuple[NamedTree, dict[int, Source], list[str]]:
    """Return the same for a checkpoint whose names are as they are."""
    convolutions = {key: shape for key, shape in (shapes or {}).items() if len(shape) > 2}
    in_file = {key.removesuffix(".weight"): shape for key, shape in convolutions.items()}
    tree = NamedTree(params, names, layouts, in_file)
    finder = _Finder(tree, names, shapes)
    sources: dict[int, Source] = {}
    problems: list[str] = []
    for position in tree.names:
        leaf = tree.leaves[position]
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            continue  # a PRNG key: no weight
        try:
            sources[position] = finder.checked_source(position)
        except ValueError as error:
            problems.append(f"{'.'.join(tree.paths[position])} {list(leaf.shape)}: {error}")
    return tree, sources, problems


@dataclasses.dataclass(frozen=True)
class _Finder:
    """Where the leaves of a tree are in a checkpoint.

    Attributes:
        tree: the leaves with their names.
        names: a `NameMap` knows more than names.
        shapes: of the checkpoint's tensors, or None where there is no checkpoint.
    """

    tree: NamedTree
    names: Names | None
    shapes: Shapes | None

    def _shape(self, key: str) -> tuple[int, ...] | None:
        return (self.shapes or {}).get(key)

    def checked_source(self, position: int) -> Source:
        """Return the source of a leaf with the transform that its rows have.

        Raises:
            ValueError: it has no source, or the transform does not fit; the message says why.
        """
        source, rows = self.source(position), self.tree.rows(position)
        if open_name := next((key for key in source.keys if "{" in key), None):
            raise ValueError(
                f"its name {open_name} has a place for the index of a stack, and only a torch "
                "checkpoint says which axis that is; give `base=`"
            )
        if rows is None:
            return source
        if row_transform(self.tree.names[position], self.names) is None:
            raise ValueError(
                f"its adapter was made with {rows}, which `names=` does not have. Give the name "
                "map that `inject` or the loader took"
            )
        if self._is_kernel_of_torch_columns(position, source):
            raise ValueError(
                f"torch keeps it as [in, out] (GPT-2's Conv1D), and {rows} is for rows of [out, in]"
            )
        shape, groups = self.tree.leaves[position].shape, source.axes or ((),)
        if problem := rows.problem([shape[axis] for axis in groups[0]]):
            raise ValueError(problem)
        return dataclasses.replace(source, rows=rows)

    def _is_kernel_of_torch_columns(self, position: int, source: Source) -> bool:
        """Return whether the source has the kernel's input features in front."""
        if position not in self.tree.kernels or len(source.axes) != 2 or source.stack:
            return False
        return source.axes == Source.of_layout(source.keys, self.tree.layout(position)).axes[::-1]

    def source(self, position: int) -> Source:
        """Return the source of a leaf.

        Raises:
            ValueError: it has none; the message says why.
        """
        tree, shapes = self.tree, self.shapes
        leaf, parts = tree.leaves[position], tree.paths[position]
        is_kernel = position in tree.kernels
        given = is_kernel and tree.layout_pattern(position) is not None
        if isinstance(self.names, NameMap) and self.names.is_settled:
            source = self.names.source(leaf_path(parts))
            return Source.of_layout(source.keys, tree.layout(position)) if given else source
        if is_kernel and tree.is_transposed_convolution(position):
            raise ValueError(
                "it is a transposed convolution's, or Keras' depthwise one. Torch keeps these as "
                "[in, out, *spatial] with the taps reversed, or [out, 1, *spatial], which no "
                "layout says: convert it by hand"
            )
        if isinstance(leaf, SavedWeight):
            if leaf.layout is not None:
                return self._of_layout(position, (leaf.name,))
            return Source((leaf.name,), (), _axes(leaf.shape, self._shape(leaf.name)))
        if isinstance(leaf, LoHaWeight):
            return self._kernel(position, leaf.names)
        if is_kernel and parts[-1] in KERNEL_LEAVES:
            source = self._kernel(position)
            if shapes is not None and not given and source.keys[0] not in shapes:
                # Llama's stacked norms are called weight too.
                vectors = self._vector(position)
                return vectors if all(key in shapes for key in vectors.keys) else source
            return source
        if is_kernel_leaf(parts) and parts[-1] not in KERNEL_LEAVES:
            # A parameter of its own, such as a class token.
            (name,) = tree.module_names(position, ())
            if is_torch_oriented(parts[-1]) and not given:  # a recurrent cell's weight_ih
                return Source((name,), (), tuple((axis,) for axis in range(len(leaf.shape))))
            is_weight = shapes and name not in shapes and f"{name}.weight" in shapes
            if given or (is_weight and is_kernel):
                return self._kernel(position)
            if shapes is None:
                raise ValueError(
                    f"only a torch checkpoint says whether that is {name} or {name}.weight there: "
                    "give `base=`. A model that has none is not one of transformers': merge it "
                    "(`loha_jax.merge`), and save it with Orbax or as you save your models"
                )
            return Source((name,), (), _axes(leaf.shape, shapes.get(name)))
        return self._vector(position)

    def _kernel(self, position: int, modules: Sequence[str] = ()) -> Source:
        """Return the source of a kernel; `modules` are its torch names, where they are known."""
        tree, shape = self.tree, tuple(self.tree.leaves[position].shape)
        try:
            layout = tree.layout(position)
        except ValueError as error:
            key = f"{tree.module_names(position, ())[0]}.weight"
            torch = is_torch_oriented(tree.paths[position][-1])
            undecided = isinstance(error, UnknownConvolutionError)
            if not torch and may_be_transposed(shape, tree.paths[position], tree.shape_at):
                raise  # the checkpoint's shape does not say the order either
            stored = self._shape(key) or (shape if undecided else ())
            source = convolution_source(key, shape, stored, torch)
            if source is None:
                raise
            return source
        modules = modules or tree.module_names(position, layout.sizes("s", shape))
        return self._of_layout(position, [f"{module}.weight" for module in modules])

    def _of_layout(self, position: int, keys: Sequence[str]) -> Source:
        """Return the source of a kernel; torch's of a transposed convolution stays as it is."""
        layout = self.tree.layout(position)
        source = Source.of_layout(tuple(keys), layout)
        if self._is_conv1d(position, source):
            return dataclasses.replace(source, axes=source.axes[::-1])  # [out, in] -> [in, out]
        if is_torchs_transposed(self.tree.paths[position], layout):
            out, inputs, *spatial = source.axes
            return dataclasses.replace(source, axes=(inputs, out, *spatial))
        return source

    def _is_conv1d(self, position: int, source: Source) -> bool:
        """Return whether torch keeps a kernel as [in, out]: GPT-2's `Conv1D`, by its name.

        A checkpoint's shapes decide where they can. A square one goes by the others in it.
        """
        tree, name, path = self.tree, self.tree.names[position], self.tree.paths[position]
        if isinstance(self.names, NameMap) and self.names.is_conv1d(name):
            return True
        key, torch = source.keys[0], is_torch_oriented(path[-1])
        module, layout = key.removesuffix(".weight"), tree.layout(position)
        if self.shapes is None:
            own = torch and name in tree.known.own  # a layer's own order of axes
            return not own and is_conv1d(module, path, layout)
        if layout.word not in ("io", "oi") or not looks_like_conv1d(module):
            return False
        if tree.contradiction(position):
            return False  # the tree is GPT-2's own dictionary: its arrays stay as they are
        shape = tree.leaves[position].shape
        (inputs,), (out,) = layout.sizes("i", shape), layout.sizes("o", shape)
        if out != inputs:
            return self._shape(key) == (inputs, out)
        wide = [shape for key, shape in self.shapes.items() if _GROWS.fullmatch(key)]
        return bool(wide) and all(shape[0] < shape[1] for shape in wide)

    def _vector(self, position: int) -> Source:
        """Return the source of a bias, scale or statistic, stacked like its kernel or its names."""
        parts, shape = self.tree.paths[position], tuple(self.tree.leaves[position].shape)
        first = None
        for stack in (stacks := self._stacks(position)):
            try:
                modules = self.tree.module_names(position, tuple(shape[axis] for axis in stack))
            except ValueError:
                if stack == stacks[-1] and first is None:
                    raise
                continue
            keys = tuple(f"{module}.{self._parameter(modules[0], parts)}" for module in modules)
            rest = [axis for axis in range(len(shape)) if axis not in stack]
            groups = _axes([shape[axis] for axis in rest], self._shape(keys[0]))
            axes = tuple(tuple(rest[axis] for axis in group) for group in groups)
            source = Source(keys, stack, axes)
            if self.shapes is None or all(key in self.shapes for key in keys):
                return source
            first = first or source
        assert first is not None
        return first

    def _parameter(self, module: str, parts: Sequence[str]) -> str:
        """Return torch's name of a vector; its own (`scale`) where the checkpoint has it."""
        name = torch_parameter(parts)
        shapes = self.shapes or {}
        own = f"{module}.{name}" not in shapes and f"{module}.{parts[-1]}" in shapes
        return parts[-1] if own else name

    def _stacks(self, position: int) -> list[tuple[int, ...]]:
        """Return which axes of a vector may be those of a stack, most likely first.

        They lead, or are the one that MaxText scans over.
        """
        tree, shape = self.tree, tuple(self.tree.leaves[position].shape)
        module, leading = tree.paths[position][:-1], tuple(range(len(shape)))
        for other in tree.kernels - {position}:
            path = tree.paths[other]
            if path[:-1] == module and path[-1] in KERNEL_LEAVES:
                try:
                    layout = tree.layout(other)
                except UnknownConvolutionError:
                    return [()]  # transposed or not, no scan has stacked it
                stack = layout.sizes("s", tree.leaves[other].shape)
                # A scan stacks all parameters on one axis; else the stack leads.
                places = (layout.axes("s"), leading[: len(stack)])
                fits = [p for p in places if tuple(shape[a] for a in p if a in leading) == stack]
                return [fits[0] if fits else ()]
        if stacked := tree.known_stacks(position):
            return [leading[:stacked]]
        if self.shapes is None:
            return [()]
        return [leading[:n] for n in range(max(len(shape), 1))] + [(a,) for a in leading[1:]]


def _axes(shape: Sequence[int], torch_shape: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    """Group axes: each for itself, or all in one for a torch vector (the bias of several heads)."""
    if len(shape) > 1 and (torch_shape is None or len(torch_shape) == 1):
        return (tuple(range(len(shape))),)
    return tuple((axis,) for axis in range(len(shape)))
