"""Data that travels with a tree without being part of its structure.

Two trees have the same structure if they compute the same function of their arrays. The origin of
an adapter (the base model's name, the PEFT version, a file's metadata) is kept in static objects
whose `==` and `hash` ignore it. So adapters of one shape share a compilation, and `jax.tree.map`
can average them.

A jitted function returns the treedef of its first trace. A whole tree that it returns therefore
carries the provenance of the first tree; `loha_jax.combine(trainable, frozen)` takes it from
`frozen`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.kernel_samples import KernelSample


@functools.lru_cache(maxsize=1 << 16, typed=True)
def interned(*values: Hashable) -> tuple[Any, ...]:
    """Return one tuple for equal hashable values, so that trees are compared by identity."""
    return values


class Origin(tuple):
    """The origin of an adapter of a kernel.

    As a tuple it holds only what computing needs of the config.

    Attributes:
        config: that made the adapter.
        base: a sample of the kernel that the adapter was made on, or None.
        alphas: of the adapter's modules, as they are written: 8 and 8.0 are equal, and differ in a
            file.

    Example:
        >>> one = LoHaConfig(base_model_name_or_path="org/base")
        >>> other = LoHaConfig(base_model_name_or_path="/data")
        >>> one == other, Origin(one) == Origin(other)
        (False, True)
    """

    config: LoHaConfig
    base: KernelSample | None
    alphas: tuple[float, ...]

    def __new__(
        cls, config: LoHaConfig, base: KernelSample | None = None, alphas: tuple[float, ...] = ()
    ) -> Origin:
        """Make an origin; only `config.computing` of it is compared."""
        self = super().__new__(cls, (interned(*config.computing),))
        self.config, self.base, self.alphas = config, base, alphas
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (self.config, self.base, self.alphas)


class Counters:
    """`(adapter, torch name, value)` of integer buffers in a file that a tree has no leaf for.

    All instances are equal.
    """

    def __init__(self, values: Iterable[tuple[str, str, int]] = ()):
        self._values = tuple(values)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters)

    def __hash__(self) -> int:
        return hash(Counters)

    def __repr__(self) -> str:
        return f"Counters({self._values})"
