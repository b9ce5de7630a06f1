"""The torch tensors that hold the values of each leaf of a tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from jaxtyping import PyTree

from loha_jax.targets.default_layouts import is_torch_oriented
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import KERNEL_LEAVES, Names, is_kernel_leaf, torch_parameter
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.named_tree import NamedTree

from ..disk.base_checkpoint import Checkpoint
from .leaf_source import Source, convolution_source
from .name_map import NameMap
from .settled_names import leaf_path


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
    params: PyTree,
    names: Names | None,
    layouts: Layouts | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> tuple[NamedTree, dict[int, Source], list[str]]:
    """The same for a checkpoint whose names are as they are."""
    in_file = {
        key.removesuffix(".weight"): shape
        for key, shape in (shapes or {}).items()
        if len(shape) > 2
    }
    tree = NamedTree(params, names, layouts, in_file)
    sources: dict[int, Source] = {}
    problems: list[str] = []
    for position in tree.names:
        if jax.numpy.issubdtype(tree.leaves[position].dtype, jax.dtypes.extended):
            continue  # a PRNG key: no weight
        try:
            sources[position] = _source(tree, position, names, shapes)
        except ValueError as error:
            problems.append(
                f"{'.'.join(tree.paths[position])} {list(tree.leaves[position].shape)}: {error}"
            )
    return tree, sources, problems


def _source(
    tree: NamedTree,
    position: int,
    names: Names | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> Source:
    leaf, parts = tree.leaves[position], tree.paths[position]
    given = tree.layout_pattern(position) is not None and position in tree.kernels
    if isinstance(names, NameMap) and names.is_settled:
        source = names.source(leaf_path(parts))
        return Source.of_layout(source.keys, tree.layout(position)) if given else source
    if isinstance(leaf, SavedWeight):
        if leaf.layout is not None:
            return Source.of_layout((leaf.name,), leaf.layout)
        return Source((leaf.name,), (), _axes(leaf.shape, (shapes or {}).get(leaf.name)))
    if tree.is_transposed_convolution(position) and position in tree.kernels:
        raise ValueError(
            "it is a transposed convolution's. Torch keeps these as [in, out, *spatial] with the taps reversed, which "
            "no layout says: convert it by hand"
        )
    if isinstance(leaf, LoHaWeight):
        return _kernel_source(tree, position, leaf.names, names)
    if parts[-1] in KERNEL_LEAVES and position in tree.kernels:
        source = _kernel_source(tree, position, None, names, shapes)
        if shapes is not None and not given and source.keys[0] not in shapes:
            vectors = _vector_source(
                tree, position, shapes
            )  # Llama's stacked norms are called weight too
            return vectors if all(key in shapes for key in vectors.keys) else source
        return source
    if (
        is_kernel_leaf(parts) and parts[-1] not in KERNEL_LEAVES
    ):  # a parameter of its own, such as a class token
        (name,) = tree.module_names(position, ())
        if is_torch_oriented(parts[-1]) and not given:  # a recurrent cell's weight_ih
            return Source((name,), (), tuple((axis,) for axis in range(len(leaf.shape))))
        if given or (
            position in tree.kernels
            and shapes
            and name not in shapes
            and f"{name}.weight" in shapes
        ):
            return _kernel_source(tree, position, None, names)
        if shapes is None:
            raise ValueError(
                "only a torch checkpoint says whether it is a parameter or a weight; give `base=`"
            )
        return Source((name,), (), _axes(leaf.shape, shapes.get(name)))
    return _vector_source(tree, position, shapes)


def _kernel_source(
    tree: NamedTree,
    position: int,
    modules: Sequence[str] | None,
    names: Names | None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Source:
    try:
        layout = tree.layout(position)
    except ValueError:
        shape, key = (
            tuple(tree.leaves[position].shape),
            f"{tree.module_names(position, ())[0]}.weight",
        )
        torch = is_torch_oriented(tree.paths[position][-1])
        if (source := convolution_source(key, shape, (shapes or {}).get(key, ()), torch)) is None:
            raise
        return source
    modules = modules or tree.module_names(position, layout.sizes("s", tree.leaves[position].shape))
    source = Source.of_layout(tuple(f"{module}.weight" for module in modules), layout)
    if isinstance(names, NameMap) and names.is_conv1d(tree.names[position]):
        out, in_ = source.axes
        return dataclasses.replace(source, axes=(in_, out))
    return source


def _vector_source(
    tree: NamedTree, position: int, shapes: Mapping[str, tuple[int, ...]] | None
) -> Source:
    """A bias, scale or statistic, stacked like its module's kernel or as the names show."""
    parts, shape = tree.paths[position], tuple(tree.leaves[position].shape)
    stacks = [0]
    for other in tree.kernels:
        beside = tree.paths[other]
        if other != position and beside[:-1] == parts[:-1] and beside[-1] in KERNEL_LEAVES:
            stack = tree.layout(other).sizes("s", tree.leaves[other].shape)
            stacks = [len(stack)] if shape[: len(stack)] == stack else stacks
            break
    else:
        stacks = list(range(max(len(shape), 1))) if shapes is not None else stacks
    first = None
    for count in stacks:
        try:
            modules = tree.module_names(position, shape[:count])
        except ValueError:
            if count == stacks[-1] and first is None:
                raise
            continue
        keys = tuple(f"{module}.{torch_parameter(parts)}" for module in modules)
        torch_shape = (shapes or {}).get(keys[0])
        axes = tuple(tuple(count + a for a in group) for group in _axes(shape[count:], torch_shape))
        first = first or Source(keys, tuple(range(count)), axes)
        if shapes is None or all(key in shapes for key in keys):
            return Source(keys, tuple(range(count)), axes)
    assert first is not None
    return first


def _axes(shape: Sequence[int], torch_shape: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    """Axis by axis, or all in one for a torch tensor with a single axis (the bias of several heads)."""
    if len(shape) > 1 and (torch_shape is None or len(torch_shape) == 1):
        return (tuple(range(len(shape))),)
    return tuple((axis,) for axis in range(len(shape)))
