"""Where an adapter's arrays are: beside the kernel, in an NNX module or in Linen's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import jax
from flax import linen as nn
from flax import nnx

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.nnx.siblings import AdaptedVariable, Settings, Siblings, prefix
from loha_jax.qwix._qwix_internals import is_quantised, unboxed
from loha_jax.targets.config import LoHaConfig
from loha_jax.tree.dropout import dropout
from loha_jax.tree.inject import initial_factors
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.placement import follow_kernel, named_axes
from loha_jax.tree.plan import Target
from loha_jax.tree.quantised import wrapped
from loha_jax.tree.unbox import is_box

if TYPE_CHECKING:
    from loha_jax.qwix._qwix_internals import WithAux

ADAPTER = "default"
"""The name of the adapter that a provider makes."""


def parameters(module: nn.Module | nnx.Module) -> Iterator[tuple[str, jax.Array | WithAux]]:
    """Yield the parameters of a module itself, by name, without those of its adapters."""
    if isinstance(module, nnx.Module):
        adapters = tuple(f"{name}_" for name, x in vars(module).items() if isinstance(x, Settings))
        found = {
            name: x
            for name, x in vars(module).items()
            if is_quantised(x) or (isinstance(x, nnx.Param) and not isinstance(x, nnx.LoRAParam))
        }
    else:
        assert module.scope is not None
        found = dict(module.scope.variables().get("params", {}))
        adapters = tuple(f"{name}_lora_" for name in found)
    for name, x in found.items():
        value = unboxed(x)
        if not (adapters and name.startswith(adapters)) and hasattr(value, "ndim"):
            yield name, cast("jax.Array | WithAux", value)


@dataclasses.dataclass(frozen=True)
class NnxStorage:
    """The adapter of a parameter of an NNX module, in the form that `loha_jax.nnx` reads."""

    module: nnx.Module
    name: str

    def leaf(self) -> LoHaWeight | None:
        """Return the adapted kernel, with dropout's masks in training; None without adapter."""
        settings = vars(self.module).get(prefix((self.name,)))
        if not isinstance(settings, Settings) or not settings.intercepted:
            return None
        leaf = AdaptedVariable(self.module, settings).leaf_for_call()
        assert isinstance(leaf, LoHaWeight)
        return leaf

    @property
    def can_create(self) -> bool:
        """True while qwix runs the model for the first time, with random numbers."""
        return isinstance(getattr(self.module, "qwix_rngs", None), nnx.Rngs)

    def create(
        self,
        target: Target,
        config: LoHaConfig,
        kernel: jax.Array | WithAux,
        names: tuple[str, ...],
    ) -> None:
        """Put a new adapter beside the kernel.

        Its module names are empty where they follow from its place in the model, which is known
        when the whole model is read.
        """
        key = cast(Any, self.module).qwix_rngs.params()
        arrays = initial_factors(target, wrapped(kernel), key, config)
        leaf = dataclasses.replace(_leaf(target, config, arrays, kernel), names=names)
        base = vars(self.module)[self.name]
        Siblings.of(leaf, base, intercepted=True).put(self.module, (self.name,))


@dataclasses.dataclass(frozen=True)
class LinenStorage:
    """The adapter of a parameter of a Linen module: parameters beside it in its scope."""

    module: nn.Module
    name: str

    def leaf(self, target: Target, config: LoHaConfig, kernel: jax.Array | WithAux) -> LoHaWeight:
        """Return the adapted kernel, whose factors are created if the model is initialised."""
        scope = self.module.scope
        assert scope is not None
        box = self._box()

        def initial(name: str) -> Callable[[jax.Array], object]:
            def draw(key: jax.Array) -> object:
                factors = initial_factors(target, wrapped(kernel), key, config)
                leaf = _leaf(target, config, factors, kernel)
                array = leaf.adapters[ADAPTER].arrays[name]
                return array if box is None else _boxed(array, name, box, leaf)

            return draw

        names = FACTOR_NAMES if target.cp else FACTOR_NAMES[:4]
        arrays = {
            n: cast(jax.Array, scope.param(f"{self.name}_lora_{n}", initial(n))) for n in names
        }
        leaf = _leaf(target, config, arrays, kernel, placed=True)
        drops = config.rank_dropout or config.module_dropout
        if drops and self.module.has_rng("dropout"):
            return dropout(leaf, self.module.make_rng("dropout"))
        return leaf

    def _box(self) -> nn.meta.AxisMetadata | None:
        """Return the box of the kernel, or of the integers of a quantised one."""
        first = jax.tree.leaves(self.module.get_variable("params", self.name), is_leaf=is_box)[0]
        return first if is_box(first) else None


def _boxed(
    array: jax.Array, name: str, box: nn.meta.AxisMetadata, leaf: LoHaWeight
) -> nn.meta.AxisMetadata:
    """Return a factor in a box like the kernel's, with the names of its own axes."""
    boxed = box.replace_boxed(array)
    own = named_axes(getattr(box, "names", None), leaf, leaf.adapters[ADAPTER])
    return dataclasses.replace(boxed, names=own[name]) if own else boxed  # type: ignore[type-var]


def _leaf(
    target: Target,
    config: LoHaConfig,
    arrays: dict[str, jax.Array],
    kernel: jax.Array | WithAux,
    *,
    placed: bool = False,
) -> LoHaWeight:
    """Return the adapted kernel, without module names."""
    factors = target.factors(arrays, config)
    if not placed:
        array = kernel.array.qvalue if is_quantised(kernel) else kernel
        factors = follow_kernel(factors, array, target.layout)
    names, active = ("",) * len(target.names), (ADAPTER,)
    adapters = {ADAPTER: factors}
    return LoHaWeight(wrapped(kernel), adapters, target.layout, names, active, target.rows)
