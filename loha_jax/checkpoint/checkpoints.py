"""`Checkpoints` of a training run in one folder; `save` and `restore` for a single one."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from loha_jax.checkpoint import description_file
from loha_jax.checkpoint.description import (
    KEY,
    State,
    describe_leaf,
    differences,
    plain_json,
    plain_numbers,
    take_apart,
)
from loha_jax.checkpoint.fingerprint import Fingerprints
from loha_jax.checkpoint.folders import remove, steps_on_disk, unfinished
from loha_jax.checkpoint.orbax_arrays import as_given, read_arrays, storable
from loha_jax.checkpoint.retention import Retention
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.digests import digests
from loha_jax.runtime.processes import raise_together, same_everywhere
from loha_jax.runtime.untrusted import FileError
from loha_jax.tree.before_saving import warn_of_changed_base

_STATE = "state"
_LARGEST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: the step of the checkpoint.
        params: the given tree with the checkpoint's adapters. Its base leaves are the given ones.
        opt_state: the optimizer's state, or None if none was given.
        key: the random key, or None if none was saved.
        data: the data position as JSON gives it (a tuple is a list), or None.
        metrics: numbers by name.

    Example:
        >>> Restored(step=3, params={}, opt_state=None, key=None, data=None, metrics={}).step
        3
    """

    step: int
    params: Any
    opt_state: Any
    key: Any
    data: Any
    metrics: dict[str, float]


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
        self._retention = Retention(
            keep, best, best_mode, keep_best, lambda step: self._description(step)["metrics"]
        )
        self._fingerprints = Fingerprints()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(_STATE, description_file.ITEM),
            item_handlers={
                _STATE: ocp.PyTreeCheckpointHandler(),
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
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
        params: Any,
        opt_state: Any = None,
        *,
        key: jax.Array | None = None,
        data: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint in the background.

        Returns once the arrays are copied, so that they may be donated at once.

        Args:
            step: later than those of the existing checkpoints.
            params: the whole adapted tree: the halves of `partition` combined.
            opt_state: any optax state.
            key: the random key of the training loop.
            data: the position in the data; any JSON.
            metrics: numbers by name.

        Raises:
            ValueError: the step, or a later one, has a checkpoint already; the tree has no adapter;
                `data` is not JSON; a metric is not a number; or processes hold different values of
                what should be the same.
            TypeError: a leaf is neither an array nor a number; `params` is a model.

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
        state = take_apart(params, opt_state, key)
        warn_of_changed_base(params)
        arrays, leaves = _arrays_to_save(state)
        described = {
            "adapters": state.adapters,
            "optimizer": state.optimizer,
            "leaves": leaves,
            "base": self._fingerprints.of(state.base),
            "data": data,
            "metrics": numbers,
        }
        if jax.process_index() == 0:
            for name in unfinished(self.folder):
                remove(self.folder / name)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._retention.corrupted.pop(step, None)
        self._retention.metrics[step] = numbers
        items = {
            _STATE: ocp.args.PyTreeSave(arrays),
            description_file.ITEM: ocp.args.JsonSave(description_file.content(step, described)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, params: Any, opt_state: Any = None, step: int | None = None
    ) -> Restored | None:
        """Restore the latest intact checkpoint, or that of a step.

        Args:
            params: the adapted tree as it was before training: the base after `inject` with the
                same config. Its arrays determine the dtype and sharding of the restored ones; those
                of the adapters may be `jax.ShapeDtypeStruct`.
            opt_state: the optimizer state as it was before training, or its shapes. It determines
                the shardings; dtypes are those that were saved. None to leave it out.
            step: the step of the checkpoint; by default the latest.

        Returns:
            The restored checkpoint, or None if the folder has none.

        Raises:
            ValueError: the checkpoint belongs to another base, config or optimizer; the message
                lists all differences.
            FileError: the checkpoint of `step` is corrupted; or, without `step`, all are.
            FileNotFoundError: there is no checkpoint of `step`.

        Warns:
            UserWarning: a later checkpoint is corrupted or unfinished, and was skipped; the message
                says why.
        """
        self.wait()
        state = take_apart(params, opt_state)
        base = self._fingerprints.of(state.base)
        leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
        given = {
            "adapters": state.adapters,
            "optimizer": state.optimizer,
            "leaves": leaves,
            "base": base,
        }
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
                restored = self._restore_step(candidate, state, given)
                self._retention.corrupted.pop(candidate, None)
                return restored
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

    def _restore_step(self, step: int, state: State, given: Mapping[str, Any]) -> Restored:
        """Raise FileError if the checkpoint is corrupted, ValueError if it does not match."""
        origin = f"The checkpoint of step {step} ({self.folder / str(step)})"
        held = raise_together(functools.partial(self._description, step), f"{origin} is corrupted")
        if lines := differences(given, held):
            listed = "".join(f"\n  - {line}" for line in lines)
            raise ValueError(
                f"{origin} belongs to something else than what was given:{listed}\nGive the base "
                "weights, the config (loha_jax.inject) and the optimizer that it was saved with; "
                "adapters can be activated with loha_jax.set_adapter. To train something else, "
                "choose another folder."
            )
        names = [*state.saved, *([KEY] if KEY in held["leaves"] else [])]
        values = {name: x["value"] for name in names if "value" in (x := held["leaves"][name])}
        wanted = {name: held["leaves"][name] for name in names if name not in values}
        read = functools.partial(read_arrays, self.folder / str(step) / _STATE, wanted, state.saved)
        arrays = raise_together(read, f"{origin} is corrupted")
        found = digests(arrays)
        if changed := [name for name, digest in found.items() if digest != wanted[name]["digest"]]:
            raise FileError(
                f"{origin} is corrupted: the values of {', '.join(changed)} are not those that "
                "were saved"
            )
        for name, array in arrays.items():
            # Not the optimizer state: optax may change a dtype in its first update.
            values[name] = as_given(
                array, state.saved.get(name), wanted[name], cast=name.startswith("params")
            )
        params, opt_state = state.with_values(values)
        return Restored(step, params, opt_state, values.get(KEY), held["data"], held["metrics"])

    def _description(self, step: int) -> dict[str, Any]:
        return description_file.read(self.folder / str(step), step)

    def _checked_step(self, step: Any) -> int:
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


def _arrays_to_save(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays by number, as they are saved, and the description of all leaves by name."""
    if abstract := [
        name for name, leaf in state.saved.items() if isinstance(leaf, jax.ShapeDtypeStruct)
    ]:
        raise ValueError(f"These have a shape, but no values to save: {', '.join(abstract)}")
    arrays = {name: storable(leaf) for name, leaf in state.saved.items() if hasattr(leaf, "dtype")}
    leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
    found = digests(arrays)
    if differ := [name for name, digest in found.items() if not digest]:
        raise ValueError(
            f"The processes hold different values of {', '.join(differ)}, of which a checkpoint "
            "holds one. Make it the same everywhere (fold jax.process_index() into a key after it "
            "is restored), or one global array."
        )
    for number, (name, digest) in enumerate(found.items()):
        leaves[name] |= {"digest": digest, "item": str(number)}
    # Orbax refuses empty arrays.
    return {leaves[name]["item"]: array for name, array in arrays.items() if array.size}, leaves


def save(
    folder: str | os.PathLike[str],
    params: Any,
    opt_state: Any = None,
    *,
    step: int = 0,
    key: jax.Array | None = None,
    data: Any = None,
    metrics: Mapping[str, Any] | None = None,
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
    folder: str | os.PathLike[str], params: Any, opt_state: Any = None, step: int | None = None
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
