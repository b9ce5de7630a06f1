"""The part that the Linen layers share: their attributes, their parameters, their call.

`adapted_call` first runs the plain Flax layer abstractly, to learn which parameters it has. It then
declares these and the factors, and applies the plain layer to the adapted weight through `adapt`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from loha_jax.linen.described import Described, describing
from loha_jax.linen.initial_factors import boxed_factor, initial_factor
from loha_jax.linen.layer_adapter import loha_weight, product
from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.lowrank.layout import Layout
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.field_checks import refuse_unknown_kernel
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.transform.adapt import adapt
from loha_jax.tree.dropout import dropout
from loha_jax.tree.plan import Target, make_target

LayoutOf = Callable[[Sequence[int]], Layout]
"""The layout of a kernel, given its shape."""


class LoHaLayer(nn.Module):
    """The attributes that the layers add to those of the Flax layers.

    Attributes:
        r: the rank of each of the two factor pairs.
        alpha: the update is scaled by alpha/r. None is `LoHaConfig`'s 8; with `fedpara` no scaling.
        rank_dropout, module_dropout: as in `LoHaConfig`, in each call that is not deterministic.
            Every call draws a new mask, one for the whole batch.
        init_weights: as in `LoHaConfig`: True, False, "lycoris" or "calibrated".
        strategy: as for `loha_jax.adapt`: "auto", "factored", "fused", "dense" or "pallas".
        forward_mode: plain products that `jax.jvp` can differentiate.
        deterministic: whether dropout is off; here or as an argument of the call, as for
            `nn.Dropout`. Required with a dropout.
        rng_collection: the rng that dropout draws from.
        fedpara: no kernel; the weight is (w1_a @ w1_b) ⊙ (w2_a @ w2_b), or its form with cores,
            trained as a whole.
        variance_scale: with `fedpara`, the weight's initial variance is `variance_scale / fan_in`,
            where fan_in counts the input and spatial axes: 1 is LeCun's (Flax's default), 2 He's.
    """

    r: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool | str = True
    strategy: str = "auto"
    forward_mode: bool = False
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    fedpara: bool = False
    variance_scale: float = 1.0


def adapted_call(
    layer: Any, base: type[nn.Module], args: tuple, layout_of: LayoutOf, deterministic: bool | None
) -> jax.Array:
    """Return the result of the Flax layer `base` for the adapted kernel of `layer`."""
    weight, others = declare(layer, base, "kernel", args, layout_of)
    return compute(layer, base, "kernel", weight, others, args, deterministic)


def declare(
    layer: Any, base: type[nn.Module], kernel_name: str, args: tuple, layout_of: LayoutOf
) -> tuple[Any, dict[str, Any]]:
    """Declare the Flax layer's parameters, then the factors.

    Returns:
        The adapted weight, and the other parameters.
    """
    declared: dict[str, tuple[Callable[..., Any], Any]] = {}

    def record(name: str, init: Callable[..., Any], box: Any) -> None:
        declared[name] = (init, box)

    recording = _declaring(base)(**_fields(layer, base), record=record)
    jax.eval_shape(lambda: recording.apply({}, *args))
    box = declared[kernel_name][1]
    (kernel,) = jax.tree.leaves(box)
    target, config = _target(layer, kernel_name, kernel, layout_of(kernel.shape))
    if layer.fedpara:
        del declared[kernel_name]
    others = {name: layer.param(name, init) for name, (init, _) in declared.items()}
    boxed = functools.partial(boxed_factor, box, target)
    factors, draws = {}, dict(layer.scope.rng_counters)
    for name, shape in target.shapes(config.r).items():

        def init(key, name=name, shape=shape):
            factor = boxed(name, initial_factor(layer, target, config, name, shape, key))
            if describing.value and name == FACTOR_NAMES[0]:
                return Described(meta.unbox(factor), kernel_name, target, config, layer.fedpara, ())
            return factor

        factors[name] = layer.param(name, init)
    # What Flax draws next must not depend on the factors: in a lifted transform, or a shared
    # scope, the count of draws would go on.
    layer.scope.rng_counters.update(draws)
    if layer.fedpara:
        return product(target, config, factors, layer.forward_mode), others
    return loha_weight(target, config, others.pop(kernel_name), factors, "default"), others


def compute(
    layer: Any,
    base: type[nn.Module],
    kernel_name: str,
    weight: Any,
    others: dict[str, Any],
    args: tuple,
    deterministic: bool | None,
    method: str | None = None,
) -> jax.Array:
    """Return the Flax layer's result with the adapted weight, after dropout."""
    if layer.rank_dropout or layer.module_dropout:
        deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
        if not deterministic:
            weight = dropout(weight, layer.make_rng(layer.rng_collection))
    plain = base(**_fields(layer, base))

    def run(weight, others, args) -> Any:
        return plain.apply({"params": {**others, kernel_name: weight}}, *args, method=method)

    return adapt(run, strategy=layer.strategy, forward_mode=layer.forward_mode)(
        weight, others, args
    )


