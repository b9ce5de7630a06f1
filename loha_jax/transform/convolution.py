"""Convolutions with an adapted kernel: factored (no ΔW), and what it costs.

A flat update is a convolution to r² channels followed by a 1x1 one. With cores (CP form) it is a
1x1 convolution to r² channels, a small spatial one from r² to r² channels, whose kernel is the
Kronecker product of the two cores, and a 1x1 one. Groups of a convolution share the factors' input
features and divide the output features. Modules stacked in the out axis (a vmapped convolution)
have factors of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider, khatri_rao_columns
from loha_jax.runtime.sizes import nominal
from loha_jax.transform.contraction import contract
from loha_jax.transform.decomposed_base import BaseScaling
from loha_jax.transform.kernel_view import KernelView, ViewFactors, size_of
from loha_jax.transform.operation import NoRule, Operation
from loha_jax.transform.strategy import Strategy


@dataclasses.dataclass(frozen=True)
class Convolution(Operation):
    """A `conv_general_dilated` of a plain array with a `KernelView`, its axes sorted by meaning.

    Attributes:
        params: of the `conv_general_dilated`.
        rows: positions of the result, over the whole batch; symbolic sizes count as 1.
        x_rows: the same of x.
        stacked: modules stacked in the kernel's out axis.
        groups: of each module.
    """

    primitive: ClassVar[str] = "conv_general_dilated"
    branches: ClassVar[bool] = False  # a training step of a small net took 40 times as long

    params: Any
    rows: int
    x_rows: int
    stacked: int
    groups: int

    @classmethod
    def of(
        cls, view: KernelView, x: Any, result_shape: Sequence[int], params: dict[str, Any]
    ) -> Convolution | NoRule:
        """Return the convolution with its axes sorted, or why it has no factored form."""
        numbers = params["dimension_numbers"]
        out, in_, *spatial = (view.dims[axis] for axis in numbers.rhs_spec)

        def kinds(atoms):
            return {view.atoms[n].kind for n in atoms}

        stack = [n for n in out if view.atoms[n].kind == "s"]
        if params["batch_group_count"] != 1:
            return NoRule("a convolution with batch groups")
        if "i" in kinds(out) or "o" in kinds(in_):
            return NoRule("the kernel's out axes are contracted")
        if (
            kinds(out) - {"s", "o"}
            or kinds(in_) - {"i"}
            or any(kinds(atoms) - {"k"} for atoms in spatial)
        ):
            return NoRule("in, out, stack and spatial axes of the kernel are mixed")
        stacked, groups = size_of(view, stack), params["feature_group_count"]
        if tuple(stack) != out[: len(stack)] or groups % stacked:
            return NoRule("modules stacked in the out axis do not have groups of their own")
        batch, _, *space = numbers.out_spec
        return cls(
            params={
                name: value
                for name, value in params.items()
                if name not in ("lhs_shape", "rhs_shape")
            },
            rows=nominal(result_shape[axis] for axis in (batch, *space)),
            x_rows=nominal(x.shape[axis] for axis in (numbers.lhs_spec[0], *numbers.lhs_spec[2:])),
            stacked=stacked,
            groups=groups // stacked,
        )

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """See `Operation.apply`."""
        return lax.conv_general_dilated(x, kernel, **self.params)

    def place_gain(self, x: Any, gain: jax.Array) -> BaseScaling | None:
        """See `Operation.place_gain`."""
        numbers = self.params["dimension_numbers"]
        out, in_, *_ = numbers.rhs_spec
        varying = {d for d, size in enumerate(gain.shape) if size > 1}
        shape = [1] * x.ndim
        if varying <= {out}:
            shape[numbers.out_spec[1]] = gain.size
            return BaseScaling(of_result=gain.reshape(-1).reshape(shape))
        if varying <= {in_}:
            # every group has the same norms of in features
            features = jnp.tile(gain.reshape(-1), self.stacked * self.groups)
            shape[numbers.lhs_spec[1]] = features.size
            return BaseScaling(of_input=features.reshape(shape))
        return None

    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, list[jax.Array]]:
        """See `Operation.update`: the sum over the adapters, and the h of each."""
        total, hs = jnp.zeros((), x.dtype), []
        for f in view.factors:
            steps = self._steps(x, f)
            f = self._in_axis_order(view, f)
            hs.append(_down(steps, self._channels_last(x), f))
            total = total + self._from_channels_last(_up(steps, hs[-1], f))
        return total, hs

    def pull_back(
        self, x: jax.Array, view: KernelView, h: list[jax.Array], g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """See `Operation.pull_back`."""
        dx, dfactors = jnp.zeros((), x.dtype), []
        for f, h_f in zip(view.factors, h, strict=True):
            steps = self._steps(x, f)
            g_last = self._to_channels_last(g).astype(steps.dtype)
            ordered, from_ordered = jax.vjp(lambda f: self._in_axis_order(view, f), f)
            x_last, from_last = jax.vjp(self._channels_last, x.astype(steps.dtype))
            dx_f, df = _pull_back(steps, x_last, ordered, h_f, g_last)
            dx = dx + from_last(dx_f)[0]
            dfactors.append(from_ordered(df)[0])
        return dx, tuple(dfactors)

    def _steps(self, x: jax.Array, f: ViewFactors) -> _Steps:
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        return _Steps(
            self.stacked,
            self.groups,
            tuple((name, self.params[name]) for name in names),
            float32_or_wider(x.dtype, f.w1_a.dtype),
            self.params["precision"],
        )

    def _channels_last(self, x: jax.Array) -> jax.Array:
        batch, feature, *space = self.params["dimension_numbers"].lhs_spec
        return jnp.transpose(x, (batch, *space, feature))

    def _to_channels_last(self, g: jax.Array) -> jax.Array:
        batch, feature, *space = self.params["dimension_numbers"].out_spec
        return jnp.transpose(g, (batch, *space, feature))

    def _from_channels_last(self, y: jax.Array) -> jax.Array:
        batch, feature, *space = self.params["dimension_numbers"].out_spec
        order = (batch, *space, feature)
        return jnp.transpose(y, sorted(range(y.ndim), key=order.__getitem__))

    def _in_axis_order(self, view: KernelView, f: ViewFactors) -> ViewFactors:
        """Return the factors as `_Steps` takes them.

        Positions are in the order of the view's axes; cores are used only where they save FLOPs.
        """
        if not self._uses_cores(view, f):
            f = f.flat()
        out, in_, *spatial = (view.dims[axis] for axis in self.params["dimension_numbers"].rhs_spec)
        stack = [n for n in out if view.atoms[n].kind == "s"]
        leading = len(view.of_kind("s"))

        def large(atoms: Sequence[int]) -> list[int]:
            return [n for n in atoms if view.atoms[n].size > 1]

        def arrange(w: Any, *axes: tuple[Sequence[int], Sequence[Sequence[int]]] | None) -> Any:
            """Split each axis into atoms and join them as wanted; None is a rank axis."""
            sizes = [view.atoms[n].size for n in large(view.of_kind("s"))]
            order = [large(view.of_kind("s")).index(n) for n in stack]
            shape = [self.stacked]
            for axis, atoms in enumerate(axes, leading):
                if atoms is None:
                    order.append(len(sizes))
                    sizes.append(w.shape[axis])
                    shape.append(w.shape[axis])
                else:
                    have, want = large(atoms[0]), atoms[1]
                    order += [len(sizes) + have.index(n) for group in want for n in group]
                    sizes += [view.atoms[n].size for n in have]
                    shape += [size_of(view, group) for group in want]
            return jnp.transpose(w.reshape(sizes), order).reshape(shape)

        a = (view.of_kind("o"), [[n for n in out if n not in stack]])
        k = (view.of_kind("k"), spatial)
        b = (view.of_kind("i"), [in_]) if f.t1 is not None else (view.of_side("i"), [in_, *spatial])
        return ViewFactors(
            arrange(f.w1_a, a, None),
            arrange(f.w1_b, None, b),
            arrange(f.w2_a, a, None),
            arrange(f.w2_b, None, b),
            None if f.t1 is None else arrange(f.t1, None, None, k),
            None if f.t2 is None else arrange(f.t2, None, None, k),
            arrange(f.scaling),
        )

    def elements(self, view: KernelView) -> int:
        """See `Operation.elements`."""
        return math.prod(self._sizes(view))

    def factored_flops(self, view: KernelView) -> float:
        """See `Operation.factored_flops`."""
        into, out, positions = self._sizes(view)
        steps = sum(self._flops(view, f, self._uses_cores(view, f)) for f in view.factors)
        return steps + sum(2 * f.r**2 * (into * positions + out) for f in view.factors)

    def temporary_bytes(self, view: KernelView, strategy: Strategy) -> int:
        """See `Operation.temporary_bytes`."""
        if strategy != "factored":
            return 4 * math.prod(view.shape)
        into, out, positions = self._sizes(view)
        rows = self.rows * self.stacked * self.groups
        return 4 * max(f.r**2 * max(into * positions, out, rows) for f in view.factors)

    def _sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return the in features (per group), out features and positions of the whole kernel."""
        out, in_, *spatial = self.params["dimension_numbers"].rhs_spec
        return view.shape[in_], view.shape[out], math.prod(view.shape[axis] for axis in spatial)

    def _flops(self, view: KernelView, f: ViewFactors, cores: bool) -> float:
        """Return the FLOPs of the factored update's forward pass."""
        into, out, positions = self._sizes(view)
        squared, groups = f.r**2, self.stacked * self.groups
        if cores:
            down = groups * squared * (self.x_rows * into + self.rows * squared * positions)
        else:
            down = groups * squared * self.rows * into * positions
        return 2.0 * (down + self.rows * squared * out)

    def _uses_cores(self, view: KernelView, f: ViewFactors) -> bool:
        """Return whether the steps of the CP form cost less than those of the equal flat update."""
        return f.t1 is not None and self._flops(view, f, True) < self._flops(view, f, False)


