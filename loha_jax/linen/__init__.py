"""Flax Linen layers with a LoHa adapter of their own, for authors of models.

A model that is there already is adapted by `loha_jax.inject`, without changing it. Each layer here is a subclass of the
Flax layer with its arguments and, for the same key, the same initial `kernel` (`embedding`) and `bias`. The factors
`hada_w1_a`, … stand beside the kernel in the params dict, in PEFT's shapes. The kernel is frozen: it gets no gradient.
Train the factors alone with a mask:

    mask = linen.trainable_mask(params)
    tx = optax.transforms.selective_transform(optax.adamw(1e-3), freeze_mask=jax.tree.map(operator.not_, mask))

Pretrained parameters of the plain Flax model go under the factors by
`unflatten_dict({**flatten_dict(params), **flatten_dict(pretrained)})` (`flax.traverse_util`). `to_adapted` and
`from_adapted` lead to `loha_jax`'s trees, and so to PEFT's files, `merge` and `explain`, and back.

With `fedpara=True` there is no kernel: the weight itself is the Hadamard product, as in FedPara.
"""

from loha_jax.linen.layer_trees import from_adapted, to_adapted
from loha_jax.linen.layers import (
    LoHaConv,
    LoHaDense,
    LoHaDenseGeneral,
    LoHaEinsum,
    LoHaEmbed,
    LoHaLayer,
    trainable_mask,
)

__all__ = [
    "LoHaConv",
    "LoHaDense",
    "LoHaDenseGeneral",
    "LoHaEinsum",
    "LoHaEmbed",
    "LoHaLayer",
    "from_adapted",
    "to_adapted",
    "trainable_mask",
]
