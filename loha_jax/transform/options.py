"""How a function is evaluated: its options, and an observer of every use of a kernel."""

from __future__ import annotations

import contextvars
import dataclasses
from typing import TYPE_CHECKING

from jax.extend.core import JaxprEqn

from loha_jax.transform.compute_dtype import ComputeDtype
from loha_jax.transform.strategy import Strategies, Strategy

if TYPE_CHECKING:
    from loha_jax.transform.kernel_view import KernelView
    from loha_jax.transform.operation import CostModel


class Observer:
    """Told of every use of a kernel (`explain`, `infer_layouts`); each method does nothing here."""

    def used(self, view: KernelView, eqn: JaxprEqn, operand: int) -> None:
        """An equation that is not a structural operation reads the view."""

    def scanned(self, view: KernelView, atom: int | None) -> None:
        """A scan slices the leading axis: this atom, or None for an axis of size 1."""

    def computed(
        self, view: KernelView, operation: CostModel, strategy: Strategy, times: int, note: str = ""
    ) -> None:
        """A product or convolution is computed `times` times (scans around it) by this strategy.

        The note says why it is not the one that was asked for.
        """

    def rows(self, view: KernelView, count: int, times: int) -> None:
        """Single positions of an axis are read (an embedding lookup)."""

    def dense(
        self, name: str, shape: tuple[int, ...], primitive: str, reason: str, times: int
    ) -> None:
        """The weight is materialised for an operation that has no other form."""


OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("OBSERVER", default=None)
"""Told of the updates that a provider of qwix adds while a model runs."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How adapted products are evaluated; hashable, so that equal inner functions share traces.

    Attributes:
        strategy: one for all modules, or pairs of a pattern of module names and a strategy.
        training: whether costs count the backward pass.
        forward_mode: plain products that `jax.jvp` can differentiate, instead of `custom_vjp`.
        compute_dtype: the rule for the dtype that updates are computed in.
        update_alone: the result is what the adapters add: the values of the kernel are not read.
        observer: told of every use, or None. An observed evaluation shares no traces.
        times: trip count of the scans around the current equation, for the observer.
        base_apart: whether W is a slice in a loop, or serves rows that have adapters of their own:
            then it is not joined with factors, which would copy it.
    """

    strategy: Strategies = "auto"
    training: bool = True
    forward_mode: bool = False
    compute_dtype: ComputeDtype = "auto"
    update_alone: bool = False
    observer: Observer | None = None
    times: int = 1
    base_apart: bool = False

    def repeated(self, times: int) -> Options:
        """Return the options inside a scan."""
        times = self.times if self.observer is None else self.times * times
        return dataclasses.replace(self, times=times, base_apart=True)