_SPACE = "tuvwxyz"


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The update of one adapter as two linear steps, x to h and h to y.

    x is `[n, *space, stacked·groups·in]`, h `[n·groups, *space, stacked·r²]`, y
    `[n, *space, stacked·groups·out]`. The factors are as in `ViewFactors`, with one stack axis and
    separate input axes: w*_a `[stacked, groups·out, r]`; w*_b `[stacked, r, in, *spatial]` or, with
    cores, `[stacked, r, in]` and t* `[stacked, r, r, *spatial]`. Hashable, so that equal layers
    share traces.

    Attributes:
        stacked: modules stacked in the kernel's out axis.
        groups: of each module.
        window: strides, padding and dilations of the convolution, as items.
        dtype: of all steps.
        precision: of all steps.
    """

    stacked: int
    groups: int
    window: tuple[tuple[str, Any], ...]
    dtype: Any
    precision: Any

    def down(self, x: jax.Array, f: ViewFactors) -> jax.Array:
        """Return h for x."""
        x, f = x.astype(self.dtype), f.astype(self.dtype)
        n, *space, features = x.shape
        letters, per_group = _SPACE[: len(space)], features // (self.stacked * self.groups)
        if self.groups > 1:  # groups become images: [n·groups, *space, stacked·in]
            x = x.reshape(n, *space, self.stacked, self.groups, per_group)
            x = jnp.moveaxis(x, -2, 1).reshape(n * self.groups, *space, self.stacked * per_group)
        if f.t1 is None:
            kernel = _khatri_rao(f.w1_b, f.w2_b)  # [stacked, r², in, *spatial]
        else:
            kb = khatri_rao_columns(f.w1_b, f.w2_b)  # [stacked, r², in]
            x = x.reshape(*x.shape[:-1], self.stacked, per_group)
            x = contract(x, f"n{letters}sc", kb, "sRc", f"n{letters}sR", self.precision)
            x = x.reshape(*x.shape[:-2], self.stacked * f.r**2)
            # the Kronecker product of the cores: [stacked, r, r, r, r, *spatial]
            core = f.t1[:, :, None, :, None] * f.t2[:, None, :, None, :]
            kernel = core.reshape(self.stacked, f.r**2, f.r**2, *core.shape[5:])
        kernel = kernel.reshape(-1, *kernel.shape[2:])  # [stacked·r², from, *spatial]
        axes = len(space)
        kernel = jnp.transpose(kernel, [*range(2, 2 + axes), 1, 0])  # [*spatial, from, stacked·r²]
        numbers = lax.ConvDimensionNumbers(
            (0, axes + 1, *range(1, axes + 1)),
            (axes + 1, axes, *range(axes)),
            (0, axes + 1, *range(1, axes + 1)),
        )
        return lax.conv_general_dilated(
            x,
            kernel,
            **dict(self.window),
            dimension_numbers=numbers,
            feature_group_count=self.stacked,
            precision=self.precision,
        )

    def up(self, h: jax.Array, f: ViewFactors) -> jax.Array:
        """Return y for h."""
        f = f.astype(self.dtype)
        a1, a2 = (jnp.swapaxes(a, -1, -2) for a in (f.w1_a, f.w2_a))
        ka = khatri_rao_columns(a1, a2) * f.scaling.reshape(-1, 1, 1)  # [stacked, r², groups·out]
        ka = ka.reshape(*ka.shape[:2], self.groups, -1)
        letters = _SPACE[: h.ndim - 2]
        h = h.reshape(h.shape[0] // self.groups, self.groups, *h.shape[1:-1], self.stacked, f.r**2)
        y = contract(h, f"ng{letters}sR", ka, "sRgo", f"n{letters}sgo", self.precision)
        return y.reshape(*y.shape[:-3], math.prod(y.shape[-3:]))

    def pull_back(
        self, x: jax.Array, f: ViewFactors, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, ViewFactors]:
        """Return the cotangents of x and the factors."""
        dh, df_up = jax.vjp(self.up, h, f)[1](g)
        dx, df_down = jax.vjp(self.down, x, f)[1](dh)
        return dx, jax.tree.map(jnp.add, df_up, df_down)


_down = jax.jit(_Steps.down, static_argnums=0)
_up = jax.jit(_Steps.up, static_argnums=0)
_pull_back = jax.jit(_Steps.pull_back, static_argnums=0)


def _khatri_rao(w1: jax.Array, w2: jax.Array) -> jax.Array:
    """Return the Khatri-Rao product of `[s, r, *rest]` and `[s, r, *rest]`: `[s, r², *rest]`."""
    product = w1[:, :, None] * w2[:, None, :]
    return product.reshape(product.shape[0], -1, *product.shape[3:])
