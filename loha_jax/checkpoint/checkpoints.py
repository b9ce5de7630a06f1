"""`Checkpoints` of a training run in one folder; `save` and `restore` for a single one."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import jax
from jaxtyping import PyTree

from loha_jax.checkpoint import description_file
from loha_jax.checkpoint.contents import STATE, Restored, arrays_to_save, read_checkpoint
from loha_jax.checkpoint.description import (
    State,
    describe_leaf,
    plain_json,
    plain_numbers,
    take_apart,
)
from loha_jax.checkpoint.fingerprint import Fingerprints
from loha_jax.checkpoint.folders import remove, steps_on_disk, unfinished
from loha_jax.checkpoint.retention import Retention
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.processes import same_everywhere
from loha_jax.runtime.untrusted import FileError
from loha_jax.tree.before_saving import warn_of_changed_base
from loha_jax.tree.containers import tree_of, written_back

_LARGEST_STEP = 2**31 - 1


class Checkpoints:
    """The checkpoints of one training run, in one folder.

    All processes create it, save and restore. Use it in a `with` statement, or call `close` at the
    end, because saving continues in the background. Only one run at a time can use a folder.

    Args:
        folder: created if it is missing; all processes must see it.
        keep: how many of the latest checkpoints stay; None for all.
        best: the metric by which others are kept too, or None.
        best_mode: "min" or "max": which values of the metric are good. NaN never is.
        keep_best: how many of the best checkpoints stay besides the latest.

    Attributes:
        folder: the path of the folder.

    Example:
        >>> import tempfile, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder, keep=1) as checkpoints:
        ...         checkpoints.save(10, params, metrics={"loss": 0.5})
        ...         checkpoints.save(20, params, key=jax.random.key(1), data={"batch": 20})
        ...         restored = checkpoints.restore(params)
        >>> restored.step, restored.data
        (20, {'batch': 20})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        best: str | None = None,
        best_mode: str = "min",
        keep_best: int = 1,
    ):
        import orbax.checkpoint as ocp  # takes a while
        from etils import epath

        name = os.fspath(folder)
        self.folder: Any = epath.Path(name if "://" in name else os.path.abspath(name))
        self._retention = Retention(keep, best, best_mode, keep_best, self._metrics)
        self._fingerprints = Fingerprints()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(STATE, description_file.ITEM),
            item_handlers={
                STATE: ocp.PyTreeCheckpointHandler(),
                description_file.ITEM: ocp.JsonCheckpointHandler(description_file.NAME),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                lightweight_initialize=True,  # an old corrupted file must not stop a run
                # If a folder cannot be created, `save` raises at once; a background thread would
                # be waited for, for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the last save, and stop Orbax' threads."""
        self._manager.close()

    def wait(self) -> None:
        """Wait for the last save; raise its error if it failed."""
        self._manager.wait_until_finished()

    @property
    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, in order, including one that is being written."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The last step that has a checkpoint, or None."""
        return max(self.all_steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best value of the metric `best`, or None if no checkpoint has one."""
        return self._retention.best_step(self.all_steps)

    def save(
        self,
        step: int,
        params: PyTree,
        opt_state: PyTree = None,
        *,
        key: jax.Array | None = None,
        data: object = None,
        metrics: Mapping[str, float | jax.Array] | None = None,
    ) -> None:
        """Save a checkpoint in the background.

        Returns once the arrays are copied, so that they may be donated at once.

        Args:
            step: later than those of the existing checkpoints.
            params: the whole adapted tree: the halves of `partition` combined. Or an adapted NNX
                model.
            opt_state: any optax state; `nnx.state(optimizer)` of an `nnx.Optimizer`.
            key: the random key of the training loop.
            data: the position in the data; any JSON.
            metrics: numbers by name.

        Raises:
            ValueError: the step, or a later one, has a checkpoint already; the tree has no adapter;
                `data` is not JSON; a metric is not a number; or processes hold different values of
                what should be the same.
            TypeError: a leaf is neither an array nor a number, or `opt_state` is an optimizer.

        Warns:
            UserWarning: a kernel has changed since its adapter was made: the checkpoint does not
                hold it.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = self._checked_step(step)
        data = plain_json(data, "data")
        numbers = plain_numbers(metrics or {}, "metrics")
        if not same_everywhere({"step": step, "data": data, "metrics": numbers}):
            raise ValueError(
                f"The processes give different steps, data or metrics; this one gives {step}, "
                f"{data!r}, {numbers!r}. A checkpoint holds those of one process: make them the "
                "same everywhere."
            )
        params = tree_of(params)
        state = take_apart(params, opt_state, key)
        warn_of_changed_base(params)
        arrays, leaves = arrays_to_save(state)
        described = self._described(state, leaves) | {"data": data, "metrics": numbers}
        if jax.process_index() == 0:
            for name in unfinished(self.folder):
                remove(self.folder / name)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._retention.corrupted.pop(step, None)
        self._retention.metrics[step] = numbers
        items = {
            STATE: ocp.args.PyTreeSave(arrays),
            description_file.ITEM: ocp.args.JsonSave(description_file.content(step, described)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, params: PyTree, opt_state: PyTree = None, step: int | None = None
    ) -> Restored | None:
        """Restore the latest intact checkpoint, or that of a step.

        Args:
            params: the adapted tree as it was before training: the base after `inject` with the
                same config. Its arrays determine the dtype and sharding of the restored ones; those
                of the adapters may be `jax.ShapeDtypeStruct`. An NNX model is changed in place.
            opt_state: the optimizer state as it was before training, or its shapes. It determines
                the shardings; dtypes are those that were saved. None to leave it out.
            step: the step of the checkpoint; by default the latest.

        Returns:
            The restored checkpoint, or None if the folder has none.

        Raises:
            ValueError: the checkpoint belongs to another base, config or optimizer; the message
                lists all differences.
            TypeError: `opt_state` is an optimizer.
            FileError: the checkpoint of `step` is corrupted; or, without `step`, all are.
            FileNotFoundError: there is no checkpoint of `step`.

        Warns:
            UserWarning: a later checkpoint is corrupted or unfinished, and was skipped; the message
                says why.
        """
        self.wait()
        state = take_apart(tree_of(params), opt_state)
        leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
        given = self._described(state, leaves)
        steps = steps_on_disk(self.folder)
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint of step {step}; it has {steps or 'none'}"
            )
        for name in unfinished(self.folder):
            if step is None and int(name.partition(".")[0]) > max(steps, default=-1):
                warn_caller(
                    f"{self.folder / name} is unfinished: saving was interrupted. It is skipped."
                )
        for candidate in sorted(steps, reverse=True) if step is None else [step]:
            try:
                restored = read_checkpoint(self.folder, candidate, state, given)
                self._retention.corrupted.pop(candidate, None)
                new = written_back(params, restored.params)
                return dataclasses.replace(restored, params=new)
            except FileError as error:
                self._retention.corrupted[candidate] = str(error)
                if step is not None:
                    raise
                warn_caller(f"{error}. It is skipped.")
        if steps:
            reasons = "".join(
                f"\n  - {self._retention.corrupted[n]}" for n in sorted(steps, reverse=True)
            )
            raise FileError(f"{self.folder} holds no intact checkpoint:{reasons}")
        return None

    def _described(self, state: State, leaves: Mapping[str, Any]) -> dict[str, Any]:
        base = self._fingerprints.of(state.base)
        described = {"adapters": state.adapters, "optimizer": state.optimizer}
        return {**described, "leaves": leaves, "base": base}

    def _metrics(self, step: int) -> dict[str, float]:
        return description_file.read(self.folder / str(step), step)["metrics"]

    def _checked_step(self, step: SupportsIndex) -> int:
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if not 0 <= number <= _LARGEST_STEP:
            raise ValueError(
                f"The step should be an integer from 0 to {_LARGEST_STEP}, got {step!r}"
            )
        if later := [
            n for n in self.all_steps if n >= number and n not in self._retention.corrupted
        ]:
            raise ValueError(
                f"Step {number} cannot be saved: {self.folder} holds checkpoints of {later}, which "
                "would be taken for the newer ones. Choose another folder, or delete those."
            )
        return number


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    opt_state: PyTree = None,
    *,
    step: int = 0,
    key: jax.Array | None = None,
    data: object = None,
    metrics: Mapping[str, float | jax.Array] | None = None,
) -> None:
    """Save one checkpoint, and wait for it. Arguments and errors are those of `Checkpoints.save`.

    Example:
        >>> import tempfile, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, params)
        ...     restore(folder, params).step
        0
    """
    with Checkpoints(folder, keep=None) as checkpoints:
        checkpoints.save(step, params, opt_state, key=key, data=data, metrics=metrics)


def restore(
    folder: str | os.PathLike[str],
    params: PyTree,
    opt_state: PyTree = None,
    step: int | None = None,
) -> Restored:
    """Restore one checkpoint, as `Checkpoints.restore` does; see `save` for an example.

    Raises:
        FileNotFoundError: the folder has no checkpoint.
    """
    name = os.fspath(folder)
    if "://" in name or Path(name).is_dir():
        with Checkpoints(folder, keep=None) as checkpoints:
            if (restored := checkpoints.restore(params, opt_state, step)) is not None:
                return restored
    raise FileNotFoundError(f"{folder} holds no checkpoint")
