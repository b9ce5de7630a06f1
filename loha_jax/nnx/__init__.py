"""LoHa for Flax NNX: `inject` for a whole model, and layers for authors.

    loha_jax.nnx.inject(model, config, rngs=rngs)  # in place; the model is called as before
    optimizer = nnx.Optimizer(model, tx, wrt=loha_jax.nnx.LoHaParam)
    factors = nnx.DiffState(0, loha_jax.nnx.LoHaParam)
    grads = nnx.grad(loss_fn, argnums=factors)(model)

The base variables stay in their places, and the factors are `nnx.LoRAParam`s beside them
(`LoHaParam` is another name for it). Calls are computed on the factors, as by `loha_jax.adapt`.
Code that reads a kernel outside of a call gets the base weight. The functions from tree to tree
(`loha_jax.merge`, `unload`, `set_adapter`, …) and `interop.save_peft` and `load_peft` take such a
model too. Those that change a tree change a model in place, and return it.
"""

from loha_jax.nnx.injection import inject, set_dropout
from loha_jax.nnx.layers import LoHaConv, LoHaEinsum, LoHaEmbed, LoHaLinear, LoHaLinearGeneral
from loha_jax.nnx.siblings import InactiveLoHaParam, LoHaParam

__all__ = [
    "InactiveLoHaParam",
    "LoHaConv",
    "LoHaEinsum",
    "LoHaEmbed",
    "LoHaLinear",
    "LoHaLinearGeneral",
    "LoHaParam",
    "inject",
    "set_dropout",
]
