"""NNX models with the adapters merged into the base: as a float model, or quantised again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import jax
import qwix
from flax import nnx

import loha_jax.tree.merge as tree_merge
from loha_jax.nnx.siblings import adapted_in
from loha_jax.nnx.variables import values_of, variables_of
from loha_jax.qwix._qwix_internals import is_quantised, requantised
from loha_jax.targets.module_names import module_name

if TYPE_CHECKING:
    from loha_jax.qwix._qwix_internals import WithAux

M = TypeVar("M", bound=nnx.Module)


def merge(model: M) -> M:
    """Turn a model that qwix runs into a plain float one, with its adapters merged.

    All quantised kernels are dequantised, and qwix no longer intercepts the model's calls: it would
    quantise the merged kernels again. The model is changed and returned.

    Example:
        >>> import qwix
        >>> from loha_jax.qwix import LoHaProvider
        >>> x = jax.numpy.ones((2, 8))
        >>> provider = LoHaProvider(rank=2, alpha=4.0, weight_qtype="int8")
        >>> model = qwix.apply_lora_to_model(
        ...     nnx.Linear(8, 6, rngs=nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
        >>> merge(model).kernel.get_value().dtype
        dtype('float32')
    """
    for _, module, name, kernel in list(_quantised_in(model)):
        dense = qwix.dequantize(values_of(kernel).array)
        setattr(module, name, variables_of(kernel)[0].replace(dense))
    plain = getattr(type(model), "_unquantized_type", None)
    if plain is not None:
        model.__class__ = plain
    return tree_merge.merge(model)


def merge_requantised(model: M) -> tuple[M, dict[str, float]]:
    """Merge the adapters into quantised kernels, which are quantised again as they were.

    Each merged kernel is rounded. qwix runs the model as before. Adapters of float kernels are
    merged as `loha_jax.merge` does. The model is changed and returned.

    Returns:
        The model, and for each merged kernel the largest rounding error over the largest weight.
    """
    before = {path: kernel for path, _, _, kernel in _quantised_in(model, adapted=True)}
    plain = type(model)
    places = list(_quantised_in(model))
    merge(model)
    model.__class__ = plain
    errors: dict[str, float] = {}
    for path, module, name, kernel in places:
        if path not in before:
            setattr(module, name, kernel)
            continue
        dense = vars(module)[name].get_value()
        again = requantised(dense, values_of(kernel))
        rounding = abs(qwix.dequantize(again.array) - dense).max() / abs(dense).max()
        errors[module_name(path)] = float(rounding)
        for variable, value in zip(variables_of(kernel), jax.tree.leaves(again), strict=True):
            variable.set_value(value)
        setattr(module, name, kernel)
    return model, errors


def _quantised_in(
    model: nnx.Module, *, adapted: bool = False
) -> Iterator[tuple[tuple[str, ...], nnx.Module, str, WithAux]]:
    """Yield the path, the module, the name and the value of each quantised parameter."""
    for path, module in nnx.iter_modules(model):
        with_adapter = {of.settings.path for of in adapted_in(module)}
        for name, value in list(vars(module).items()):
            if is_quantised(value) and (not adapted or (name,) in with_adapter):
                yield (*map(str, path), name), module, name, value
