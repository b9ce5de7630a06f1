"""The results as Markdown.

    python -m benchmarks.report FILE          the tables of a run, also of one that was cut off

Times are medians over the turns; "over" a method is the median of the ratios within a turn. FLOPs
of JAX methods are XLA's count with all turns of loops, those of PyTorch's are its own counter's, of
products and convolutions only.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.case import (
    AUTO,
    DENSE,
    FACTORED,
    FORWARD,
    FUSED,
    JAX_FROZEN,
    LYCORIS_BYPASS,
    LYCORIS_REBUILD,
    MERGED,
    PEFT_LOHA,
    PEFT_LORA,
    TORCH_FROZEN,
    TRAINING,
    frozen_of,
)
from benchmarks.runner import MEMORY
from benchmarks.workers import Record

MOST_TIME_OVER_FROZEN = 1.15
MOST_MEMORY_OVER_PEFT = 0.25
MOST_FLOPS_OVER_BEST = 1.10
MOST_TIME_OVER_BEST = 1.25
MOST_CORES_OF_OTHERS = 0.1


def report(run: dict[str, Any]) -> str:
    """All tables of a run, and the bars that it meets or misses."""
    records = run["records"]
    linear = [r for r in records if r["subject"] == "linear"]
    parts = []
    for kind in (FORWARD, TRAINING):
        if cells := [r for r in linear if r["kind"] == kind]:
            parts += [
                f"## One Linear layer, {kind}: counts",
                "FLOPs over the frozen base's; temporary MB more than the frozen base's.",
                table([_linear_counts(cell) for cell in cells]),
                f"## One Linear layer, {kind}: times",
                "Times over the frozen base's, JAX's and PyTorch's; auto's also over PEFT's LoHa.",
                table([_linear_times(cell) for cell in cells]),
            ]
    for record in records:
        title = f"## {record['case']}, {record['kind']}\n\n{_shape(record['shape'])}"
        if record["subject"] == "lifecycle":
            parts += [title, table(list(_operations(record["operations"])))]
        elif record["subject"] == "lora_conversion":
            parts += [title, table(list(_conversions(record["methods"])))]
        elif record["kind"] == MEMORY:
            parts += [title, table(list(_memory(record["methods"])))]
        elif record["subject"] != "linear":
            parts += [
                title,
                table(list(_methods(record["methods"]))),
                f"auto: {_strategies(record)}",
            ]
    judged = ["not on the tiny shapes of --quick"] if run["settings"]["quick"] else bars(records)
    parts += [
        "## Bars",
        "\n".join(f"- {line}" for line in judged) or "None of their cases was run.",
    ]
    about = run["machine"] | run["settings"] | {"other processes": _neighbours(records)}
    parts += ["## Machine", "\n".join(f"- {key}: {_plain(value)}" for key, value in about.items())]
    return "\n\n".join(parts)


# --- tables ---------------------------------------------------------------------------------------


def _linear_counts(cell: Record) -> Record:
    methods = cell["methods"]
    frozen = methods[JAX_FROZEN]

    def flops(name: str) -> str:
        return ratio(methods[name]["flops"] / frozen["flops"], 3)

    def extra_megabytes(name: str) -> str:
        return megabytes(methods[name]["temporary_bytes"] - frozen["temporary_bytes"])

    return {
        **cell["shape"],
        "auto is": _strategies(cell),
        "frozen GFLOP": number(frozen["flops"] / 1e9, 3),
        "auto": flops(AUTO),
        "factored": flops(FACTORED),
        "fused": flops(FUSED),
        "W + ΔW": flops(DENSE),
        "auto over best": ratio(cell["auto"]["flops_over_best"], 3),
        "auto MB": extra_megabytes(AUTO),
        "factored MB": extra_megabytes(FACTORED),
        "fused MB": extra_megabytes(FUSED),
        "W + ΔW MB": extra_megabytes(DENSE),
    }


def _linear_times(cell: Record) -> Record:
    methods = cell["methods"]

    def over(name: str, key: str = "over_frozen") -> str:
        return ratio(methods.get(name, {}).get(key))

    def milliseconds(name: str) -> str:
        return number(1e3 * methods[name]["median"], 3) if name in methods else "-"

    merged = {"merged": over(MERGED)} if cell["kind"] == FORWARD else {}
    return {
        **cell["shape"],
        "JAX frozen ms": milliseconds(JAX_FROZEN),
        "auto": over(AUTO),
        "factored": over(FACTORED),
        "fused": over(FUSED),
        "W + ΔW": over(DENSE),
        **merged,
        "auto over best": ratio(cell["auto"]["time_over_best"]),
        "PyTorch frozen ms": milliseconds(TORCH_FROZEN),
        "PEFT LoHa": over(PEFT_LOHA),
        "LyCORIS rebuild": over(LYCORIS_REBUILD),
        "LyCORIS bypass": over(LYCORIS_BYPASS),
        "PEFT LoRA": over(PEFT_LORA),
        "auto over PEFT LoHa": over(AUTO, "over_peft_loha"),
    }


def _methods(methods: dict[str, Record]) -> Iterable[Record]:
    for name, method in methods.items():
        frozen = methods[frozen_of(name)]
        temporary = method.get("temporary_bytes")
        yield {
            "method": name,
            "trained": f"{method['trained_parameters']:,}",
            "GFLOP": number(method["flops"] / 1e9, 4),
            "over frozen": ratio(method["flops"] / frozen["flops"], 3),
            "temporary MB": megabytes(temporary),
            "median ms": number(1e3 * method["median"], 4),
            "time over frozen": ratio(method["over_frozen"], 3),
            "over PEFT LoHa": ratio(method.get("over_peft_loha"), 3),
            "turns": len(method["seconds"]),
        }


def _memory(methods: dict[str, Record]) -> Iterable[Record]:
    for name, method in methods.items():
        temporary, frozen = (methods[n].get("temporary_bytes") for n in (name, frozen_of(name)))
        yield {
            "method": name,
            "peak MB": method["error"] if "error" in method else megabytes(method["peak_bytes"]),
            "more than frozen": megabytes(extra_bytes(methods, name)),
            "of what PEFT LoHa adds": ratio(over_peft_memory(methods, name)),
            "XLA temporary MB": megabytes(temporary),
            "more than frozen's": megabytes(
                None if temporary is None or frozen is None else temporary - frozen
            ),
        }


def extra_bytes(methods: dict[str, Record], name: str) -> int | None:
    """A method's peak over its own frozen base's; None where one of them failed."""
    peak, frozen = (methods.get(n, {}).get("peak_bytes") for n in (name, frozen_of(name)))
    return None if peak is None or frozen is None else peak - frozen


def over_peft_memory(methods: dict[str, Record], name: str) -> float | None:
    """A method's addition to its frozen base's peak over that of PEFT's LoHa to its own."""
    extra, peft = extra_bytes(methods, name), extra_bytes(methods, PEFT_LOHA)
    return extra / peft if extra is not None and peft else None


