"""LoHa for Keras 3 on JAX: `inject` for a whole model, which `compile` and `fit` then train.

    loha_jax.keras.inject(model, config, key=key)  # in place; the model is called as before
    model.compile("adam", "mse")
    model.fit(x, y)                                # trains the adapter alone
    interop.save_peft("adapter", model)

The factors are Keras variables of their layer, and everything else is frozen. The functions from
tree to tree (`loha_jax.merge`, `unload`, `set_adapter`, …) and `interop.save_peft` and `load_peft`
take such a model too: they change it in place, and return it.
"""

from loha_jax.keras.injection import inject

__all__ = ["inject"]
