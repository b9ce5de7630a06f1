"""Other names for an adapter's modules, where those of its model have changed since.

Vision-language models of transformers are an example.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from loha_jax.targets.module_names import Names, all_names

from ..formats.adapter_file import AdapterFile
from ..formats.lycoris_files import ModuleNames, split_prefix

_SHOWN = 5


def renamed(adapter: AdapterFile, names: Names | None, modules: Iterable[str]) -> AdapterFile:
    """Return an adapter whose modules, and other parameters, have the names that `names` gives.

    Args:
        adapter: as it was read.
        names: `{regex: template}` for the whole names of modules in the adapter's file, or, where
            these have a prefix, of what follows it; or a function of the name. Names that it does
            not give stay.
        modules: of the base, to find those that a new name writes with underscores.

    Raises:
        ValueError: it gives one module several names, or a template refers to a group that its
            pattern lacks.
    """
    if names is None:
        return adapter
    known = ModuleNames(modules)
    changed = {}
    for own, module in adapter.modules.items():
        new = _new_name(names, own, module.name)
        if new is not None:
            module = dataclasses.replace(module, name=known.find(module.prefix, new) or new)
        changed[own] = module
    others = {}
    for key, value in adapter.others.items():
        owner, _, part = key.rpartition(".")
        base = owner.removesuffix(".base_layer")
        suffix = owner[len(base) :]
        prefix, rest = split_prefix(base) if adapter.form in ("lycoris", "kohya") else ("", base)
        new = _new_name(names, base, rest)
        others[key if new is None else f"{prefix}{new}{suffix}.{part}"] = value
    return dataclasses.replace(adapter, modules=changed, others=others)


def _new_name(names: Names, own: str, rest: str) -> str | None:
    for name in dict.fromkeys((own, rest)):
        try:
            found = all_names(name, names)
        except (re.error, IndexError) as error:
            raise ValueError(
                f"`names` has a template that does not fit its pattern, for {name}: {error}"
            ) from error
        if len(found) != 1:
            raise ValueError(f"`names` gives {name} several names: {', '.join(found)}")
        if found[0] != name:
            return found[0]
    return None


def rename_hint(missing: Sequence[str], modules: Sequence[str]) -> str:
    """Return a sentence on modules of the base that end as the missing ones do, or ""."""
    near: list[str] = []
    option = ""
    by_last: dict[str, list[str]] = {}
    for module in modules:
        by_last.setdefault(module.rpartition(".")[2], []).append(module)
    for name in missing:
        parts = name.split(".")
        lengths = [(_common_end(parts, m.split(".")), m) for m in by_last.get(parts[-1], ())]
        length, best = max(lengths, default=(0, ""))
        if not length or [n for n, _ in lengths].count(length) > 1:
            continue
        near.append(f"{best} for {name}")
        old, new = (".".join(own[:-length]) for own in (parts, best.split(".")))
        start = re.escape(f"{old}.") if old else ""
        option = option or str({f"{start}(.*)": f"{new}.\\1" if new else "\\1"})
        if len(near) == _SHOWN:
            break
    if not near:
        return ""
    return f" The base has {', '.join(near)}: `names={option}` renames modules."


def _common_end(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
