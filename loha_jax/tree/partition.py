"""`partition`, `combine` and `trainable_mask`: the trained and the frozen arrays of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from loha_jax.tree.containers import refuse_loose_factors, refuse_model
from loha_jax.tree.factors import UNTRAINED_NAMES
from loha_jax.tree.leaves import AdaptedLeaf, SavedWeight, is_adapted

T = TypeVar("T")


def partition(params: T) -> tuple[T, T]:
    """Split an adapted tree into its trained and its frozen arrays.

    The factors of the active adapters and the active copies of `modules_to_save` are trained. Both
    halves have the tree's structure, with None where the other one has the array, so that
    `jax.grad`, optax and donation see only the trained half.

    Args:
        params: a tree that `inject` or `interop.load_peft` made.

    Returns:
        `(trainable, frozen)`; `combine(trainable, frozen)` gives the tree back.

    Raises:
        ValueError: nothing in the tree is trained.

    Example:
        >>> import jax.numpy as jnp, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> trainable, frozen = partition(params)
        >>> [leaf.shape for leaf in jax.tree.leaves(trainable)]
        [(3, 2), (2, 3), (3, 2), (2, 3)]
    """
    mask = trainable_mask(params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "Nothing in this tree is trained: it holds no active adapter. Call "
            "`loha_jax.inject(params, config, key=...)` or `loha_jax.set_adapter(params, names)` "
            "first."
        )
    trainable = jax.tree.map(lambda x, train: x if train else None, params, mask)
    frozen = jax.tree.map(lambda x, train: None if train else x, params, mask)
    return trainable, frozen


def combine(trainable: T, frozen: T) -> T:
    """Put the two halves of `partition` together.

    Configs, and everything else that is no part of the structure, come from `frozen`: a trainable
    half that a jitted function returns has those of the first tree that the function was called
    with.

    Raises:
        ValueError: the halves have different structures, or both hold, or both lack, an array.

    Example:
        >>> import jax.numpy as jnp, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> combine(*partition(params))["q"]["kernel"].shape
        (3, 3)
    """

    def pick(path, b, a):
        if is_adapted(a):
            raise ValueError(
                f"The frozen half holds an array at {jax.tree_util.keystr(path)}, and the "
                f"trainable one a {type(a).__name__}. Put what a call returns into the leaf of the "
                "frozen half: leaf.with_copy(adapter_name, array)."
            )
        if a is not None and b is not None:
            raise ValueError(
                f"Both halves hold {jax.tree_util.keystr(path)}: combine(trainable, frozen) takes "
                "the two halves of one `partition`."
            )
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, frozen, trainable, is_leaf=lambda x: x is None)


def trainable_mask(params: PyTree) -> PyTree:
    """Return the tree with True for each trained array and False for the others, for optax.

    `optax.masked(tx, mask)` lets the gradients of the other arrays through as updates, so freeze
    them too, as in the example.

    Example:
        >>> import jax.numpy as jnp, loha_jax, optax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> mask = trainable_mask(params)
        >>> others = jax.tree.map(lambda train: not train, mask)
        >>> tx = optax.chain(optax.masked(optax.adamw(1e-3), mask),
        ...                  optax.masked(optax.set_to_zero(), others))
        >>> len(jax.tree.leaves(mask)), sum(jax.tree.leaves(mask))
        (5, 4)
    """

    refuse_model(
        params,
        "Flax's own filters do it: nnx.split(model, loha_jax.nnx.LoHaParam, ...). A Keras model "
        "has them as model.trainable_variables.",
    )
    refuse_loose_factors(params)

    def mask(leaf: object) -> object:
        if not is_adapted(leaf):
            return False

        def is_trained(path: Sequence[Any], _: object) -> bool:
            return _is_trained(leaf, path)

        return jax.tree_util.tree_map_with_path(is_trained, leaf)

    return jax.tree.map(mask, params, is_leaf=is_adapted)


def _is_trained(leaf: AdaptedLeaf, path: Sequence[Any]) -> bool:
    """Return whether an array is trained, by its key path in a leaf: `.adapters["a"].hada_w1_a`."""
    part, *inside = path
    if part.name not in ("adapters", "copies") or inside[0].key not in leaf.active:
        return False
    if isinstance(leaf, SavedWeight):
        return not leaf.is_buffer
    return inside[1].name not in UNTRAINED_NAMES
