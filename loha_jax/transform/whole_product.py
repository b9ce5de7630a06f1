"""`WholeProduct`: a product with an adapted kernel whose update has x·W too.

Its subclasses compute both together. `of_product` answers whether one can; where it cannot, the
product is factored and x·W is computed apart.
"""

# JAX's own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import DTypeLike

from loha_jax.runtime.sizes import is_known
from loha_jax.transform.decomposed_base import has_gain
from loha_jax.transform.factored_product import FactoredProduct
from loha_jax.transform.kernel_view import KernelView
from loha_jax.transform.operation import CostModel, NoRule
from loha_jax.transform.options import Options
from loha_jax.transform.packed_kernel import PackedKernel
from loha_jax.transform.product import Product
from loha_jax.transform.view_factors import ViewFactors


@dataclasses.dataclass(frozen=True)
class WholeProduct(Product, abc.ABC):
    """A `Product` whose `update` is x·W + x·ΔW, and whose `pull_back` has both for x.

    Attributes:
        platforms: JAX' names of those that it is written for.
        dtypes: of the arrays that it takes; all of a product have the same.
    """

    includes_base: ClassVar[bool] = True
    platforms: ClassVar[tuple[str, ...]] = ("tpu",)
    dtypes: ClassVar[tuple[DTypeLike, ...]]

    @classmethod
    def of_product(
        cls, operation: CostModel, x: jax.Array, view: KernelView, options: Options
    ) -> Self | NoRule:
        """Return the product as one that is computed together, or why it cannot be."""
        if not isinstance(operation, Product):
            return NoRule("it is no matrix product")
        if options.forward_mode or options.update_alone:
            return NoRule("forward_mode" if options.forward_mode else "the base is computed apart")
        product = cls(**{f.name: getattr(operation, f.name) for f in dataclasses.fields(operation)})
        reason = (
            product._of_platform(options)
            or product._of_axes(x, view)
            or product._of_arrays(x, view)
            or product._of_form(x, view)
        )
        return NoRule(reason) if reason else product

    def _of_platform(self, options: Options) -> str:
        """Return why the form does not run here, or nothing."""
        if jax.default_backend() not in self.platforms:
            return f"it is written for {' and '.join(p.upper() + 's' for p in self.platforms)}"
        kinds = jax.sharding.get_abstract_mesh().axis_types
        in_shard_map = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)
        alone = jax.device_count() == 1 or in_shard_map
        return "" if alone else "several devices, and no shard_map"

    def _of_axes(self, x: jax.Array, view: KernelView) -> str:
        """Return why the axes do not suit the form, or nothing."""
        (contracted, batch), (x_contracted, x_batch) = self.kernel_dims, self.x_dims
        leading, ndim = tuple(range(len(batch))), len(view.shape)
        free = [axis for axis in range(ndim) if axis not in (*batch, *contracted)]
        if self.contracted or self.free or len(contracted) != 1 or len(free) != 1:
            return "the kernel has other axes than a stack, in and out"
        if tuple(batch) != leading or tuple(x_batch) != leading or x_contracted != (x.ndim - 1,):
            return "its axes are in another order than stack, rows, features"
        stack = tuple(n for axis in batch for n in view.dims[axis])
        own = (stack, view.dims[contracted[0]], view.dims[free[0]])
        if own != (self.batch, self.main, self.rest) or not (self.main and self.rest):
            return "the kernel's axes are not the factors': broadcast, permuted, or of size 1"
        return ""

    def _of_arrays(self, x: jax.Array, view: KernelView) -> str:
        """Return why the arrays do not suit the form, or nothing."""
        params, steps = dict(self.params), self._steps(x, view)
        if isinstance(view.kernel, PackedKernel):
            return "the kernel is quantised"
        if has_gain(view):
            return "a weight decomposition"
        dtypes = {x.dtype, view.kernel.dtype, steps.dtype}
        dtypes.add(jnp.dtype(params.get("preferred_element_type") or x.dtype))
        if len(dtypes) > 1 or x.dtype not in self.dtypes:
            names = " or all ".join(jnp.dtype(dtype).name for dtype in self.dtypes)
            return f"input, kernel, update and result are not all {names}"
        if not all(map(is_known, x.shape)):
            return "a size is not known"
        if self.rows < min(f.r for f in view.factors):
            return "fewer rows than ranks"
        return ""

    def _of_form(self, x: jax.Array, view: KernelView) -> str:
        """Return what else stands against the form, or nothing."""
        return ""

    def _stored_as_into_out(self, view: KernelView) -> bool:
        """Return whether the stored kernel's contracted axis is before the free one."""
        return view.atoms[self.main[0]].axis < view.atoms[self.rest[0]].axis

    def _weight(self, view: KernelView) -> jax.Array:
        """Return W as it is stored, `[stack, ., .]`.

        What transposed it in the model is transposed back, and XLA drops both.
        """
        kernel = view.kernel
        assert isinstance(kernel, jax.Array)
        ((axis,), batch) = self.kernel_dims
        if (axis == len(batch)) != self._stored_as_into_out(view):
            kernel = jnp.swapaxes(kernel, -1, -2)
        return kernel.reshape(-1, *kernel.shape[-2:])

    @abc.abstractmethod
    def _run(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView
    ) -> tuple[jax.Array, jax.Array]: ...

    @abc.abstractmethod
    def _run_back(
        self, steps: FactoredProduct, x: jax.Array, view: KernelView, h: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, tuple[ViewFactors, ...]]: ...
