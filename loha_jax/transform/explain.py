"""`explain`: how `adapt` computes each product of a model, and the cost over the frozen base."""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping

import jax

from loha_jax.transform.adapt import make_options, run
from loha_jax.transform.arguments import flat_arguments
from loha_jax.transform.closures import closed_over
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.operation import CostModel
from loha_jax.transform.options import OBSERVER, Observer
from loha_jax.transform.strategy import Strategy
from loha_jax.tree.containers import adapted_leaves, provided_leaves
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.text_table import text_table


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of an adapted kernel, in an `Explanation`.

    Attributes:
        module: torch module name(s).
        primitive: the JAX primitive that reads the kernel.
        shape: of the kernel there.
        rows: rows of the other operand (tokens), times the trip count of the scans around it.
        strategy: "factored", "fused", "dense", "pallas" or "rows" (an embedding lookup that
            computes only the rows it reads).
        flops: FLOPs of the frozen base's product (in training: forward and input gradient).
        extra_flops: FLOPs that the adapter adds, by the cost model that "auto" chooses with.
        extra_bytes: bytes of the largest array that the strategy adds.
        note: why a weight is dense, or a product not "pallas" as it should be.
    """

    module: str
    primitive: str
    shape: tuple[int, ...]
    rows: int
    strategy: str
    flops: float
    extra_flops: float
    extra_bytes: int
    note: str = ""

    @property
    def ratio(self) -> float:
        """FLOPs with the adapter over FLOPs of the frozen base; nan where they are not counted."""
        return (self.flops + self.extra_flops) / self.flops if self.flops else float("nan")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Returned by `explain`; `print` it for a table.

    Attributes:
        uses: in the order of the computation.
        unused: modules with an adapter that the function never reads.
        note: why there is nothing to explain: no argument holds an active adapter.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    note: str = ""

    @property
    def dense(self) -> tuple[Use, ...]:
        """The uses for which the weight is materialised."""
        return tuple(use for use in self.uses if use.strategy == "dense")

    def __str__(self) -> str:
        header = (
            *("module", "primitive", "kernel", "rows"),
            *("strategy", "FLOPs/base", "extra bytes", "note"),
        )
        cells = [
            (
                *(use.module, use.primitive, "x".join(map(str, use.shape))),
                *(f"{use.rows:,}" if use.rows else "-", use.strategy),
                *(f"{use.ratio:.3f}" if use.flops else "-", f"{use.extra_bytes:,}", use.note),
            )
            for use in self.uses
        ]
        lines = text_table([header, *cells])
        flops = sum(use.flops for use in self.uses)
        if flops:
            extra = sum(use.extra_flops for use in self.uses)
            lines.append(
                f"adapted products: {len(self.uses)}, FLOPs over the frozen base's: "
                f"{1 + extra / flops:.3f}"
            )
        lines += [f"never read: {name}" for name in self.unused]
        lines += [self.note] if self.note else []
        return "\n".join(lines)


class _Recorder(Observer):
    """The `Observer` that collects uses."""

    def __init__(self, training: bool):
        self.training = training
        self.uses: list[Use] = []

    def computed(
        self, view: KernelView, operation: CostModel, strategy: Strategy, times: int, note: str = ""
    ) -> None:
        factored = strategy in ("factored", "pallas")
        costs = operation.costs(view, self.training)
        self.uses.append(
            Use(
                *(view.name, operation.primitive, view.shape, operation.rows * times, strategy),
                flops=costs.base * times,
                extra_flops=(costs.factored if factored else costs.fused) * times,
                extra_bytes=operation.temporary_bytes(view, strategy),
                note=note,
            )
        )

    def rows(self, view: KernelView, count: int, times: int) -> None:
        width = max(view.shape)
        self.uses.append(
            Use(view.name, "gather", view.shape, count * times, "rows", 0.0, 0.0, 4 * count * width)
        )

    def dense(
        self, name: str, shape: tuple[int, ...], primitive: str, reason: str, times: int
    ) -> None:
        self.uses.append(
            Use(name, primitive, shape, 0, "dense", 0.0, 0.0, 4 * math.prod(shape), reason)
        )


def explain(
    fn: Callable[..., object],
    params: object,
    *args: object,
    strategy: str | Mapping[str, str] = "auto",
    training: bool = True,
    forward_mode: bool = False,
    **kwargs: object,
) -> Explanation:
    """Return the strategy, FLOPs and bytes of each use of an adapted kernel by `adapt(fn)`.

    Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. The answer is that of this process'
    devices (`jax.devices()`): on a CPU it does not say what a TPU would do.

    Args:
        fn: the model's function, or the result of `adapt`, whose own settings then count.
        params: the first argument of `fn`, an adapted tree or NNX model.
        args, kwargs: the other arguments of `fn`.
        strategy, training, forward_mode: as for `adapt`. The updates that a
            `loha_jax.qwix.LoHaProvider` adds are computed by its own.

    Raises:
        ValueError: `fn` was made by `adapt(..., adapter_index=...)`.

    Example:
        >>> import jax.numpy as jnp, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((64, 64))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> explain(lambda p, x: x @ p["q"]["kernel"], params, jnp.ones((128, 64))).uses[0].strategy
        'factored'
    """
    options = make_options(strategy, training, forward_mode)
    if hasattr(fn, "__loha_jax__"):
        fn, options, by_row = vars(fn)["__loha_jax__"]
        if by_row:
            raise ValueError(
                'With adapter_index "auto" is factored, each row with its own adapter. To see the '
                "products, explain adapt(fn) without adapter_index, with one active "
                "adapter."
            )
    recorder, provided = _Recorder(options.training), provided_leaves((params, args, kwargs))
    options = dataclasses.replace(options, observer=recorder)

    arguments = flat_arguments(params, *args, **kwargs)

    def traced(arrays: list[jax.Array]) -> list[jax.Array]:
        args, kwargs = arguments.fill(arrays)
        outputs = jax.tree.leaves(run(fn, args, kwargs, options))
        return [o for o in outputs if isinstance(o, jax.Array)]

    token = OBSERVER.set(recorder)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The function that adapt was given closes over"
        )  # the note says it
        try:
            jax.eval_shape(traced, arguments.arrays)
        finally:
            OBSERVER.reset(token)
    uses = tuple(_of_stack(use, provided.get(use.module)) for use in recorder.uses)
    seen = {use.module for use in uses}
    adapted = [*adapted_leaves((params, args, kwargs)), *provided.values()]
    names = [
        leaf.label for leaf in adapted if isinstance(leaf, LoHaWeight) and leaf.active_adapters
    ]
    note = "" if names else _nothing_adapted(fn)
    return Explanation(uses, tuple(name for name in names if name not in seen), note)


def _of_stack(use: Use, leaf: LoHaWeight | None) -> Use:
    """Return a use with the scans around it, which a provider of qwix does not see."""
    if leaf is None:
        return use
    times = leaf.size // math.prod(use.shape)
    return dataclasses.replace(
        use,
        module=leaf.label,
        rows=use.rows * times,
        flops=use.flops * times,
        extra_flops=use.extra_flops * times,
    )


def _nothing_adapted(fn: Callable[..., object]) -> str:
    reason = ""
    if closed := closed_over(fn):
        names = ", ".join(closed)
        reason = f"; the function closes over adapted kernels ({names}), which are not seen"
    return (
        f"No argument holds a kernel with an active adapter{reason}. Pass the adapted tree as an "
        "argument."
    )
