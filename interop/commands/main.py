"""The command line `loha-jax`: inspect, convert, merge, extract and compare adapter files."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..merge import files as merge_files
from . import convert as conversion
from . import differences, inspection, tables
from . import extract as extraction
from .command_run import DIFFERENT, FINE, run_command
from .options import (
    DtypeOption,
    ForceOption,
    FormOption,
    JsonOption,
    NamesOption,
    OnlyOption,
    PrefixOption,
    check_finite,
    parse_names,
    parse_with,
)
from .plots import plot_modules

_EPILOG = (
    "Exit codes: 0 fine; 1 diff: they differ, inspect: something is broken; 2 wrong use or "
    "unreadable input; 130 interrupted. With --json, one JSON document goes to standard output and "
    "nothing else; messages and progress go to standard error."
)

app = typer.Typer(
    name="loha-jax",
    help="LoHa, LoRA and LyCORIS adapter files: inspect, convert, merge, extract and compare "
    "them. Works on files only, on the CPU and offline; no model is built.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(importlib.metadata.version("loha-jax"))
        raise typer.Exit


@app.command(epilog=_EPILOG)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="An adapter (folder or file), a base checkpoint, or a folder of Orbax: a "
            "checkpoint of loha_jax.checkpoint, tunix or MaxText."
        ),
    ],
    every: Annotated[
        bool, typer.Option("--all", help="A row for every module, not for every kind of module.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="A picture to write: the norm and the effective rank of each update by layer and "
            "kind of module. It needs matplotlib."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a file or folder.

    Shows rank, alpha, modules with their shapes, dtype and parameters, the norm of each update
    (without materialising it) and metadata; and what is broken: NaN or infinity, missing or
    misshapen tensors. Exit code 1 if something is.

    Example: loha-jax inspect adapter/ --plot updates.png
    """
    with run_command("inspect", as_json) as command:
        found = inspection.inspect_path(path, effective_ranks=plot is not None)
        if plot is not None:
            plot_modules(found.get("modules", []), plot)
        command.show(found, lambda out: tables.show_inspection(out, found, every))
        command.finish(DIFFERENT if found["problems"] else FINE)


@app.command(epilog=_EPILOG)
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter of any format.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder (or LyCORIS' or kohya's file) to write."),
    ],
    to: Annotated[conversion.Format, typer.Option("--to", help="The format to write.")],
    rank: Annotated[
        int | None, typer.Option(help="--to lora: at most this rank; exact (r²) by default.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="--to lora: the rank that keeps this share of the squared singular values."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The base model's checkpoint: its names say what underscores stand for, its "
            "shapes which modules are convolutions. Needed from LyCORIS or kohya to PEFT, and from "
            "PEFT for the cores of a Conv1d."
        ),
    ] = None,
    form: FormOption = "peft",
    prefix: PrefixOption = None,
    only: OnlyOption = None,
    names: NamesOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in another format.

    From LoHa to LoHa the factors stay the same, bit for bit. To and from LoRA the update does.

    An error names everything that the target cannot hold, and nothing is written. PEFT's LoHa has
    no Conv3d and no weight decomposition, LyCORIS no modules_to_save.

    Example: loha-jax convert style.safetensors style-peft/ --to peft --base unet/
    """
    with run_command("convert", as_json) as command:
        done = conversion.convert_adapter(
            source,
            target,
            to,
            rank=rank,
            energy=energy,
            base=base,
            form=form,
            prefix=prefix,
            only=only,
            names=parse_names(names or []),
            dtype=dtype,
            force=force,
        )
        result = {"source": str(source), "target": str(target), "to": to, **done.to_json()}
        command.show(result, lambda out: tables.show_conversion(out, result))


@app.command(epilog=_EPILOG)
def merge(
    base: Annotated[
        Path, typer.Argument(help="The base model's safetensors checkpoint: a file, or a folder.")
    ],
    adapter: Annotated[
        Path,
        typer.Argument(
            help="An adapter: PEFT's LoHa or LoRA folder, LyCORIS' or kohya's file or its folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it appears when it is whole.")],
    weight: Annotated[float, typer.Option(help="What ADAPTER's update is multiplied by.")] = 1.0,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="PATH[=WEIGHT]", help="One more adapter; may be given several times."
        ),
    ] = None,
    dtype: DtypeOption = None,
    only: OnlyOption = None,
    names: NamesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with adapters merged into it.

    Shards, index, key order and metadata are the base's; config and tokenizer are copied. Only a
    few rows of a tensor are in memory at a time. If a run is interrupted, the same command resumes
    from the files that are finished.

    Example: loha-jax merge Llama-2-7b-hf/ adapter/ merged/ --weight 0.8
    """
    with run_command("merge", as_json) as command:
        adapters = [(adapter, check_finite("--weight", weight)), *map(parse_with, more or [])]
        try:
            with command.progress("merging", in_bytes=True) as progress:
                report = merge_files.merge_checkpoint(
                    base,
                    adapters,
                    out,
                    dtype=dtype,
                    only=only,
                    names=parse_names(names or []),
                    force=force,
                    progress=progress,
                )
        except KeyboardInterrupt:
            command.say("Interrupted; the same command resumes from the files that are finished.")
            raise
        result = report.to_json()
        command.show(result, lambda console: tables.show_merge(console, result))


