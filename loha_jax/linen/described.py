"""The description of a model's LoHa layers, found by evaluating its `init` abstractly.

Each layer then boxes one of its factors with its layout and settings, and Flax's own `add_axis`
tells the box which axes `nn.scan` and `nn.vmap` add.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.plan import Target

describing = jax.make_user_context(False)  # part of jit's cache key: a jitted init is traced again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Described(meta.AxisMetadata):
    """A box around a layer's `hada_w1_a`: what the layer adapts, and the axes that transforms add.

    Only while `describing`.
    """

    value: Any
    kernel_name: str = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})
    config: LoHaConfig = dataclasses.field(metadata={"static": True})
    fedpara: bool = dataclasses.field(metadata={"static": True})
    added: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        """Return the factor itself."""
        return self.value

    def replace_boxed(self, val: Any) -> Described:
        """Return the same description of another array."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: object) -> Described:
        """Note the position of an axis that `nn.scan` or `nn.vmap` adds."""
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: object) -> Described:
        """Forget the last axis that was noted."""
        return dataclasses.replace(self, added=self.added[:-1])

    def axes_of(self, axes: Sequence[int | str]) -> list[int | str]:
        """Return an array's axes: its own, and between them "+0", "+1", … added by transforms."""
        axes = list(axes)
        for n, index in enumerate(self.added):
            axes.insert(index if index >= 0 else len(axes) + 1 + index, f"+{n}")
        return axes

    @property
    def kernel_axes(self) -> list[int | str]:
        """The kernel's axes: its own by number, and those added."""
        return self.axes_of(range(self.target.layout.ndim))

    @property
    def layout(self) -> Layout:
        """The layout of the whole kernel."""
        tokens = re.findall(r"[a-z]\d*", self.target.layout.word)
        return Layout(
            " ".join("s" if isinstance(axis, str) else tokens[axis] for axis in self.kernel_axes)
        )

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return a factor's axes in the order of `Factors`: the kernel's stack axes first."""
        own_stack = self.target.layout.axes("s")
        rest = [f".{n}" for n in range(ndim - len(own_stack) - len(self.added))]
        axes = self.axes_of([*own_stack, *rest])
        kernel_axes = self.kernel_axes
        stack = [kernel_axes[axis] for axis in self.layout.axes("s")]
        return tuple(axes.index(axis) for axis in (*stack, *rest))


def describe(
    init: Callable[..., PyTree], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[tuple[str, ...], Any]:
    """Evaluate `init` abstractly; return its flat params, with `Described` leaves."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    dynamic = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, arrays)}

    def run(dynamic: Mapping[int, jax.Array]) -> PyTree:
        filled = (dynamic.get(n, leaf) for n, leaf in enumerate(leaves))
        args, kwargs = treedef.unflatten(filled)
        return init(*args, **kwargs)

    with describing(True):
        variables = jax.eval_shape(run, dynamic)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{init!r} is not the init of a Linen model: it gives no dict with 'params'"
        )
    flat = flatten_dict(variables["params"])
    if not any(isinstance(leaf, Described) for leaf in flat.values()):
        raise ValueError(f"The model of {init!r} has no layer of loha_jax.linen")
    return {
        path: leaf if isinstance(leaf, Described) else meta.unbox(leaf)
        for path, leaf in flat.items()
    }
