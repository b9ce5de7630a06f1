"""The mask of what is trained in the params of a model with LoHa layers."""

from __future__ import annotations

import jax
from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.targets.module_names import path_parts


def trainable_mask(params: PyTree) -> PyTree:
    """Return the tree with True for the factors (leaves called `hada_*`) and False for the rest.

    For optax. `loha_jax.trainable_mask` does the same for trees made by `inject`. Biases and other
    layers are False: set what else is trained yourself.

    Args:
        params: the params (or variables) of a Linen model, with or without boxes of partitioning
            metadata.

    Raises:
        ValueError: there is no factor.

    Example:
        >>> import operator, optax
        >>> from loha_jax.linen import LoHaDense
        >>> params = LoHaDense(4, r=2).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        >>> mask = trainable_mask(params)
        >>> sum(jax.tree.leaves(mask)), len(jax.tree.leaves(mask))
        (4, 6)
        >>> freeze = jax.tree.map(operator.not_, mask)
        >>> tx = optax.transforms.selective_transform(optax.adam(1e-3), freeze_mask=freeze)
        >>> state = tx.init(params)
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: path_parts(path)[-1] in FACTOR_NAMES, params
    )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "These params hold no leaf called hada_*: no layer of loha_jax.linen made them. For "
            "trees made by `loha_jax.inject` there is `loha_jax.trainable_mask`."
        )
    return mask
