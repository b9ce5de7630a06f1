"""Seconds before and after training: to inject, trace, compile, save and load a Llama.

    python -m benchmarks lifecycle

PEFT's `get_peft_model`, `save_pretrained` and `from_pretrained` stand beside `inject`, `save_peft`
and `load_peft`. Traced and compiled are the frozen model, the unmodified model on the adapted tree
(W + ΔW in each leaf), and `adapt`.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import jax_methods, runner
from benchmarks.case import AUTO, DENSE, JAX_FROZEN, KINDS, Case, Settings
from benchmarks.catalogue import find
from benchmarks.jax_methods import JaxModel, Method
from benchmarks.measure import interleaved_seconds, timer
from benchmarks.workers import Record
from loha_jax import interop  # pyright: ignore[reportAttributeAccessIssue]  # pyright sees loha_jax/ alone

CASE = "llama"
STAGED = {JAX_FROZEN: "frozen", DENSE: "W + ΔW", AUTO: "adapt"}


def records(settings: Settings) -> Iterator[Record]:
    """Measures two records: what is done with adapters, and tracing and compiling."""
    case = find(CASE, settings)
    model = case.jax_model()
    about = {"subject": "lifecycle", "case": case.name, "shape": case.shape}
    with tempfile.TemporaryDirectory() as folder:
        runs, prepare = _operations(case, model, Path(folder))
        yield about | {"kind": "adapters", "operations": _timed(runs, prepare, settings)}
    runs, prepare = _stages(case, model)
    yield about | {"kind": "trace and compile", "operations": _timed(runs, prepare, settings)}


Runs = dict[str, Callable[..., Any]]
Prepare = dict[str, Callable[[], Any]]


def _timed(runs: Runs, prepare: Prepare, settings: Settings) -> dict[str, Record]:
    timers = {name: timer(run, prepare.get(name)) for name, run in runs.items()}
    seconds = interleaved_seconds(
        timers, repeats=min(settings.repeats, 9), budget=3 * settings.budget
    )
    return {name: runner.timings(times) for name, times in seconds.items()}


def _operations(case: Case, model: JaxModel, folder: Path) -> tuple[Runs, Prepare]:
    params = jax_methods.inject(model, case.adapter)
    interop.save_peft(folder / "jax", params)

    def inject(_: None = None) -> Any:
        return jax.block_until_ready(jax_methods.inject(model, case.adapter))

    def load(_: None = None) -> Any:
        return jax.block_until_ready(interop.load_peft(folder / "jax", model.params))

    runs: Runs = {
        "inject": inject,
        "inject, nothing compiled": inject,
        "save_peft": lambda: interop.save_peft(folder / "jax", params),
        "load_peft": load,
        "load_peft, nothing compiled": load,
    }
    prepare: Prepare = {
        "inject": inject,
        "inject, nothing compiled": jax.clear_caches,
        "load_peft": load,
        "load_peft, nothing compiled": jax.clear_caches,
    }
    if any(importlib.util.find_spec(package) is None for package in ("torch", "peft")):
        runner.say("torch and peft are not installed: PEFT is left out")
        return runs, prepare
    import peft

    from benchmarks.torch_peers import fresh_copy, peft_config

    base = case.torch_model().module
    saved = peft.get_peft_model(fresh_copy(base), peft_config(case.adapter))  # type: ignore[arg-type]
    saved.save_pretrained(str(folder / "torch"))
    runs |= {
        "PEFT get_peft_model": lambda module: peft.get_peft_model(
            module, peft_config(case.adapter)
        ),
        "PEFT save_pretrained": lambda: saved.save_pretrained(str(folder / "torch")),
        "PEFT from_pretrained": lambda module: peft.PeftModel.from_pretrained(
            module, str(folder / "torch")
        ),
    }
    # Both change the model that they are given.
    prepare |= dict.fromkeys(
        ("PEFT get_peft_model", "PEFT from_pretrained"), functools.partial(fresh_copy, base)
    )
    return runs, prepare


def _stages(case: Case, model: JaxModel) -> tuple[Runs, Prepare]:
    runs: Runs = {}
    prepare: Prepare = {}
    for kind in KINDS:
        methods = jax_methods.methods(model, case.adapter, kind)
        for name, label in STAGED.items():
            job = f"{kind}, {label}"
            runs[f"{job}: trace"], prepare[f"{job}: trace"] = (
                _trace,
                functools.partial(_clear, methods[name]),
            )
            runs[f"{job}: compile"], prepare[f"{job}: compile"] = (
                _compile,
                functools.partial(_lower, methods[name]),
            )
    return runs, prepare


def _clear(method: Method) -> Method:
    jax.clear_caches()
    return method


def _trace(method: Method) -> Any:
    return jax.jit(method.function).trace(*method.arguments)


def _lower(method: Method) -> Any:
    return _trace(_clear(method)).lower()


def _compile(lowered: Any) -> Any:
    return lowered.compile()
