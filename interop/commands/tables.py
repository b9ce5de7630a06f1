"""The tables that the command line prints, from plain results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FEW = 16
"""Up to so many modules have a row each; more are put together by kind."""

_KINDS = {
    "peft": "PEFT LoHa folder",
    "lora": "PEFT LoRA folder",
    "lycoris": "LyCORIS file",
    "kohya": "kohya file",
    "checkpoint": "safetensors checkpoint",
    None: "broken adapter",
}


def printable(text: str) -> str:
    """Return a text from an untrusted file without the characters that control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def show_inspection(console: Console, found: dict[str, Any], every: bool) -> None:
    """`inspect`."""
    _facts(console, _inspection_facts(found))
    if "modules" in found:
        _modules(console, found["modules"], every)
        if found["others"]:
            _table(
                console, ("other tensors", "shape", "dtype"), _tensor_rows(found["others"], every)
            )
    elif "tensors" in found:
        _table(console, ("tensor", "shape", "dtype"), _tensor_rows(found["tensors"], every))
    _list(console, "Broken", found["problems"], "red")
    _list(console, "Remarks", found["remarks"], "yellow")


def _inspection_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("path", found["path"]), ("kind", _KINDS[found["kind"]])]
    if "modules" in found:
        facts += [
            ("adapter", _kinds(found["kinds"])),
            ("rank", _several(found["ranks"])),
            ("alpha", _several(found["alphas"])),
            ("modules", str(len(found["modules"]))),
            ("‖ΔW‖ of all", _number(found["norm"])),
        ]
        config = found["config"]
        named = (
            "base_model_name_or_path",
            "task_type",
            "target_modules",
            "modules_to_save",
            "peft_version",
        )
        facts += [(name, _several(config[name])) for name in named if config.get(name)]
    if "files" in found:
        facts += [("files", _several(found["files"])), ("size", _size(found["bytes"]))]
    if "parameters" in found:
        facts += [("dtype", _several(found["dtypes"])), ("parameters", f"{found['parameters']:,}")]
        facts += [(f"metadata {key}", value[:200]) for key, value in found["metadata"].items()]
    return facts


def _kinds(kinds: dict[str, int]) -> str:
    """Return the kinds of a file's modules, with their numbers if there are several."""
    return (
        ", ".join(f"{n} {kind}" for kind, n in kinds.items()) if len(kinds) > 1 else "".join(kinds)
    )


def _modules(console: Console, modules: Sequence[dict[str, Any]], every: bool) -> None:
    head = ("module", "r", "alpha", "shape", "form", "dtype", "parameters", "‖ΔW‖")
    if every or len(modules) <= _FEW:
        rows = [(m["name"], *_kind(m), f"{m['parameters']:,}", _number(m["norm"])) for m in modules]
        _table(console, head, rows)
        return
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for m in modules:
        groups.setdefault(
            (re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "*", m["name"]), *_kind(m)), []
        ).append(m)
    rows = []
    for key, group in groups.items():
        norms = [m["norm"] for m in group if m["norm"] is not None]
        middle = (
            f"{_number(min(norms))} … {_number(statistics.median(norms))} … {_number(max(norms))}"
            if norms
            else "-"
        )
        rows.append(
            (key[0], str(len(group)), *key[1:], f"{sum(m['parameters'] for m in group):,}", middle)
        )
    _table(console, ("modules", "number", *head[1:-1], "‖ΔW‖ least … median … most"), rows)
    console.print("--all shows every module.", style="dim")


def _kind(module: dict[str, Any]) -> tuple[str, ...]:
    form = f"{module['form']} + DoRA" if module["dora"] else module["form"]
    return (
        str(module["r"]),
        f"{module['alpha']:g}",
        f"{module['rows']} x {module['columns']}",
        form,
        module["dtype"],
    )


def _tensor_rows(tensors: Sequence[dict[str, Any]], every: bool) -> list[tuple[str, ...]]:
    shown = tensors if every or len(tensors) <= _FEW else tensors[:_FEW]
    rows = [(t["name"], str(t["shape"]), t["dtype"]) for t in shown]
    return (
        rows
        if len(shown) == len(tensors)
        else [*rows, (f"… and {len(tensors) - len(shown)} more (--all)", "", "")]
    )


