"""A Linen model's parameters as a tree with adapted leaves, for files and `merge`, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import qwix
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.qwix._qwix_internals import is_quantised, unboxed
from loha_jax.qwix.rules import check_stack
from loha_jax.qwix.storage import ADAPTER
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.tree.factors import Factors
from loha_jax.tree.leaves import LoHaWeight, is_adapted
from loha_jax.tree.quantised import QuantisedArray, wrapped
from loha_jax.tree.stack_axes import StackPlaces, with_stack_in_front
from loha_jax.tree.unbox import is_box

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
    flat = _flat(unboxed(params))
    adapted, tree = _adapted(provider, flat), {}
    for path, value in flat.items():
        kernel = qwix.dequantize(value.array) if is_quantised(value) else value
        if path in adapted:
            tree[path] = dataclasses.replace(adapted[path][0], kernel=kernel)
        elif not any(path[-1].endswith(f"_lora_{name}") for name in FACTOR_NAMES):
            tree[path] = kernel
    return unflatten_dict(tree)


def linen_params(provider: LoHaProvider, params: PyTree, tree: PyTree) -> PyTree:
    """Return parameters of a Linen model with the factors of a tree, such as a file was read into.

    The inverse of `linen_tree`: all but the factors stays as it is, quantised or in boxes.

    Args:
        provider: that the model was adapted with, and has run with.
        params: the parameters (without the collection), with the factors beside the kernels.
        tree: of the float model, with one active adapter on the same kernels as the parameters.

    Returns:
        A dict like `params`; the factors in the dtypes that they have there.

    Raises:
        ValueError: the tree has an adapter on other kernels, or of another rank or alpha than the
            provider's rules; or more than factors.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, qwix
        >>> from loha_jax.qwix import LoHaProvider
        >>> provider = LoHaProvider(rank=2, alpha=4.0)
        >>> model = qwix.apply_lora_to_model(nn.Dense(6), provider)
        >>> params = model.init(jax.random.key(0), jnp.ones((2, 8)))["params"]
        >>> tree = linen_tree(provider, params)  # then load_peft(folder, tree, adapter_name="new")
        >>> linen_params(provider, params, tree)["kernel_lora_hada_w1_a"].shape
        (6, 2)
    """
    result, values, given = _flat(params), _flat(unboxed(params)), _flat(unboxed(tree))
    adapted = _adapted(provider, values)
    more = {path for path, leaf in given.items() if is_adapted(leaf)} - adapted.keys()
    if more:
        raise ValueError(
            f"The tree has an adapter on {_listed(more)}, which the provider has not adapted. Give "
            "it a rule for them."
        )
    for path, (leaf, places) in adapted.items():
        new = _given_factors(path, leaf, given.get(path))
        for name, old in _factors_beside(values, path).items():
            place = (*path[:-1], f"{path[-1]}_lora_{name}")
            array = places.from_front(jnp.asarray(new.arrays[name], old.dtype))
            box = result[place]
            result[place] = box.replace_boxed(array) if is_box(box) else array
    return unflatten_dict(result)


def _adapted(
    provider: LoHaProvider, flat: dict[tuple[str, ...], Any]
) -> dict[tuple[str, ...], tuple[LoHaWeight, StackPlaces]]:
    """Return the adapted kernels as they are, packed ones too, and where their stack axes are."""
    found = {}
    for path, value in flat.items():
        factors = _factors_beside(flat, path)
        if factors and path not in provider.targets:
            raise ValueError(
                f"{'/'.join(path)} has an adapter that this provider has not seen: run the model "
                "with it once (`jax.eval_shape(model.init, key, *inputs)` does)."
            )
        if factors:
            found[path] = _leaf(provider, path, wrapped(value), factors)
    if not found:
        raise ValueError(
            "The parameters have no factors of the provider: take those of the adapted model, "
            "qwix.apply_lora_to_model(model, provider).init(key, *inputs)['params']."
        )
    return found


def _given_factors(path: tuple[str, ...], parameters: LoHaWeight, leaf: object) -> Factors:
    """Return the active adapter of a tree's leaf, which fits the parameters' own."""
    own = parameters.adapters[ADAPTER]
    active = leaf.active_adapters if isinstance(leaf, LoHaWeight) else ()
    if not isinstance(leaf, LoHaWeight) or len(active) != 1:
        raise ValueError(
            f"{_listed([path])} has an adapter in the parameters and {len(active) or 'no'} active "
            "ones in the tree: exactly one is needed there. See loha_jax.set_adapter."
        )
    (new,) = active
    kernels = [(x.layout.word, tuple(x.kernel.shape)) for x in (leaf, parameters)]
    if kernels[0] != kernels[1]:
        raise ValueError(
            f"{_listed([path])} has the layout {kernels[0][0]!r} and the shape {kernels[0][1]} in "
            f"the tree, and {kernels[1][0]!r} and {kernels[1][1]} in the parameters. Read the file "
            "into the tree of the parameters: interop.load_peft(folder, linen_tree(provider, "
            'params), adapter_name="other").'
        )
    if own.description != new.description:
        raise ValueError(
            f"The tree's adapter of {_listed([path])} has {new.description}, and the provider made "
            f"{own.description}. Make the provider with the rank and alpha of the tree: "
            "LoHaProvider(config=LoHaConfig.from_pretrained(folder)) takes them from a file."
        )
    return new


def _flat(tree: PyTree) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping) or set(tree) == {"params"}:
        kind = "the collections" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise ValueError(
            f"Expected the parameters of a Linen model, a dict of modules, and got {kind}: give "
            "variables['params']."
        )
    plain = unfreeze(cast(dict[str, Any], tree))
    return flatten_dict(plain, is_leaf=lambda _, x: not isinstance(x, dict))


def _factors_beside(
    flat: dict[tuple[str, ...], Any], path: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Return the factors beside a kernel, by PEFT's names; empty where there are none."""
    places = {name: (*path[:-1], f"{path[-1]}_lora_{name}") for name in FACTOR_NAMES}
    return {name: flat[place] for name, place in places.items() if place in flat}


def _listed(paths: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(sorted("/".join(path) for path in paths))


def _leaf(
    provider: LoHaProvider,
    path: tuple[str, ...],
    kernel: jax.Array | QuantisedArray,
    factors: dict[str, jax.Array],
) -> tuple[LoHaWeight, StackPlaces]:
    """Return an adapted kernel, and where its stack axes are; those of a scan are among them."""
    target, config = provider.targets[path]
    adapters = {ADAPTER: target.factors(factors, config)}
    leaf = LoHaWeight(kernel, adapters, target.layout, target.names, (ADAPTER,), target.rows)
    leaf, places = with_stack_in_front(leaf)
    names = stack_names(module_name(path), leaf.layout.sizes("s", kernel.shape), provider.names)
    leaf = dataclasses.replace(leaf, names=names)
    if provider.config is not None:
        check_stack(config, leaf)
    return leaf, places
