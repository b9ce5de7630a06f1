"""Checkpoints of a training run: adapters, optimizer state, random key and data position.

    with checkpoint.Checkpoints("run", keep=3, best="eval_loss") as checkpoints:
        if (restored := checkpoints.restore(params, opt_state)) is not None:
            params, opt_state = restored.params, restored.opt_state
        ...
        checkpoints.save(
            step, params, opt_state, key=key, data={"batch": step}, metrics={"eval_loss": loss}
        )

The base is never saved. Orbax writes in the background and deletes old checkpoints; a folder
appears by one rename. Two things are added. Orbax does not notice values that have changed on disk,
so each array has a digest. Orbax knows nothing of the base, so the description has a fingerprint
of it.
"""

from loha_jax.checkpoint.checkpoints import Checkpoints, Restored, restore, save

__all__ = [
    "Checkpoints",
    "Restored",
    "restore",
    "save",
]
