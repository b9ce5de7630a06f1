"""Flax Linen layers with a LoHa adapter of their own, for authors of models.

An existing model is adapted by `loha_jax.inject`, without changing it. Each layer here is a
subclass of the Flax layer, with its arguments and, for the same key, the same initial `kernel`
(`embedding`) and `bias`. The factors `hada_w1_a`, … are params beside the kernel, in PEFT's shapes.
The kernel is frozen: it gets no gradient. Train only the factors with a mask:

    mask = linen.trainable_mask(params)
    freeze = jax.tree.map(operator.not_, mask)
    tx = optax.transforms.selective_transform(optax.adamw(1e-3), freeze_mask=freeze)

To put the pretrained parameters of the plain Flax model under the factors:

    flat = {**flatten_dict(params), **flatten_dict(pretrained)}  # of flax.traverse_util
    params = unflatten_dict(flat)

`to_adapted` and `from_adapted` convert to `loha_jax`'s trees, and so to PEFT's files, `merge` and
`explain`, and back. With `fedpara=True` there is no kernel: the weight itself is the Hadamard
product, as in FedPara.
"""

from loha_jax.linen.adapted_layer import LoHaLayer
from loha_jax.linen.layer_trees import from_adapted, to_adapted
from loha_jax.linen.layers import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEinsum, LoHaEmbed
from loha_jax.linen.trainable import trainable_mask

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
