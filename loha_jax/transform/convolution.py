"""Convolutions with an adapted kernel: factored (no ΔW), and what it costs.

A flat update is a convolution to r² channels followed by a 1x1 one. With cores (CP form) it is a
1x1 convolution to r² channels, a small spatial one from r² to r² channels, whose kernel is the
Kronecker product of the two cores, and a 1x1 one. Groups of a convolution share the factors' input
features and divide the output features. Modules stacked in the out axis (a vmapped convolution)
have factors of their own.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from loha_jax.runtime.sizes import nominal
from loha_jax.transform.compute_dtype import ComputeDtype, dtype_of_update
from loha_jax.transform.decomposed_base import BaseScaling
from loha_jax.transform.factored_convolution import FactoredConvolution, down, pull_back, up
from loha_jax.transform.kernel_view import KernelView, size_of
from loha_jax.transform.operation import Intermediates, NoRule, Operation, Params
from loha_jax.transform.typed_jax import vjp
from loha_jax.transform.view_factors import ViewFactors


@dataclasses.dataclass(frozen=True)
class Convolution(Operation):
    """A `conv_general_dilated` of a plain array with a `KernelView`, its axes sorted by meaning.

    Attributes:
        numbers: the axes of x, the kernel and the result.
        params: of the `conv_general_dilated`, as items, without the dimension numbers.
        rows: positions of the result, over the whole batch; symbolic sizes count as 1.
        x_rows: the same of x.
        stacked: modules stacked in the kernel's out axis.
        groups: of each module.
        computed_in: the rule for the update's dtype.
    """

    primitive: ClassVar[str] = "conv_general_dilated"
    branches: ClassVar[bool] = False  # a training step of a small net took 40 times as long

    numbers: lax.ConvDimensionNumbers
    params: Params
    rows: int
    x_rows: int
    stacked: int
    groups: int
    computed_in: ComputeDtype

    @classmethod
    def of(
        cls,
        view: KernelView,
        x: jax.Array,
        result_shape: Sequence[int],
        params: Mapping[str, Any],
        computed_in: ComputeDtype,
    ) -> Convolution | NoRule:
        """Return the convolution with its axes sorted, or why it has no factored form."""
        numbers: lax.ConvDimensionNumbers = params["dimension_numbers"]
        out, in_, *spatial = (view.dims[axis] for axis in numbers.rhs_spec)

        def kinds(atoms: Iterable[int]) -> set[str]:
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
            numbers=numbers,
            params=tuple(
                (name, value)
                for name, value in params.items()
                if name not in ("dimension_numbers", "lhs_shape", "rhs_shape")
            ),
            rows=nominal(result_shape[axis] for axis in (batch, *space)),
            x_rows=nominal(x.shape[axis] for axis in (numbers.lhs_spec[0], *numbers.lhs_spec[2:])),
            stacked=stacked,
            groups=groups // stacked,
            computed_in=computed_in,
        )

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """See `Operation.apply`."""
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=self.numbers, **dict(self.params)
        )

    def place_gain(self, x: jax.Array, gain: jax.Array) -> BaseScaling | None:
        """See `Operation.place_gain`."""
        numbers = self.numbers
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

    def update(self, x: jax.Array, view: KernelView) -> tuple[jax.Array, Intermediates]:
        """See `Operation.update`: the sum over the adapters, and the h of each."""
        total, hs = jnp.zeros((), x.dtype), list[jax.Array]()
        for f in view.factors:
            steps = self._steps(x, view, f)
            f = self._in_axis_order(view, f)
            hs.append(down(steps, _channels_last(x, self.numbers.lhs_spec), f))
            total = total + self._from_channels_last(up(steps, hs[-1], f))
        return total, tuple(hs)

    def pull_back(
        self, x: jax.Array, view: KernelView, h: Intermediates, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]:
        """See `Operation.pull_back`."""

        def in_axis_order(f: ViewFactors) -> ViewFactors:
            return self._in_axis_order(view, f)

        def last(x: jax.Array) -> jax.Array:
            return _channels_last(x, self.numbers.lhs_spec)

        dx, dfactors = jnp.zeros((), x.dtype), list[ViewFactors]()
        for f, h_f in zip(view.factors, h, strict=True):
            steps = self._steps(x, view, f)
            g_last = _channels_last(g, self.numbers.out_spec).astype(steps.dtype)
            ordered, from_ordered = vjp(in_axis_order, f)
            x_last, from_last = vjp(last, x.astype(steps.dtype))
            dx_f, df = pull_back(steps, x_last, ordered, h_f, g_last)
            dx = dx + from_last(dx_f)[0]
            dfactors.append(from_ordered(df)[0])
        return dx, tuple(dfactors)

    def _steps(self, x: jax.Array, view: KernelView, f: ViewFactors) -> FactoredConvolution:
        """Return the two steps of one adapter, for an x and a kernel of these dtypes."""
        params = dict(self.params)
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        return FactoredConvolution(
            self.stacked,
            self.groups,
            tuple((name, params[name]) for name in names),
            dtype_of_update(self.computed_in, x.dtype, view.kernel, f.w1_a.dtype),
            params["precision"],
        )

    def _from_channels_last(self, y: jax.Array) -> jax.Array:
        batch, feature, *space = self.numbers.out_spec
        order = (batch, *space, feature)
        return jnp.transpose(y, sorted(range(y.ndim), key=order.__getitem__))

    def _in_axis_order(self, view: KernelView, f: ViewFactors) -> ViewFactors:
        """Return the factors as `FactoredConvolution` takes them.

        Positions are in the order of the view's axes; cores are used only where they save FLOPs.
        """
        if not self._uses_cores(view, f):
            f = f.flat()
        out, in_, *spatial = (view.dims[axis] for axis in self.numbers.rhs_spec)
        stack = [n for n in out if view.atoms[n].kind == "s"]
        leading = len(view.of_kind("s"))

        def large(atoms: Sequence[int]) -> list[int]:
            return [n for n in atoms if view.atoms[n].size > 1]

        def arrange(
            w: jax.Array, *axes: tuple[Sequence[int], Sequence[Sequence[int]]] | None
        ) -> jax.Array:
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

    def factored_flops(self, view: KernelView) -> float:
        """See `Operation.factored_flops`."""
        into, out, positions = self.sizes(view)
        steps = sum(self._flops(view, f, self._uses_cores(view, f)) for f in view.factors)
        return steps + sum(2 * f.r**2 * (into * positions + out) for f in view.factors)

    def factored_elements(self, view: KernelView) -> int:
        """See `Operation.factored_elements`."""
        into, out, positions = self.sizes(view)
        rows = self.rows * self.stacked * self.groups
        return max(f.r**2 * max(into * positions, out, rows) for f in view.factors)

    def sizes(self, view: KernelView) -> tuple[int, int, int]:
        """Return the in features (per group), out features and positions of the whole kernel."""
        out, in_, *spatial = self.numbers.rhs_spec
        return view.shape[in_], view.shape[out], math.prod(view.shape[axis] for axis in spatial)

    def _flops(self, view: KernelView, f: ViewFactors, cores: bool) -> float:
        """Return the FLOPs of the factored update's forward pass."""
        into, out, positions = self.sizes(view)
        squared, groups = f.r**2, self.stacked * self.groups
        if cores:
            down = groups * squared * (self.x_rows * into + self.rows * squared * positions)
        else:
            down = groups * squared * self.rows * into * positions
        return 2.0 * (down + self.rows * squared * out)

    def _uses_cores(self, view: KernelView, f: ViewFactors) -> bool:
        """Return whether the steps of the CP form cost less than those of the equal flat update."""
        return f.t1 is not None and self._flops(view, f, True) < self._flops(view, f, False)


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    """Return an array with its batch axis first and its feature axis last."""
    batch, feature, *space = spec
    return jnp.transpose(x, (batch, *space, feature))
