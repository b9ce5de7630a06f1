"""`ModuleLookup`: an adapter's modules among those of a checkpoint.

One of the two may have a prefix that the other lacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .adapter_file import AdapterModule
from .lycoris_files import ModuleNames, split_prefix


class _Change(NamedTuple):
    """Names of the adapter lose `removed` in front, then get `added`."""

    removed: str
    added: str

    def __call__(self, name: str) -> str | None:
        found = name.startswith(self.removed)
        return self.added + name.removeprefix(self.removed) if found else None


class ModuleLookup:
    """The modules of a checkpoint, found by the names that an adapter has for them.

    A module is looked up by its name. Where no module of a component (a UNet, a text encoder) is
    found so, the names may lack a prefix that all of them have in the checkpoint, or the other way
    round ("model.", "transformer.", "base_model.model."): the one prefix with which all are found.

    Args:
        names: modules of the checkpoint.
        modules: of the adapter.

    Attributes:
        notes: the prefixes that were found.

    Raises:
        ValueError: several prefixes would do.

    Example:
        >>> lookup = ModuleLookup(["model.a.q"], [AdapterModule("a.q", "loha", 1, 1.0, {})])
        >>> lookup.find("a.q", ""), lookup.notes
        ('model.a.q', ["names got the prefix 'model.' of the checkpoint"])
    """

    def __init__(self, names: Iterable[str], modules: Iterable[AdapterModule]):
        self._names = list(names)
        self._known = frozenset(self._names)
        self._own_names = ModuleNames(self._names)
        self._changes: dict[str, _Change] = {}
        self._underscored: dict[str, str] = {}
        self.notes: list[str] = []
        components: dict[str, list[str]] = {}
        for module in modules:
            components.setdefault(module.prefix, []).append(module.name)
        for prefix, wanted in components.items():
            if not any(name in self._known for name in wanted):
                self._find_change(prefix, wanted)

    def _find_change(self, prefix: str, wanted: list[str]) -> None:
        known = self._known
        if prefix.endswith("_"):
            counts = Counter(name.replace(".", "_") for name in self._names)
            self._underscored = {u: n for n in self._names if counts[u := n.replace(".", "_")] == 1}
            wanted = [name.replace(".", "_") for name in wanted]
            known = frozenset(self._underscored)
        separator = "_" if prefix.endswith("_") else "."
        first = wanted[0]
        added = [n.removesuffix(first) for n in known if n.endswith(separator + first)]
        removed = [first.removesuffix(n) for n in known if first.endswith(separator + n)]
        candidates = [*(_Change("", name) for name in added), *(_Change(n, "") for n in removed)]
        good = sorted(c for c in candidates if all(c(name) in known for name in wanted))
        if len(good) > 1:
            said = " or ".join(repr(change.added or change.removed) for change in good)
            raise ValueError(
                f"The adapter's modules, such as {first}, could be the checkpoint's with the "
                f"prefix {said}. Use one that has only one of them"
            )
        if good:
            self._changes[prefix] = good[0]
            old, new = good[0]
            self.notes.append(
                f"names got the prefix {new!r} of the checkpoint"
                if new
                else f"names lost the prefix {old!r} of the adapter"
            )

    def find(self, name: str, prefix: str) -> str:
        """Return the module's name in the checkpoint; the given one if there is none."""
        change = self._changes.get(prefix)
        if change is None:
            return name
        if prefix.endswith("_"):
            found = change(name.replace(".", "_"))
            return self._underscored.get(found or "", name)
        return change(name) or name

    def find_own(self, own: str) -> str:
        """Return the same for a name with its prefix, as a LyCORIS file has it."""
        prefix, name = split_prefix(own)
        return self.find(self._own_names.find(prefix, name) or name, prefix)
