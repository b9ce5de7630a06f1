"""Names of an adapter whose model was wrapped when it was saved.

`torch.compile`, FSDP and DataParallel put a part into the names of a model's modules.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable

from loha_jax.targets.config import LoHaConfig

from ..disk.tensor_files import without_wrappers
from ..formats.adapter_file import AdapterFile

_DATA_PARALLEL = re.compile(r"^(\^?)module\\?\.")  # of a name, or of an exact pattern


def unwrapped(
    file: AdapterFile, config: LoHaConfig, tree_modules: Callable[[], Collection[str]]
) -> tuple[AdapterFile, LoHaConfig]:
    """Return an adapter and its config with the names of the model itself.

    Args:
        file: an adapter; its own names are already free of all wrappers but DataParallel's.
        config: the adapter's.
        tree_modules: gives the names of the tree's modules. One called "module" is no wrapper.
    """
    config = _renamed_config(config, without_wrappers)
    is_parallel = all(name.startswith("module.") for name in (*file.modules, *file.others))
    if not is_parallel or "module" in tree_modules():
        return file, config
    strip = functools.partial(_DATA_PARALLEL.sub, r"\1")
    modules = [dataclasses.replace(m, name=strip(m.name)) for m in file.modules.values()]
    file = dataclasses.replace(
        file,
        modules={module.name: module for module in modules},
        others={strip(name): array for name, array in file.others.items()},
        keys={strip(name): key for name, key in file.keys.items()},
    )
    return file, _renamed_config(config, strip)


def _renamed_config(config: LoHaConfig, rename: Callable[[str], str]) -> LoHaConfig:
    """Return the config with renamed modules, in lists and in the keys of patterns."""

    def entries(names: str | Iterable[str] | None) -> str | list[str] | None:
        return names if names is None or isinstance(names, str) else [rename(n) for n in names]

    return dataclasses.replace(
        config,
        target_modules=entries(config.target_modules),
        exclude_modules=entries(config.exclude_modules),
        modules_to_save=entries(config.modules_to_save),
        rank_pattern={rename(name): r for name, r in config.rank_pattern.items()},
        alpha_pattern={rename(name): alpha for name, alpha in config.alpha_pattern.items()},
    )
