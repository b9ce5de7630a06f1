"""Checkpoints of a training run, with Orbax: adapters, optimizer state, random key and data position; never the base.

    with checkpoint.Checkpoints("run", keep=3, best="eval_loss") as checkpoints:
        if (restored := checkpoints.restore(params, opt_state)) is not None:
            params, opt_state = restored.params, restored.opt_state
        ...
        checkpoints.save(step, params, opt_state, key=key, data={"batch": step}, metrics={"eval_loss": loss})

Orbax writes in the background, keeps and deletes; a folder appears by one rename. What it does not do is done here: it
does not notice values that have changed on disk, so each array has a digest; and it knows nothing of the base, so the
description (`saved_state.py`) has a fingerprint of it.
"""

from loha_jax.checkpoint.checkpoints import Checkpoints, Restored, restore, save

__all__ = [
    "Checkpoints",
    "Restored",
    "restore",
    "save",
]
