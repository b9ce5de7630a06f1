"""`run_command`: where the output of a command goes, and how its errors are said."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .tables import printable

FINE, DIFFERENT, WRONG = 0, 1, 2
"""Exit codes; that of an interruption is typer's, 130."""

_PIPE_WIDTH = 160
"""Columns of tables that go to a file or another program."""

_ARGUMENT = re.compile(
    r"""`(only|base|prefix|dtype|rank|energy|force|names|form|to)=(True|"\w+"|\{'[^`{}]*'\}|)`"""
)
"""An argument of the library that is an option of a command, as the library's errors write it."""


class CommandRun:
    """One run of a command: its tables or JSON, its messages and its errors.

    Args:
        name: of the command.
        as_json: whether standard output gets one JSON document instead of tables.
    """

    def __init__(self, name: str, as_json: bool):
        self._name, self._as_json = name, as_json
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a message to standard error."""
        self._errors.print(Text(printable(text)))

    def show(self, result: Mapping[str, object], table: Callable[[Console], None]) -> None:
        """Print the result to standard output."""
        if self._as_json:
            typer.echo(json.dumps({"command": self._name, **result}, indent=2, allow_nan=False))
        else:
            console = Console(highlight=False)
            table(console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH))

    def fail(self, text: str) -> None:
        """End the run with an error."""
        if self._as_json:
            typer.echo(json.dumps({"command": self._name, "error": text}, indent=2))
        self.say(f"Error: {text}")
        self.finish(WRONG)

    def finish(self, code: int) -> None:
        """End the run with an exit code."""
        raise typer.Exit(code)

    @contextlib.contextmanager
    def progress(self, what: str, *, in_bytes: bool) -> Iterator[Callable[[int, int], None]]:
        """Show a bar if standard error is a terminal.

        Yields:
            A function to call with what is done and the total.
        """
        count = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        with Progress(
            *columns, console=self._errors, transient=True, disable=not self._errors.is_terminal
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def run_command(name: str, as_json: bool) -> Iterator[CommandRun]:
    """Run a command on the CPU. Warnings become notes, errors a sentence and an exit code."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    run = CommandRun(name, as_json)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: run.say(f"Note: {message}")
        try:
            yield run
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("LOHA_JAX_TRACEBACK"):
                raise
            run.fail(_message(error))


def _message(error: Exception) -> str:
    """Return what an error says, in terms of the command line and without a traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, re.error):
        return f"--only {error.pattern!r} is not a regular expression: {error}"
    if isinstance(error, ValueError | OSError | ImportError):
        return _ARGUMENT.sub(_as_option, str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return (
        f"loha-jax has a fault ({type(error).__name__}: {error}); LOHA_JAX_TRACEBACK=1 shows where"
    )


def _as_option(found: re.Match[str]) -> str:
    """Return `--only`, `--force` or `--to lora` for `only=`, `force=True` or `to="lora"`."""
    name, text = found.groups()
    try:
        value = ast.literal_eval(text or "True")
    except (SyntaxError, ValueError):  # it is part of a name in a file
        return found[0]
    if isinstance(value, dict):  # `names={regex: template}`
        value = "=".join(next(iter(value.items())))
    return f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
