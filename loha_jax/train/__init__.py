"""`fit`: a training loop for people who want one. Nothing else in the package needs it.

result = loha_jax.train.fit(
    loss_fn, params, optax.adamw(1e-3), batches, key=key, steps=1000, checkpoints="run"
)
interop.save_peft("adapter", result.params)
"""

from loha_jax.train.loop import Result, fit

__all__ = [
    "Result",
    "fit",
]
