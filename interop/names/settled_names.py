"""`SettledNames`: the torch names and layouts of a model's leaves, as a checkpoint settles them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.module_names import (
    KERNEL_LEAVES,
    Names,
    UnknownNameError,
    all_names,
    module_name,
)
from loha_jax.tree.text_table import text_table

from .leaf_options import Options
from .leaf_source import Source

Choice = str | Sequence[str] | tuple[str | Sequence[str], str | Layout]
"""What settles a leaf: torch's name (several for a stack), or names and a layout."""

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
        tied: the leaves whose tensor is in the file more than once, and which none was chosen for.
        shapes: of the leaves, for the table.
    """

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    unmatched: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    options: dict[str, Options] = dataclasses.field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def ambiguous(self) -> dict[str, tuple[str, ...]]:
        """See `NameMap.ambiguous`."""
        tied = {path: self._all_keys(path) for path in self.sources if path in self.tied}
        return tied | {path: options.words for path, options in self.options.items()}

    def _all_keys(self, path: str) -> tuple[str, ...]:
        """Return the names of all tensors that have the values of a leaf that is settled."""
        source = self.sources[path]
        return (*source.keys, *source.also)

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
                options = self.options.get(path)
                keys = options.keys if options else self._all_keys(path)
                raise UnknownNameError(
                    f"{path} could be {', '.join(self.ambiguous[path])}: their contents do not "
                    f"tell them apart. Say which with names.settle({{{path!r}: ...}}).",
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
        return dataclasses.replace(self, sources=sources)

    def settle(self, choices: Mapping[str, Choice]) -> SettledNames:
        """Return these with some leaves settled by hand; see `NameMap.settle`."""
        chosen: dict[str, Source] = {}
        for name, choice in choices.items():
            path = self._path(name)
            chosen[path] = self._chosen(path, choice)
        return dataclasses.replace(
            self,
            sources={**self.sources, **chosen},
            unmatched={p: why for p, why in self.unmatched.items() if p not in chosen},
            options={p: options for p, options in self.options.items() if p not in chosen},
            tied=self.tied - chosen.keys(),
        )

    def _path(self, name: str) -> str:
        """Return the path of the leaf that a path or a default module name means."""
        known = [*self.sources, *self.options, *self.unmatched]
        paths = [p for p in known if module_name(p.split(".")) == name]
        if len(paths) > 1:
            paths = [p for p in paths if p.rpartition(".")[2] in KERNEL_LEAVES] or paths
        if name in known:
            return name
        if len(paths) != 1:
            raise KeyError(f"settle: {name!r} is no leaf of this map; it has {', '.join(known)}")
        return paths[0]

    def _chosen(self, path: str, choice: Choice) -> Source:
        """Return the source of one leaf with the name, or name and layout, given by hand."""
        names, layout = _split_choice(choice)
        try:
            if (options := self.options.get(path)) is not None:
                return options.choose(
                    [n if n in options.keys else _parameter(n) for n in names], layout
                )
            tied = self._all_keys(path) if path in self.tied else ()
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
        lines += [f"ambiguous: {p}: {', '.join(words)}" for p, words in self.ambiguous.items()]
        lines += [f"unmatched: {path}: {reason}" for path, reason in self.unmatched.items()]
        lines += [f"unused: {key}" for key in self.unused]
        return "\n".join(lines)

    def __str__(self) -> str:
        return (
            f"{len(self.sources)} leaves, {len(self.ambiguous)} ambiguous, "
            f"{len(self.unmatched)} unmatched, {len(self.unused)} unused torch tensors"
        )


def _split_choice(choice: Choice) -> tuple[list[str], Layout | None]:
    """Split what was given for a leaf into names and a layout."""
    layout = None
    if isinstance(choice, tuple) and len(choice) == 2:
        names, last = choice
        if isinstance(last, Layout):
            choice, layout = names, last
        elif re.fullmatch(r"[siok\d ]+", last):
            choice, layout = names, Layout(last)
    return [choice] if isinstance(choice, str) else [str(name) for name in choice], layout


def _renamed(keys: Sequence[str], names: Names) -> tuple[str, ...]:
    return tuple(name for key in keys for name in all_names(key, names))


def _module(key: str) -> str:
    """Return a torch parameter's name without its last part, if that is a usual one."""
    module, _, last = key.rpartition(".")
    return module if last in ("weight", "bias", "running_mean", "running_var") and module else key


def _parameter(name: str) -> str:
    return name if _module(name) != name else f"{name}.weight"