def _operations(operations: dict[str, Record]) -> Iterable[Record]:
    for name, operation in operations.items():
        yield {
            "operation": name,
            "median s": number(operation["median"], 3),
            "runs": len(operation["seconds"]),
        }


def _conversions(methods: dict[str, Record]) -> Iterable[Record]:
    for name, method in methods.items():
        yield {
            "method": name,
            "rank": method["rank"],
            "median s": number(method["median"], 3),
            "peak MB": megabytes(method["peak_bytes"]),
            "error": f"{method['error']:.3g}",
            "error reported": "-" if method["reported"] is None else f"{method['reported']:.3g}",
            "runs": len(method["seconds"]),
        }


def _neighbours(records: Sequence[Record]) -> str:
    """Which figures not to trust: PyTorch's threads wait for each other and for neighbours."""
    busy = [r for r in records if (r.get("others_cores") or 0) > MOST_CORES_OF_OTHERS]
    if not busy:
        return f"they used at most {MOST_CORES_OF_OTHERS} cores in each record"
    cores = "; ".join(f"{r['others_cores']} cores in {r['case']}, {r['kind']}" for r in busy)
    return f"REPEAT ON AN IDLE MACHINE, they used {cores}"


# --- bars -----------------------------------------------------------------------------------------


def bars(records: Sequence[Record]) -> list[str]:
    """The project's own bars, and whether this run meets them."""
    lines = []
    for record in records:
        if record["case"] != "llama":
            continue
        methods = record.get("methods", {})
        if record["kind"] == TRAINING:
            over_frozen, over_peft = (
                methods[AUTO].get(key) for key in ("over_frozen", "over_peft_loha")
            )
            lines.append(
                _bar(
                    "llama, training step over the frozen base's",
                    over_frozen,
                    MOST_TIME_OVER_FROZEN,
                )
            )
            lines.append(_bar("llama, training step over PEFT LoHa's", over_peft, 1.0))
        elif record["kind"] == MEMORY:
            share = over_peft_memory(methods, AUTO)
            lines.append(
                _bar("llama, memory added, of what PEFT LoHa adds", share, MOST_MEMORY_OVER_PEFT)
            )
    for key, unit, most in (
        ("flops_over_best", "FLOPs", MOST_FLOPS_OVER_BEST),
        ("time_over_best", "time", MOST_TIME_OVER_BEST),
    ):
        cells = [r for r in records if r["subject"] == "linear" and "auto" in r]
        if not cells:
            continue
        outside = [cell for cell in cells if cell["auto"][key] > most]
        lines.append(
            f"auto within {most:.2f} x the best by {unit}: {len(cells) - len(outside)} of "
            f"{len(cells)} cells"
        )
        lines += [
            f"outside: {cell['kind']} {_shape(cell['shape'])}: {_strategies(cell)} is "
            f"{cell['auto'][key]:.2f} x {cell['auto']['best_by_' + unit.lower()]}"
            for cell in outside
        ]
    return lines


