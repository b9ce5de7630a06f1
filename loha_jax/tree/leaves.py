"""The leaves of an adapted tree: `LoHaWeight` in place of a kernel, `SavedWeight` of a saved leaf.

Both are registered pytrees and array-likes (`__jax_array__`, JEP 28661). A model that uses
`jax.numpy` computes with the adapted weight; it needs no wrapper and knows nothing of this library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
from jax import lax
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.tree.array_like import ArrayLike
from loha_jax.tree.factors import Factors
from loha_jax.tree.flat_node import FlatNode, keep, register
from loha_jax.tree.forgotten_dropout import warn_of_forgotten_dropout
from loha_jax.tree.own_paths import own_path
from loha_jax.tree.provenance import Counters, interned
from loha_jax.tree.quantised import QuantisedArray, as_array, is_quantised
from loha_jax.tree.short_repr import adapter_list, short_array

T = TypeVar("T")
A = TypeVar("A")

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of a BatchNorm's state in torch."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # arrays compare elementwise
class LoHaWeight(ArrayLike, FlatNode):
    """A frozen kernel with its LoHa adapters, in the kernel's place in the tree.

    As an array it is `kernel + Σ ΔW` over the active adapters, in the kernel's dtype, added in
    float32 or better. The kernel gets no gradient. Applied through `loha_jax.adapt`, the sum is
    materialised only where that is cheaper, and not kept.

    Attributes:
        kernel: the base weight, unchanged. It is the first child: Flax compares its shape.
        adapters: `Factors` by adapter name.
        layout: the kind of each axis of the kernel.
        names: torch module names, one per stack index.
        active: the adapters that count, in order.
        rows: how torch's rows of each module differ from the kernel's; only files need it.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = {"q": {"kernel": jnp.ones((3, 4))}}
        >>> params = loha_jax.inject(params, config, key=jax.random.key(0))
        >>> params
        {'q': {'kernel': LoHaWeight(f32[3,4] io, default: r=2 alpha=8)}}
        >>> (jnp.ones((5, 3)) @ params["q"]["kernel"]).shape
        (5, 4)
    """

    kernel: Any
    adapters: dict[str, Factors]
    layout: Layout
    names: tuple[str, ...]
    active: tuple[str, ...]
    rows: RowTransform | None = None

    def __post_init__(self) -> None:
        aux = interned(self.layout, self.names, self.active, self.rows)
        keep(self, _children=(self.kernel, self.adapters), _aux=aux)

    def __repr__(self) -> str:
        adapters = ((name, factors.description) for name, factors in self.adapters.items())
        held = self.kernel
        kernel = repr(held) if isinstance(held, QuantisedArray) else short_array(held)
        kernel += f" {self.layout.word}"
        return f"LoHaWeight({kernel}, {adapter_list(adapters, self.active)})"

    @property
    def _frozen(self) -> jax.Array:
        return _held(self, "kernel", self.kernel)

    @property
    def original(self) -> Any:
        """The kernel, under the name that a `SavedWeight` has for what it replaces."""
        return self.kernel

    def require_whole(self) -> None:
        """Raise ValueError for a leaf of one half of `partition`."""
        _held(self, "kernel", self.kernel)
        for factors in self.adapters.values():
            _held(self, "factors", factors.hada_w1_a)

    @property
    def label(self) -> str:
        """The module's name for messages; of a stack, the first and the last one."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"

    @property
    def active_adapters(self) -> tuple[Factors, ...]:
        """The active adapters that this kernel has, in order."""
        return tuple(self.adapters[name] for name in self.active if name in self.adapters)

    def with_adapter(self, name: str, factors: Factors) -> LoHaWeight:
        """Return the kernel with one more adapter, the active one."""
        adapters = {**self.adapters, name: factors}
        return dataclasses.replace(self, adapters=adapters, active=(name,))

    def __jax_array__(self) -> jax.Array:
        return self.dense()

    @standard_promotion()
    def dense(
        self, adapters: tuple[str, ...] | None = None, *, forward_mode: bool = False
    ) -> jax.Array:
        """Compute `kernel + Σ ΔW`, in the kernel's shape and dtype.

        Args:
            adapters: which ones to add; the active ones by default.
            forward_mode: plain products that `jax.jvp` can differentiate.

        Raises:
            ValueError: the leaf was taken apart by `partition`, or by a vmap or scan over other
                than stack axes.
        """
        self.require_whole()
        kernel = lax.stop_gradient(as_array(self._frozen))
        chosen = self.active_adapters
        if adapters is not None:
            chosen = tuple(self.adapters[name] for name in adapters)
        if not chosen:
            return kernel
        warn_of_forgotten_dropout(chosen)
        layout = self.layout.strip(kernel.ndim)
        stack = layout.sizes("s", kernel.shape)
        total = kernel.astype(float32_or_wider(kernel.dtype))
        for factors in chosen:
            if factors.stack != stack:
                raise ValueError(
                    f"The adapter of {self.names[0]} has the stack axes {factors.stack}, its "
                    f"kernel ({self.layout.word!r}, now of shape {kernel.shape}) has {stack}: the "
                    "tree was sliced along an axis that is not a leading stack axis. Apply the "
                    "model through `loha_jax.adapt`."
                )
            delta = factors.delta(forward_mode=forward_mode)
            if (gains := factors.gains(kernel, layout)) is not None:
                weight = layout.unfold(kernel).astype(delta.dtype)
                delta = gains[0] * delta.reshape(weight.shape) + gains[1] * weight
            total += layout.fold(delta, kernel.shape)
        return total.astype(kernel.dtype)