class _Declarations(nn.Module):
    """A Flax layer with this mixed in tells `record` its parameters, and creates none."""

    record: Callable[..., None] | None = None

    @nn.nowrap
    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args, unbox: bool = True, **init_kwargs
    ) -> Any:
        init = functools.partial(_init, init_fn, init_args, init_kwargs)
        box = jax.eval_shape(init, jax.random.key(0))
        assert self.record is not None
        self.record(name, init, box)
        (array,) = jax.tree.leaves(box)
        return jnp.zeros(array.shape, array.dtype)


def _init(init_fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], key: jax.Array) -> Any:
    return init_fn(key, *args, **kwargs)


@functools.cache
def _declaring(base: type[nn.Module]) -> Any:
    return type(base.__name__, (_Declarations, base), {"__module__": __name__})


def _fields(layer: nn.Module, base: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments of the plain Flax layer."""
    names = (f.name for f in dataclasses.fields(base) if f.init)
    return {
        "parent": None,
        **{name: getattr(layer, name) for name in names if name not in ("parent", "name")},
    }


_NOT_FOR_FEDPARA = ("rank_dropout", "module_dropout", "init_weights", "strategy")


def _target(layer: Any, kernel_name: str, kernel: Any, layout: Layout) -> tuple[Target, LoHaConfig]:
    """Return what the layer adapts and its settings as a config; ValueError if they are invalid."""
    if len(kernel.shape) != layout.ndim:
        raise ValueError(
            f"{where(layer)}: layout={layout.word!r} is for {layout.ndim} axes, the kernel has "
            f"{kernel.shape}"
        )
    alpha = layer.alpha
    if layer.fedpara:
        alpha = layer.r if alpha is None else alpha
        wrong = [
            name for name in _NOT_FOR_FEDPARA if getattr(layer, name) != getattr(LoHaLayer, name)
        ]
        wrong += ["alpha"] * (alpha == 0) + ["variance_scale"] * (not layer.variance_scale > 0)
        if wrong:
            raise ValueError(
                f"{where(layer)}: with fedpara=True there is no kernel, and the weight is the "
                "product of the factors. Got "
                f"{', '.join(f'{name}={getattr(layer, name)!r}' for name in wrong)}: leave out "
                f"{', '.join(_NOT_FOR_FEDPARA)}; alpha is not 0, and variance_scale positive."
            )
    try:
        config = LoHaConfig(
            r=layer.r,
            alpha=LoHaConfig.alpha if alpha is None else alpha,
            rank_dropout=layer.rank_dropout,
            module_dropout=layer.module_dropout,
            use_effective_conv2d=getattr(layer, "use_effective_conv2d", False),
            init_weights=layer.init_weights,
        )
    except ValueError as error:
        raise ValueError(f"{where(layer)}: {error}") from None
    instead = "`loha_jax.inject` on the parameters that hold the pretrained weights"
    refuse_unknown_kernel(config.init_weights, where(layer), instead)
    path = (*layer.path, kernel_name)
    names = stack_names(module_name(path), layout.sizes("s", kernel.shape), None)
    return make_target(config, path, names, layout, kernel), config


def where(layer: nn.Module) -> str:
    """Return the place of a layer in its model, for errors."""
    return f"{type(layer).__name__} at {'/'.join(layer.path) or 'the root'}"
