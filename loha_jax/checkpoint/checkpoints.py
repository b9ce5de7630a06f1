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

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from loha_jax.checkpoint.description import (
    KEY,
    State,
    describe_leaf,
    differences,
    fingerprint,
    plain_json,
    plain_numbers,
    take_apart,
)
from loha_jax.checkpoint.orbax_arrays import as_given, read_arrays, storable
from loha_jax.checkpoint.retention import Retention
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.digests import digests
from loha_jax.runtime.processes import agreed, of_first_process, same_everywhere
from loha_jax.runtime.untrusted import FileError, json_object
from loha_jax.tree.before_saving import warn_of_changed_base

_FORMAT = 1
_STATE, _DESCRIPTION, _FILE = "state", "description", "description.json"
_LARGEST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
        step: of the checkpoint.
        params: the given tree with the checkpoint's adapters; its base leaves are the given ones.
        opt_state: None where none was given.
        key: the random key, or None if none was saved.
        data: the data position, as JSON gives it (a tuple is a list), or None.
        metrics: numbers by name.

    Example:
        >>> Restored(step=3, params={}, opt_state=None, key=None, data={"batch": 3}, metrics={}).step
        3
    """

    step: int
    params: Any
    opt_state: Any
    key: Any
    data: Any
    metrics: dict[str, float]


class Checkpoints:
    """The checkpoints of one training run, in one folder. All processes create it, save and restore.

    Args:
        folder: made if it is not there; seen by all processes.
        keep: how many of the latest checkpoints stay; None for all.
        best: the metric by which some more are kept, or None.
        best_mode: "min" or "max": which values of the metric are good. NaN never is.
        keep_best: how many of the best ones stay, beside the latest.

    Attributes:
        folder: where the checkpoints are.

    Use it in a `with` statement, or call `close` at the end: saving goes on in the background. A folder belongs to one
    run at a time.

    Example:
        >>> import tempfile, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:
        ...     checkpoints.save(10, params, metrics={"loss": 0.5})
        ...     checkpoints.save(20, params, key=jax.random.key(1), data={"batch": 20})
        ...     restored = checkpoints.restore(params)
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
        self._retention = Retention(keep, best, best_mode, keep_best, lambda step: self._description(step)["metrics"])
        self._base: tuple[list[weakref.ref], dict[str, Any]] | None = None
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(_STATE, _DESCRIPTION),
            item_handlers={
                _STATE: ocp.PyTreeCheckpointHandler(),
                _DESCRIPTION: ocp.JsonCheckpointHandler(_FILE),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                lightweight_initialize=True,  # a broken file of an old checkpoint stops nobody
                # Where a folder cannot be made, `save` says so; a background thread would be waited for, for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        """Waits for what is being written, and ends Orbax' threads."""
        self._manager.close()

    def wait(self) -> None:
        """Waits until the last save is finished; raises what went wrong with it."""
        self._manager.wait_until_finished()

    @property
    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; one that is being written counts."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The last step that has a checkpoint, or None."""
        return max(self.all_steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best value of the metric `best` among the checkpoints, or None if none has any."""
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
        """Starts to save a checkpoint; returns once the arrays are copied, so that they may be donated at once.

        Args:
            step: later than those that are there.
            params: the whole adapted tree, or the two halves of `partition` put together.
            opt_state: any optax state.
            key: the random key of the training loop.
            data: where the data are to go on: anything that JSON holds.
            metrics: numbers by name.

        Raises:
            ValueError: the step, or a later one, has a checkpoint already; the tree holds no adapter; `data` is nothing
                that JSON holds; a metric is no number; or several processes hold different values of what should be
                the same.
            TypeError: a leaf is neither an array nor a number; `params` is a model.

        Warns:
            UserWarning: a kernel has changed since its adapter was made: the checkpoint does not hold it.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = self._checked_step(step)
        data = plain_json(data, "data")
        numbers = plain_numbers(metrics or {}, "metrics")
        if not same_everywhere({"step": step, "data": data, "metrics": numbers}):
            raise ValueError(
                f"The processes give different steps, data or metrics; this one gives {step}, {data!r}, {numbers!r}. A "
                "checkpoint holds those of one process: make them the same everywhere."
            )
        state = take_apart(params, opt_state, key)
        warn_of_changed_base(params)
        if abstract := [name for name, leaf in state.saved.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
            raise ValueError(f"These have a shape, but no values to save: {', '.join(abstract)}")
        arrays = {name: storable(leaf) for name, leaf in state.saved.items() if hasattr(leaf, "dtype")}
        leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
        found = digests(arrays)
        if differ := [name for name, digest in found.items() if not digest]:
            raise ValueError(
                f"The processes hold different values of {', '.join(differ)}, of which a checkpoint holds one. Make it "
                "the same everywhere (fold jax.process_index() into a key after it is restored), or one global array."
            )
        for number, (name, digest) in enumerate(found.items()):
            leaves[name] |= {"digest": digest, "item": str(number)}
        body = {
            "format": _FORMAT,
            "step": step,
            "adapters": state.adapters,
            "optimizer": state.optimizer,
            "leaves": leaves,
            "base": self._fingerprint(state.base),
            "data": data,
            "metrics": numbers,
        }
        if jax.process_index() == 0:
            for name in self._unfinished():
                _remove(self.folder / name)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._retention.broken.pop(step, None)
        self._retention.metrics[step] = body["metrics"]
        numbered = {leaves[name]["item"]: array for name, array in arrays.items() if array.size}  # Orbax wants no empty
        items = {
            _STATE: ocp.args.PyTreeSave(numbered),
            _DESCRIPTION: ocp.args.JsonSave({"digest": _text_digest(body), "content": body}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, params: Any, opt_state: Any = None, step: int | None = None) -> Restored | None:
        """Restores the latest checkpoint that is whole, or that of a step.

        Args:
            params: the adapted tree as it was made before training: the base with `inject` of the same config. The
                arrays in it say which dtype and sharding the restored ones get; those of the adapters may be
                `jax.ShapeDtypeStruct`.
            opt_state: the optimizer state as it was made before training (or its shapes), or None to leave it. It says
                the shardings; dtypes are those that were saved.
            step: which checkpoint; the latest one by default.

        Returns:
            What was restored, or None if the folder holds no checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another base, config or optimizer; the message names all that differs.
            FileError: the checkpoint of `step` is broken; or, without `step`, all are.
            FileNotFoundError: there is none of `step`.

        Warns:
            UserWarning: a later checkpoint is broken or half-written, and was left out; the message says what is wrong.
        """
        self.wait()
        state = take_apart(params, opt_state)
        base = self._fingerprint(state.base)
        leaves = {name: describe_leaf(leaf) for name, leaf in state.saved.items()}
        given = {"adapters": state.adapters, "optimizer": state.optimizer, "leaves": leaves, "base": base}
        steps = self._steps_on_disk()
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint of step {step}; it has {steps or 'none'}")
        for name in self._unfinished():
            if step is None and int(name.partition(".")[0]) > max(steps, default=-1):
                warn_caller(f"{self.folder / name} is half-written: saving was interrupted. It is left out.")
        for candidate in sorted(steps, reverse=True) if step is None else [step]:
            try:
                restored = self._restore_step(candidate, state, given)
                self._retention.broken.pop(candidate, None)
                return restored
            except FileError as error:
                self._retention.broken[candidate] = str(error)
                if step is not None:
                    raise
                warn_caller(f"{error}. It is left out.")
        if steps:
            reasons = "".join(f"\n  - {self._retention.broken[n]}" for n in sorted(steps, reverse=True))
            raise FileError(f"{self.folder} holds no whole checkpoint:{reasons}")
        return None

    def _restore_step(self, step: int, state: State, given: Mapping[str, Any]) -> Restored:
        """Raises FileError where the checkpoint is broken, ValueError where it belongs to something else."""
        origin = f"The checkpoint of step {step} ({self.folder / str(step)})"
        held = agreed(functools.partial(self._description, step), f"{origin} is broken")
        if lines := differences(given, held):
            listed = "".join(f"\n  - {line}" for line in lines)
            raise ValueError(
                f"{origin} belongs to something else than what was given:{listed}\nGive the base weights, the config "
                "(loha_jax.inject) and the optimizer that it was saved with; adapters can be activated with "
                "loha_jax.set_adapter. To train something else, choose another folder."
            )
        names = [*state.saved, *([KEY] if KEY in held["leaves"] else [])]
        values = {name: x["value"] for name in names if "value" in (x := held["leaves"][name])}
        wanted = {name: held["leaves"][name] for name in names if name not in values}
        read = functools.partial(read_arrays, self.folder / str(step) / _STATE, wanted, state.saved)
        arrays = agreed(read, f"{origin} is broken")
        found = digests(arrays)
        if changed := [name for name, digest in found.items() if digest != wanted[name]["digest"]]:
            raise FileError(f"{origin} is broken: what its files hold of {', '.join(changed)} is not what was saved")
        for name, array in arrays.items():
            # Not the optimizer state: optax may change a dtype in its first update, and the run goes on with that one.
            values[name] = as_given(array, state.saved.get(name), wanted[name], cast=name.startswith("params"))
        params, opt_state = state.with_values(values)
        return Restored(step, params, opt_state, values.get(KEY), held["data"], held["metrics"])

    def _description(self, step: int) -> dict[str, Any]:
        """What `save` wrote about a checkpoint; raises FileError where it is not that."""
        path = self.folder / str(step) / _DESCRIPTION / _FILE
        written = json_object(path.read_text(), path)
        body = written.get("content")
        if not isinstance(body, dict) or written.get("digest") != _text_digest(body):
            raise FileError(f"{path} is not as it was written")
        if body["format"] != _FORMAT:
            raise FileError(f"{path} is of format {body['format']!r}, not {_FORMAT}")
        if body["step"] != step:
            raise FileError(f"{path} is of step {body['step']}")
        return body

    def _fingerprint(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`fingerprint`, which is remembered for as long as the arrays are the very same."""
        arrays = list(base.values())
        if self._base is not None:
            known, result = self._base
            if len(known) == len(arrays) and all(ref() is array for ref, array in zip(known, arrays, strict=True)):
                return result
        result = fingerprint(base)
        fixed = all(isinstance(array, jax.Array) for array in arrays)  # numpy arrays may change in place
        self._base = ([weakref.ref(array) for array in arrays], result) if fixed else None
        return result

    def _checked_step(self, step: Any) -> int:
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if not 0 <= number <= _LARGEST_STEP:
            raise ValueError(f"The step should be an integer from 0 to {_LARGEST_STEP}, got {step!r}")
        if later := [n for n in self.all_steps if n >= number and n not in self._retention.broken]:
            raise ValueError(
                f"Step {number} cannot be saved: {self.folder} holds checkpoints of {later}, which would be taken for "
                "the newer ones. Choose another folder, or delete those."
            )
        return number

    def _steps_on_disk(self) -> list[int]:
        """As the first process sees them."""
        import orbax.checkpoint as ocp

        return of_first_process([x.step for x in ocp.path.step.standard_name_format().find_all(self.folder)])

    def _unfinished(self) -> list[str]:
        """The names of half-written folders: no save is going on when this is called."""
        import orbax.checkpoint as ocp

        names = [path.name for path in self.folder.iterdir()]
        return sorted(n for n in names if ocp.utils.TMP_DIR_SUFFIX in n and n.partition(".")[0].isdigit())


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
    """Saves one checkpoint and waits for it; arguments and errors as of `Checkpoints.save`.

    Example:
        >>> import tempfile, loha_jax
        >>> params = loha_jax.inject({"q": {"kernel": jnp.ones((3, 3))}},
        ...     loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, params)
        ...     restore(folder, params).step
        0
    """
    with Checkpoints(folder, keep=None) as checkpoints:
        checkpoints.save(step, params, opt_state, key=key, data=data, metrics=metrics)


def restore(folder: str | os.PathLike[str], params: Any, opt_state: Any = None, step: int | None = None) -> Restored:
    """Restores one checkpoint, as `Checkpoints.restore`; see `save` for an example.

    Raises:
        FileNotFoundError: there is none.
    """
    name = os.fspath(folder)
    if "://" in name or Path(name).is_dir():
        with Checkpoints(folder, keep=None) as checkpoints:
            if (restored := checkpoints.restore(params, opt_state, step)) is not None:
                return restored
    raise FileNotFoundError(f"{folder} holds no checkpoint")


def _remove(folder: Any) -> None:
    """Removes a half-written folder. Where a save has just failed, its other writes may still go on for a moment."""
    for _ in range(50):
        try:
            folder.rmtree()
        except OSError:
            time.sleep(0.1)
        if not folder.exists():
            return
    folder.rmtree()


def _text_digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()