def _bar(what: str, value: float | None, most: float) -> str:
    if value is None:
        return f"{what}: not measured (at most {most})"
    return f"{what}: {value:.3f}, at most {most}: {'met' if value <= most else 'MISSED'}"


# --- formats --------------------------------------------------------------------------------------


def table(rows: Sequence[Record]) -> str:
    """Rows of equal keys as a Markdown table."""
    header = list(rows[0])
    cells = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(3, *(len(line[n]) for line in cells)) for n in range(len(header))]
    align: list[Callable[[str, int], str]] = [
        str.rjust if _is_number(c) else str.ljust for c in cells[1]
    ]
    rule = [
        f"{'-' * (w - 1)}:" if a is str.rjust else "-" * w
        for w, a in zip(widths, align, strict=True)
    ]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| " + " | ".join(a(c, w) for c, w, a in zip(line, widths, align, strict=True)) + " |"
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, at least all before the point; "-" for what was not measured."""
    if not value or math.isnan(value):
        return "-" if value is None or value else "0"
    return ratio(value, max(digits - 1 - math.floor(math.log10(abs(value))), 0))


def ratio(value: float | None, decimals: int = 2) -> str:
    """So many decimals; "-" for what was not measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def megabytes(count: float | None) -> str:
    """Bytes as MB."""
    return "-" if count is None else f"{count / 1e6:.1f}"


def _shape(shape: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape.items())


def _strategies(record: Record) -> str:
    strategies = record["auto"]["strategies"]
    if len(strategies) == 1:
        return next(iter(strategies))
    return ", ".join(f"{count} {strategy}" for strategy, count in strategies.items()) or "-"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    print(report(results.read(parser.parse_args().file)))


if __name__ == "__main__":
    main()
