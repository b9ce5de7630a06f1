"""The command line `loha-jax`: adapter files inspected, converted, merged and compared, without building a model."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from loha_jax.interop.commands import convert as conversion
from loha_jax.interop.commands import differences, inspection
from loha_jax.interop.commands import tables as cli_tables
from loha_jax.interop.merge import files as merge_files
from loha_jax.interop.names.renames import parse_names
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_PIPE_WIDTH = 160
"""Columns of tables that go to a file or another program."""

_FLAGS = ("only", "base", "prefix", "dtype", "rank", "energy", "force")
"""Arguments of the library that are options here."""

FINE, DIFFERENT, WRONG, INTERRUPTED = 0, 1, 2, 130

_EPILOG = (
    "Exit codes: 0 fine; 1 diff: they differ, inspect: something is broken; 2 wrong use or unreadable input; "
    "130 interrupted. With --json, one JSON document goes to standard output and nothing else; messages and progress "
    "go to standard error."
)

app = typer.Typer(
    name="loha-jax",
    help="LoHa, LoRA and LyCORIS adapter files: inspect, convert, merge and compare them. Works on files alone, on the "
    "CPU and offline; no model is built.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(enum.StrEnum):
    """What an adapter is converted to."""

    peft = "peft"
    lycoris = "lycoris"
    kohya = "kohya"
    lora = "lora"


class Dtype(enum.StrEnum):
    """What tensors are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Only modules whose whole name in the adapter's file matches, such as 'lora_unet_.*'.",
    ),
]
NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--names",
        metavar="REGEX=TEMPLATE",
        help="Other names for modules, where the base model's were changed since: those whose whole name in the "
        "adapter's file matches, such as 'language_model\\.model\\.(.*)=model.language_model.\\1'; may be given "
        "several times.",
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace what is there, when the new one is whole; merge: also write float8 without scales where rounding "
        "loses most of the update.",
    ),
]


@app.callback(invoke_without_command=True)
def _main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        import loha_jax

        typer.echo(loha_jax.__version__)
        raise typer.Exit


