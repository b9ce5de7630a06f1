"""`SettledNames`: the torch names and layouts of a model's leaves, as a checkpoint settles them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import (
    KERNEL_LEAVES,
    Names,
    UnknownNameError,
    all_names,
    module_name,
    path_parts,
)
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, is_whole
from loha_jax.tree.quantised import wrapped
from loha_jax.tree.text_table import text_table

from ..disk.base_checkpoint import Checkpoint
from .content_match import Leaf, Options, match_contents
from .leaf_source import Source
from .torch_mapping import map_sources

_COLLECTION = re.compile(r"(params|batch_stats)\.")


def leaf_path(parts: Sequence[str]) -> str:
    """Return the dotted path of a leaf without a leading collection: the key of a map's sources."""
    return _COLLECTION.sub("", re.sub(r"/~/|/", ".", ".".join(parts)), count=1)


@dataclasses.dataclass(frozen=True)
class SettledNames:
    """The leaves of a model by path, as a checkpoint settles them.

    Attributes:
        sources: of the leaves that are settled.
        unmatched: leaves with no torch name, and why.
        unused: torch names that no leaf has.
        options: of leaves whose contents leave several.
        tied: the torch names of leaves whose tensor is there more than once.
        shapes: of the leaves, for the table.
    """

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    unmatched: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    options: dict[str, Options] = dataclasses.field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_mapping(
        cls,
        mapping: Mapping[str, Any],
        base: str | Path | Mapping[str, Sequence[int]],
        preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> SettledNames:
        """Run a mapping on a checkpoint's names; see `NameMap`."""
        shapes = base if isinstance(base, Mapping) else Checkpoint(base).shapes
        mapped = map_sources(
            mapping, {key: tuple(shape) for key, shape in shapes.items()}, preprocess
        )
        return cls(
            {_without_box(path): source for path, source in mapped.sources.items()},
            {_without_box(path): reason for path, reason in mapped.problems.items()},
            tuple(mapped.unused),
        )

    @classmethod
    def of_contents(cls, params: Any, base: str | Path) -> SettledNames:
        """Find each leaf among the tensors of a checkpoint; see `NameMap.infer`."""
        leaves = _leaves(params)
        checkpoint = Checkpoint(base)
        if checkpoint.quantisation.scales or checkpoint.quantisation.packed:
            raise ValueError(
                f"NameMap.infer compares values, and {base} is quantised ({checkpoint.quantisation.example}). Give it "
                "the float checkpoint of the same model"
            )
        found = match_contents(leaves, checkpoint)
        tied = {path: (*s.keys, *s.also) for path, s in found.sources.items() if s.also}
        shapes = {leaf.path: tuple(leaf.array.shape) for leaf in leaves}
        return cls(
            found.sources, found.unmatched, tuple(found.unused), found.ambiguous, tied, shapes
        )

    @property
    def ambiguous(self) -> dict[str, tuple[str, ...]]:
        """See `NameMap.ambiguous`."""
        tied = {path: keys for path, keys in self.tied.items() if path in self.sources}
        return {**tied, **{path: options.words for path, options in self.options.items()}}

    @property
    def layouts(self) -> dict[str, Layout | None]:
        """Layouts by default module name; None for vectors that are called like a kernel."""
        known: dict[str, Layout | None] = {}
        for path, source in self.sources.items():
            is_vector = (
                len(source.axes) < 2
                and len(source.order) > 1
                and path.rpartition(".")[2] in KERNEL_LEAVES
            )
            if source.layout is not None or is_vector:
                known[module_name(path.split("."))] = source.layout
        return known

    def module_names(self, name: str) -> str | Sequence[str]:
        """Return the torch name of a module by its default name; a list of them for a stack.

        Raises:
            UnknownNameError: nothing settles it; the message lists what it could be.
        """
        for path in (
            name,
            *(f"{name}.{leaf}" for leaf in KERNEL_LEAVES),
            f"{name}.scale",
            f"{name}.bias",
        ):
            if path in self.tied or path in self.options:
                keys = self.options[path].keys if path in self.options else self.tied[path]
                raise UnknownNameError(
                    f"{path} could be {', '.join(self.ambiguous[path])}: their contents do not tell them apart. Say "
                    f"which with names.settle({{{path!r}: ...}}).",
                    [_module(key) for key in keys],
                )
            if path in self.sources:
                modules = tuple(_module(key) for key in self.sources[path].keys)
                return modules[0] if len(modules) == 1 and not self.sources[path].stack else modules
            if path in self.unmatched:
                raise UnknownNameError(
                    f"{path} has no torch name: {self.unmatched[path]}. Give it one with "
                    f"names.settle({{{path!r}: (name, layout)}})."
                )
        raise UnknownNameError(
            f"{name} has no torch name: the map, which has {len(self.sources)} leaves, lacks it."
        )

    def source(self, path: str) -> Source:
        """See `NameMap.source`."""
        if path in self.sources:
            return self.sources[path]
        if path in self.ambiguous:
            raise ValueError(f"could be {', '.join(self.ambiguous[path])}")
        raise ValueError(self.unmatched.get(path, "the map has no torch name for it"))

    def renamed(self, names: Names) -> SettledNames:
        """Return these with their torch names renamed; see `NameMap.then`."""
        sources = {
            path: dataclasses.replace(s, keys=_renamed(s.keys, names), also=_renamed(s.also, names))
            for path, s in self.sources.items()
        }
        tied = {path: _renamed(keys, names) for path, keys in self.tied.items()}
        return dataclasses.replace(self, sources=sources, tied=tied)

    def settle(self, choices: Mapping[str, Any]) -> SettledNames:
        """Return these with some leaves settled by hand; see `NameMap.settle`."""
        copies = {
            name: dict(getattr(self, name)) for name in ("sources", "unmatched", "options", "tied")
        }
        result = dataclasses.replace(self, **copies)
        known = [*self.sources, *self.options, *self.unmatched]
        for name, choice in choices.items():
            paths = (
                [name] if name in known else [p for p in known if module_name(p.split(".")) == name]
            )
            if len(paths) > 1:
                paths = [p for p in paths if p.rpartition(".")[2] in KERNEL_LEAVES] or paths
            if len(paths) != 1:
                raise KeyError(
                    f"settle: {name!r} is no leaf of this map; it has {', '.join(known)}"
                )
            result.sources[paths[0]] = result._chosen(paths[0], choice)
            for table in (result.options, result.unmatched, result.tied):
                table.pop(paths[0], None)
        return result

    def _chosen(self, path: str, choice: Any) -> Source:
        """The source of one leaf with a name, or a name and a layout, that is given by hand."""
        layout = None
        if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], Layout):
            choice, layout = choice
        elif (
            isinstance(choice, tuple)
            and len(choice) == 2
            and re.fullmatch(r"[siok\d ]+", str(choice[1]))
        ):
            choice, layout = choice[0], Layout(choice[1])
        names = [choice] if isinstance(choice, str) else list(choice)
        try:
            if (options := self.options.get(path)) is not None:
                return options.choose(
                    [n if n in options.keys else _parameter(n) for n in names], layout
                )
            tied = self.tied.get(path, ())
            keys = tuple(name if name in tied else _parameter(name) for name in names)
            source = self.sources.get(path)
            if layout is not None:
                source = Source.of_layout(keys, layout)
            elif source is None:
                raise ValueError("nothing tells its layout; give (name, layout)")
            also = tuple(key for key in tied if key not in keys)
            return dataclasses.replace(source, keys=keys, also=also)
        except ValueError as error:
            raise ValueError(f"settle({{{path!r}: {choice!r}}}): {error}") from error

    def table(self) -> str:
        """See `NameMap.table`."""
        rows = [("leaf", "shape", "torch", "layout")]
        for path, source in self.sources.items():
            shape = f"[{','.join(map(str, self.shapes[path]))}]" if path in self.shapes else ""
            keys = source.keys if len(source.keys) < 3 else (source.keys[0], "…", source.keys[-1])
            also = f" = {', '.join(source.also)}" if source.also else ""
            rows.append(
                (path, shape, ", ".join(keys) + also, source.layout.word if source.layout else "-")
            )
        lines = text_table(rows)
        lines += [
            f"ambiguous: {path}: {', '.join(options)}" for path, options in self.ambiguous.items()
        ]
        lines += [f"unmatched: {path}: {reason}" for path, reason in self.unmatched.items()]
        lines += [f"unused: {key}" for key in self.unused]
        return "\n".join(lines)

    def __str__(self) -> str:
        return (
            f"{len(self.sources)} leaves, {len(self.ambiguous)} ambiguous, {len(self.unmatched)} unmatched, "
            f"{len(self.unused)} unused torch tensors"
        )