def show_conversion(console: Console, result: dict[str, Any]) -> None:
    """`convert`."""
    _facts(
        console,
        [
            ("from", f"{result['source']} ({_KINDS[result['form']]})"),
            ("to", f"{result['target']} ({result['to']})"),
            ("modules", str(len(result["modules"]))),
            ("rank", _several(sorted({m["r"] for m in result["modules"]}))),
        ],
    )
    errors = [m for m in result["modules"] if m["error"] is not None]
    if errors:
        rows = [
            (m["name"], str(m["r"]), f"{m['error']:.2e}" if m["error"] else "exact") for m in errors
        ]
        _table(console, ("module", "rank", "relative error"), rows)
    _list(console, "Notes", result["notes"], "yellow")


def show_merge(console: Console, result: dict[str, Any]) -> None:
    """`merge`."""
    facts = [
        ("out", result["out"]),
        ("files", _several(result["files"])),
        ("size", _size(result["bytes"])),
        (
            "tensors",
            f"{result['merged']} merged, {result['replaced']} replaced, {result['copied']} as they were",
        ),
    ]
    if result["kept"]:
        facts.append(("kept of an earlier run", _several(result["kept"])))
    losses = result["losses"]
    if losses:
        worst = max(losses, key=lambda loss: loss["lost_share"])
        facts.append(
            ("rounding loses", f"at most {worst['lost_share']:.2%} of an update ({worst['name']})")
        )
    _facts(console, facts)
    rows = [
        (
            loss["name"],
            f"{'scaled ' * loss['scaled']}{loss['dtype']}",
            f"{loss['error']:.2e}",
            f"{loss['lost_share']:.1%}",
        )
        for loss in losses
        if loss["dtype"].startswith("float8")
    ]
    if rows:
        _table(
            console, ("tensor", "dtype", "relative error of the weight", "of the update lost"), rows
        )
    _list(console, "Notes", result["notes"], "yellow")


def show_difference(console: Console, found: dict[str, Any], every: bool) -> None:
    """`diff`."""
    for which, title in (("only_first", found["first"]), ("only_second", found["second"])):
        _list(console, f"Only in {printable(title)} ({len(found[which])})", found[which], "yellow")
    if found["kind"] == "adapters":
        rows = [_difference_row(m) for m in found["modules"] if every or m["different"] or _said(m)]
        if rows:
            _table(console, ("module", "r", "alpha", "dtype", "‖ΔW‖", "relative difference"), rows)
        others = [f"{other['name']}: {other['difference']}" for other in found["others"]]
        _list(console, "Other tensors", others, "yellow")
        same = [m for m in found["modules"] if not m["different"]]
        bits = sum(m["bit_equal"] for m in found["modules"])
        console.print(
            f"{len(same)} of {len(found['modules'])} common modules are equal, {bits} of them bit for bit."
        )
    else:
        rows = [
            (t["name"], _both(t["shape"]), _both(t["dtype"]), _number(t["max_difference"]))
            for t in found["tensors"]
            if every or t["different"]
        ]
        if rows:
            _table(console, ("tensor", "shape", "dtype", "largest difference"), rows)
        same = [t for t in found["tensors"] if not t["different"]]
        console.print(f"{len(same)} of {len(found['tensors'])} common tensors are equal.")


def _said(module: dict[str, Any]) -> bool:
    """Return whether rank, alpha or dtype differ: worth a row even if the updates are equal."""
    return any(module[key][0] != module[key][1] for key in ("r", "alpha", "dtype"))


def _difference_row(module: dict[str, Any]) -> tuple[str, ...]:
    if module["shape"][0] != module["shape"][1]:
        relative = f"shapes {_both(module['shape'])}"
    elif module["relative"] is None:
        relative = "not finite" if module["norm"] is None else "the first is zero"
    elif module["bit_equal"] and module["relative"] == 0:
        relative = "0 (bit-equal factors)"
    else:
        relative = f"{module['relative']:.3e}"
    if module["norms_differ"]:
        relative += ", DoRA norms differ"
    norm = _number(module["norm"])
    return (
        module["name"],
        _both(module["r"]),
        _both(module["alpha"]),
        _both(module["dtype"]),
        norm,
        relative,
    )


def _both(values: Sequence[Any]) -> str:
    first, second = (f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return first if first == second else f"{first} → {second}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def _several(values: Any) -> str:
    if isinstance(values, str):
        return values
    texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return ", ".join(texts if len(texts) <= _FEW else [*texts[:_FEW], f"… ({len(texts)} in all)"])


def _facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(printable(name), style="bold"), Text(printable(value)))
    console.print(table)


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _list(console: Console, title: str, items: Sequence[str], style: str) -> None:
    if items:
        console.print(Text(f"{title}:", style=style))
        for item in items:
            console.print(Text(f"  {printable(item)}"))
