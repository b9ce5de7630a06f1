"""A Linen model's parameters as a tree with adapted leaves, for files, `summary` and `merge`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import jax
import qwix
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.qwix._qwix_internals import is_quantised, unboxed
from loha_jax.qwix.rules import check_stack
from loha_jax.qwix.storage import ADAPTER
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.stack_axes import with_stack_in_front

if TYPE_CHECKING:
    from loha_jax.qwix.provider import LoHaProvider


def linen_tree(provider: LoHaProvider, params: PyTree) -> PyTree:
    """Return parameters of a Linen model with a `LoHaWeight` in the place of each adapted kernel.

    A quantised kernel is dequantised, so the tree is one for the float model: `interop.save_peft`,
    `loha_jax.summary`, `loha_jax.merge` and `loha_jax.adapt` take it.

    Args:
        provider: that the model was adapted with, and has run with.
        params: the parameters (without the collection), with the factors beside the kernels.

    Raises:
        ValueError: the parameters have no factors, or factors that the provider did not make; or
            its config does not say the same of all modules of a stack.
    """
    plain = unfreeze(cast(dict[str, Any], unboxed(params)))
    flat: dict[tuple[str, ...], Any] = flatten_dict(
        plain, is_leaf=lambda _, x: not isinstance(x, dict)
    )
    tree = {}
    for path, value in flat.items():
        if is_quantised(value):
            value = qwix.dequantize(value.array)
        factors = {
            name: flat[*path[:-1], f"{path[-1]}_lora_{name}"]
            for name in FACTOR_NAMES
            if (*path[:-1], f"{path[-1]}_lora_{name}") in flat
        }
        if factors and path not in provider.targets:
            raise ValueError(
                f"{'/'.join(path)} has an adapter that this provider has not seen: run the model "
                "with it once (`jax.eval_shape(model.init, key, *inputs)` does)."
            )
        if factors:
            tree[path] = _leaf(provider, path, value, factors)
        elif not any(path[-1].endswith(f"_lora_{name}") for name in FACTOR_NAMES):
            tree[path] = value
    if not any(isinstance(leaf, LoHaWeight) for leaf in tree.values()):
        raise ValueError(
            "The parameters have no factors of the provider: take those of the adapted model, "
            "qwix.apply_lora_to_model(model, provider).init(key, *inputs)['params']."
        )
    return unflatten_dict(tree)


def _leaf(
    provider: LoHaProvider, path: tuple[str, ...], kernel: jax.Array, factors: dict[str, jax.Array]
) -> LoHaWeight:
    """Return an adapted kernel; axes that a scan has added are stack axes."""
    target, config = provider.targets[path]
    adapters = {ADAPTER: target.factors(factors, config)}
    leaf = LoHaWeight(kernel, adapters, target.layout, target.names, (ADAPTER,))
    leaf, _ = with_stack_in_front(leaf)
    names = stack_names(module_name(path), leaf.layout.sizes("s", kernel.shape), provider.names)
    leaf = dataclasses.replace(leaf, names=names)
    if provider.config is not None:
        check_stack(config, leaf)
    return leaf