def _leaves(params: Any) -> list[Leaf]:
    """The leaves of a tree that have values to compare.

    Raises:
        TypeError: the tree holds shapes.
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_whole)[0]:
        if isinstance(leaf, LoHaWeight):
            leaf = leaf.kernel
        elif isinstance(leaf, SavedWeight):
            leaf = leaf.original
        leaf = wrapped(leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                "NameMap.infer compares values, and the tree holds shapes (jax.ShapeDtypeStruct). Give it the "
                "parameters that were loaded from this checkpoint."
            )
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if is_array and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            parts = path_parts(path)
            leaves.append(Leaf(leaf_path(parts), parts, leaf))
    return leaves


def _without_box(path: str) -> str:
    """A JAX path as `path_parts` gives it: without the attribute that boxes the array, as tunix' gemma4 writes it."""
    return leaf_path(path.removesuffix(".value").removesuffix(".raw_value").split("."))


def _renamed(keys: Sequence[str], names: Names) -> tuple[str, ...]:
    return tuple(name for key in keys for name in all_names(key, names))


def _module(key: str) -> str:
    """The module of a torch parameter: all but the last part of its name, where that is a usual one."""
    module, _, last = key.rpartition(".")
    return module if last in ("weight", "bias", "running_mean", "running_var") and module else key


def _parameter(name: str) -> str:
    return name if _module(name) != name else f"{name}.weight"
