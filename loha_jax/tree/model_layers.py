"""The layouts that the layers in a tree of parameters give their weights."""

from __future__ import annotations

import itertools

from jaxtyping import PyTree

from loha_jax.targets.model_layouts import Layouts, ModelLayouts
from loha_jax.targets.module_names import module_name
from loha_jax.tree.equinox_layers import equinox_weights
from loha_jax.tree.layer_weights import LayerWeight
from loha_jax.tree.named_axes_layers import named_axes_weights


def layers_layouts(tree: PyTree, given: Layouts | None = None) -> ModelLayouts:
    """Return the given layouts, completed with what the layers of a tree say.

    Known are the layers of Equinox, haliax and penzai.

    Example:
        >>> import equinox as eqx, jax
        >>> layers_layouts({"q": eqx.nn.Linear(3, 5, key=jax.random.key(0))}).own["q"].word
        'oi'
    """
    weights: dict[str, LayerWeight] = {}
    for weight in itertools.chain(equinox_weights(tree), named_axes_weights(tree)):
        weights.setdefault(module_name(weight.path), weight)

    def of(role: str) -> set[str]:
        return {name for name, weight in weights.items() if weight.role == role}

    return ModelLayouts(
        given,
        {name: weight.layout for name, weight in weights.items() if weight.layout is not None},
        of("transposed"),
        lookups=of("lookup"),
        vectors=of("vector"),
        unclear={name: weights[name].axes for name in of("unclear")},
        stacks={name: weight.stacks for name, weight in weights.items() if weight.stacks},
        scales={name: weight.scale for name, weight in weights.items() if weight.scale != 1},
    )