@app.command(epilog=_EPILOG)
def extract(
    tuned: Annotated[
        Path, typer.Argument(help="The tuned model's safetensors checkpoint: a file, or a folder.")
    ],
    base: Annotated[Path, typer.Argument(help="The base model's, with the same names.")],
    out: Annotated[Path, typer.Argument(help="The folder (or LyCORIS' or kohya's file) to write.")],
    rank: Annotated[int, typer.Option(help="The rank r of every module.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Updates are scaled by alpha/r; r by default.")
    ] = None,
    to: Annotated[
        extraction.Format, typer.Option("--to", help="The format to write.")
    ] = extraction.Format.peft,
    prefix: PrefixOption = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Only modules whose whole name in BASE matches."),
    ] = None,
    steps: Annotated[int, typer.Option(help="At most so many steps of L-BFGS a module.")] = 200,
    starts: Annotated[
        int, typer.Option(help="Starts to try for each module; the best result is kept.")
    ] = 1,
    dtype: DtypeOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the LoHa that comes closest to what fine-tuning has changed.

    Each changed matrix and convolution gets one. Its relative error stands beside that of the best
    LoRA with as many parameters, which is often the smaller one. What has no place is named.

    Example: loha-jax extract tuned/ base/ adapter/ --rank 8
    """
    with run_command("extract", as_json) as command:
        with command.progress("extracting", in_bytes=False) as progress:
            done = extraction.extract_adapter(
                tuned,
                base,
                out,
                r=rank,
                alpha=alpha,
                to=to,
                prefix=prefix,
                only=only,
                steps=steps,
                starts=starts,
                dtype=dtype,
                force=force,
                progress=progress,
            )
        result = {"tuned": str(tuned), "base": str(base), "out": str(out), "to": to}
        result |= done.to_json()
        command.show(result, lambda console: tables.show_extraction(console, result))


@app.command(epilog=_EPILOG)
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter, or a checkpoint.")],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Another one of the same kind, of any format.")
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest difference that counts as equal: relative for adapters' updates, "
            "absolute for checkpoints' values.",
        ),
    ] = 0.0,
    every: Annotated[bool, typer.Option("--all", help="Rows for what is equal too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters, module by module, or two checkpoints, tensor by tensor.

    For adapters, ‖ΔW_A − ΔW_B‖/‖ΔW_A‖ is computed without materialising ΔW. Names with underscores
    are matched with the dotted names of the other adapter. Exit code 1 if they differ.

    Example: loha-jax diff adapter/ style.safetensors --tolerance 1e-6
    """
    with run_command("diff", as_json) as command:
        check_finite("--tolerance", tolerance)
        with command.progress("comparing", in_bytes=False) as progress:
            found = differences.compare_paths(first, second, tolerance=tolerance, progress=progress)
        command.show(found, lambda out: tables.show_difference(out, found, every))
        command.finish(DIFFERENT if found["different"] else FINE)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # Windows' may not know ΔW
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    app(prog_name="loha-jax")


if __name__ == "__main__":
    main()