register(
    LoHaWeight,
    lambda leaf: ("kernel", "adapters"),
    lambda aux, children: LoHaWeight(*children, *aux),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # arrays compare elementwise
class SavedWeight(ArrayLike):
    """A leaf of a module in `modules_to_save`: the original, and a trained copy per adapter.

    As an array it is the copy of the active adapter that has one, else the original, which gets no
    gradient. Two such adapters are an error (as in PEFT).

    Attributes:
        original: the base parameter.
        copies: trained copies by adapter name.
        layout: of a kernel, or None for a parameter that torch stores with the same axes.
        name: torch parameter name, e.g. "classifier.weight".
        active: the adapters that count.
        counters: `(adapter, torch name, value)` of integer buffers in the adapter's file that the
            tree has no leaf for (a BatchNorm's `num_batches_tracked`). They are written back
            unchanged and are no part of the tree's structure.
        rows: how torch's rows differ from the parameter's; only files need it.
    """

    original: Any
    copies: dict[str, Any]
    layout: Layout | None = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    active: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    counters: Counters = dataclasses.field(default=Counters(), metadata={"static": True})
    rows: RowTransform | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.counters, Counters):
            object.__setattr__(self, "counters", Counters(self.counters))

    def __repr__(self) -> str:
        copies = ((name, short_array(copy)) for name, copy in self.copies.items())
        original = short_array(self.original) + (f" {self.layout.word}" if self.layout else "")
        return f"SavedWeight({original}, {adapter_list(copies, self.active)})"

    @property
    def label(self) -> str:
        """The parameter's name for messages."""
        return self.name

    @property
    def is_buffer(self) -> bool:
        """True for a buffer of torch (BatchNorm statistics): saved, but not trained."""
        return self.name.rsplit(".", 1)[-1] in BUFFERS

    @property
    def _frozen(self) -> jax.Array:
        return _held(self, "original", self.original)

    def require_whole(self) -> None:
        """Raise ValueError for a leaf of one half of `partition`."""
        _held(self, "original", self.original)
        for copy in self.copies.values():
            _held(self, "copy", copy)

    def with_copy(self, name: str, copy: Any) -> SavedWeight:
        """Return the leaf with one more copy, that of the active adapter."""
        return dataclasses.replace(self, copies={**self.copies, name: copy}, active=(name,))

    def copy_of(self, adapters: Sequence[str]) -> str | None:
        """Return the one of these adapters that has a copy, or None.

        Raises:
            ValueError: several have one.
        """
        names = [name for name in adapters if name in self.copies]
        if len(names) > 1:
            raise ValueError(
                f"Only one adapter at a time can replace {self.name}, but {', '.join(names)} each "
                "hold a copy of it (modules_to_save). Activate one of them, or run each row "
                "through its own with adapt(fn, adapter_index=ids)."
            )
        return names[0] if names else None

    def __jax_array__(self) -> jax.Array:
        name = self.copy_of(self.active)
        return lax.stop_gradient(as_array(self._frozen)) if name is None else self.copies[name]


AdaptedLeaf = LoHaWeight | SavedWeight


def _held(leaf: AdaptedLeaf, what: str, array: A | None) -> A:
    if array is None or (isinstance(array, QuantisedArray) and not array.is_whole):
        raise ValueError(
            f"The {type(leaf).__name__} of {leaf.label} holds no {what}: it comes from one half of "
            "`partition`. Put the halves together with `loha_jax.combine(trainable, frozen)` first."
        )
    return array


def is_adapted(leaf: object) -> TypeGuard[AdaptedLeaf]:
    """Return whether a node of a tree is a `LoHaWeight` or a `SavedWeight` (for `is_leaf=`)."""
    return isinstance(leaf, AdaptedLeaf)


def is_whole(leaf: object) -> bool:
    """Return whether a node of a tree is an adapted leaf or a quantised array (for `is_leaf=`)."""
    return is_adapted(leaf) or is_quantised(leaf)


def base_of(leaf: object) -> Any:
    """Return the array that an adapted leaf stands for; any other leaf as it is."""
    return leaf.original if is_adapted(leaf) else leaf


def map_adapted(fn: Callable[[AdaptedLeaf], object], tree: T) -> T:
    """Return the tree with `fn(leaf)` for each adapted leaf; the other leaves stay.

    Example:
        >>> map_adapted(lambda leaf: leaf.original, {"bias": 1.0})
        {'bias': 1.0}
    """
    return jax.tree.map(lambda leaf: fn(leaf) if is_adapted(leaf) else leaf, tree, is_leaf=is_whole)


def map_factors(fn: Callable[[LoHaWeight, str, Factors], Factors], tree: T) -> T:
    """Return the tree with `fn(leaf, name, factors)` for each adapter of each adapted kernel."""

    def mapped(leaf: AdaptedLeaf) -> AdaptedLeaf:
        if isinstance(leaf, SavedWeight):
            return leaf
        adapters = {name: fn(leaf, name, factors) for name, factors in leaf.adapters.items()}
        return dataclasses.replace(leaf, adapters=adapters)

    return map_adapted(mapped, tree)


def flatten_whole(tree: PyTree) -> tuple[list[Any], Any]:
    """Flatten a tree like `jax.tree.flatten`, with adapted leaves and quantised arrays whole."""
    return jax.tree.flatten(tree, is_leaf=is_whole)


def leaves_by_path(
    tree: PyTree, is_leaf: Callable[[object], bool] = is_whole
) -> list[tuple[tuple[str, ...], Any]]:
    """Return the leaves of a tree, each with its path as strings (`own_path`)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(own_path(tree, path).parts, leaf) for path, leaf in flat]


def leaves_of(kind: type[A], tree: PyTree) -> list[A]:
    """Return the leaves of one kind, `LoHaWeight` or `SavedWeight`, in the tree's order."""
    return [leaf for leaf in flatten_whole(tree)[0] if isinstance(leaf, kind)]