@app.command(epilog=_EPILOG)
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter (folder or file), or a base checkpoint.")],
    every: Annotated[bool, typer.Option("--all", help="A row for every module, not for every kind of module.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Says what a file or folder is.

    Rank, alpha, modules with their shapes, dtype and parameters, the norm of each update (computed without building
    it), metadata; and what is broken: NaN or infinity, missing or misshapen tensors. Exit code 1 if something is.
    """
    with _Command("inspect", as_json) as command:
        found = inspection.inspect_path(path)
        command.show(found, lambda out: cli_tables.show_inspection(out, found, every))
        command.finish(DIFFERENT if found["problems"] else FINE)


@app.command(epilog=_EPILOG)
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter of any format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder (or LyCORIS' or kohya's file) to write.")],
    to: Annotated[Format, typer.Option("--to", help="The format to write.")],
    rank: Annotated[int | None, typer.Option(help="--to lora: at most this rank; exact (r²) by default.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="--to lora: the rank that keeps this share of the squared singular values.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The base model's checkpoint: its names say what underscores stand for, its shapes which modules are "
            "convolutions. Needed from LyCORIS or kohya to PEFT."
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="--to lycoris, kohya: what keys begin with (lycoris_, lora_unet_).")
    ] = None,
    only: OnlyOption = None,
    names: NamesOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the factors; their own by default.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes an adapter in another format; the factors stay what they are, bit for bit.

    What the target cannot hold is refused by name, and nothing is written: PEFT's LoHa knows no Conv3d and no weight
    decomposition, LyCORIS no modules_to_save.
    """
    with _Command("convert", as_json) as command:
        done = conversion.convert_adapter(
            source,
            target,
            to.value,
            rank=rank,
            energy=energy,
            base=base,
            prefix=prefix,
            only=only,
            names=parse_names(names or []),
            dtype=_dtype(dtype),
            force=force,
        )
        result = {
            "source": str(source),
            "form": done.form,
            "target": str(target),
            "to": to.value,
            "modules": [{"name": n, "r": r, "error": done.errors.get(n)} for n, r in done.modules.items()],
            "notes": list(done.notes),
        }
        command.show(result, lambda out: cli_tables.show_conversion(out, result))


@app.command(epilog=_EPILOG)
def merge(
    base: Annotated[Path, typer.Argument(help="The base model's safetensors checkpoint: a file, or a folder.")],
    adapter: Annotated[
        Path, typer.Argument(help="An adapter: PEFT's LoHa or LoRA folder, LyCORIS' or kohya's file or its folder.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it appears when it is whole.")],
    weight: Annotated[float, typer.Option(help="What ADAPTER's update is multiplied by.")] = 1.0,
    more: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PATH[=WEIGHT]", help="One more adapter; may be given several times."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of all floating tensors; the base's own by default.")] = None,
    only: OnlyOption = None,
    names: NamesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes a checkpoint with adapters merged into it.

    Shards, index, key order and metadata are the base's; config and tokenizer come along. Tensors go through memory a
    few rows at a time. If a run is interrupted, the same command goes on with the files that are finished.
    """
    with _Command("merge", as_json) as command:
        adapters = [(adapter, _finite("--weight", weight)), *map(_parse_with, more or [])]
        try:
            with command.progress("merging", in_bytes=True) as progress:
                report = merge_files.merge_checkpoint(
                    base,
                    adapters,
                    out,
                    dtype=_dtype(dtype),
                    only=only,
                    names=parse_names(names or []),
                    force=force,
                    progress=progress,
                )
        except KeyboardInterrupt:
            command.say("Interrupted; the same command goes on with the files that are finished.")
            raise
        result = {
            "out": str(report.out),
            "files": list(report.files),
            "kept": list(report.kept),
            "merged": report.merged,
            "replaced": report.replaced,
            "copied": report.copied,
            "bytes": report.bytes,
            "losses": [
                {"name": key, "dtype": t.dtype, "scaled": t.scaled, "error": t.relative, "lost_share": t.share}
                for key, t in report.losses.items()
            ],
            "notes": list(report.notes),
        }
        command.show(result, lambda console: cli_tables.show_merge(console, result))


@app.command(epilog=_EPILOG)
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter, or a checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same kind, of any format.")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="What counts as no difference: of adapters' updates, relative; of checkpoints' values, absolute.",
        ),
    ] = 0.0,
    every: Annotated[bool, typer.Option("--all", help="Rows for what is equal too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compares two adapters, module by module, or two checkpoints, tensor by tensor.

    Of adapters, ‖ΔW_A − ΔW_B‖/‖ΔW_A‖ is computed without building ΔW; names with underscores are found among the other
    one's dotted names. Exit code 1 if they differ.
    """
    with _Command("diff", as_json) as command:
        _finite("--tolerance", tolerance)
        with command.progress("comparing", in_bytes=False) as progress:
            found = differences.compare_paths(first, second, tolerance=tolerance, progress=progress)
        command.show(found, lambda out: cli_tables.show_difference(out, found, every))
        command.finish(DIFFERENT if found["different"] else FINE)


class _Command:
    """One run: where its output goes, and what becomes of its errors."""

    def __init__(self, name: str, as_json: bool):
        self._name, self._as_json = name, as_json
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> _Command:
        import jax

        jax.config.update("jax_platforms", "cpu")
        self._warnings.__enter__()
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: self.say(f"Note: {message}")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        self._warnings.__exit__(None, None, None)
        if error is None or isinstance(error, typer.Exit) or not isinstance(error, Exception):
            return False
        if os.environ.get("LOHA_JAX_TRACEBACK"):
            return False
        self.fail(_paragraph(error), WRONG)
        return True

    def say(self, text: str) -> None:
        """A message to standard error."""
        self._errors.print(Text(cli_tables.printable(text)))

    def show(self, result: dict[str, Any], table: Callable[[Console], None]) -> None:
        """The result to standard output."""
        if self._as_json:
            typer.echo(json.dumps({"command": self._name, **result}, indent=2, allow_nan=False))
        else:
            console = Console(highlight=False)
            table(console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH))

    def fail(self, text: str, code: int) -> None:
        """Ends the run with an error."""
        if self._as_json:
            typer.echo(json.dumps({"command": self._name, "error": text}, indent=2))
        self.say(f"Error: {text}")
        self.finish(code)

    def finish(self, code: int) -> None:
        """Ends the run with an exit code."""
        raise typer.Exit(code)

    @contextlib.contextmanager
    def progress(self, what: str, *, in_bytes: bool) -> Iterator[Callable[[int, int], None]]:
        """A bar on standard error, where that is a terminal; gives a function that takes what is done and the total."""
        count = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        with Progress(*columns, console=self._errors, transient=True, disable=not self._errors.is_terminal) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _paragraph(error: Exception) -> str:
    """What an error says, without a traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, re.error):
        return f"--only {error.pattern!r} is not a regular expression: {error}"
    if isinstance(error, ValueError | OSError | ImportError):
        return re.sub(rf"`({'|'.join(_FLAGS)})=`", r"--\1", str(error))  # the library names Python's arguments
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return f"loha-jax has a fault ({type(error).__name__}: {error}); LOHA_JAX_TRACEBACK=1 shows where"


def _dtype(dtype: Dtype | None) -> Any:
    import jax.numpy as jnp

    return None if dtype is None else jnp.dtype(dtype.value)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} should be a finite number, got {value}")
    return value


def _parse_with(text: str) -> tuple[Path, float]:
    """ "PATH=0.5", or a path alone."""
    path, separator, weight = text.rpartition("=")
    if separator:
        with contextlib.suppress(ValueError):
            return Path(path), _finite(f"the weight of --with {path}", float(weight))
    return Path(text), 1.0


def main() -> None:
    """The entry point."""
    app(prog_name="loha-jax")


if __name__ == "__main__":
    main()
