"""The tables that the command line prints, from plain results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import rich.filesize
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
    "orbax": "checkpoint of a training run (Orbax)",
    None: "broken adapter",
}


_SHOWN = (
    *("base_model_name_or_path", "task_type", "target_modules"),
    *("modules_to_save", "peft_version"),
)
"""The fields of a PEFT configuration that are shown."""


def printable(text: str) -> str:
    """Return a text from an untrusted file without the characters that control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def show_inspection(console: Console, found: dict[str, Any], every: bool) -> None:
    """`inspect`."""
    _facts(console, _inspection_facts(found))
    if "modules" in found:
        _modules(console, found["modules"], every)
        _table(console, ("other tensors", "shape", "dtype"), _tensor_rows(found["others"], every))
    elif "tensors" in found:
        _table(console, ("tensor", "shape", "dtype"), _tensor_rows(found["tensors"], every))
    _list(console, "Broken", found["problems"], "red")
    _list(console, "Remarks", found["remarks"], "yellow")


def _inspection_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("path", found["path"]), ("kind", _KINDS[found["kind"]])]
    if "steps" in found:
        steps = _several(found["steps"]) or "-"
        facts += [
            ("step", str(found["step"])),
            ("steps", steps),
            ("items", _several(found["items"])),
        ]
    if "kinds" in found:
        facts += [("adapter", _kinds(found["kinds"]))]
    if found.get("modules"):
        facts += [
            ("rank", _several(found["ranks"])),
            ("alpha", _several(found["alphas"])),
            ("modules", str(len(found["modules"]))),
            ("‖ΔW‖ of all", _number(found["norm"])),
        ]
        config = found.get("config", {})
        facts += [(name, _several(config[name])) for name in _SHOWN if config.get(name)]
    if "files" in found:
        facts += [("files", _several(found["files"])), ("size", _size(found["bytes"]))]
    if found.get("parameters"):
        facts += [("dtype", _several(found["dtypes"])), ("parameters", f"{found['parameters']:,}")]
        facts += [
            (f"metadata {key}", value[:200]) for key, value in found.get("metadata", {}).items()
        ]
    return facts


def _kinds(kinds: dict[str, int]) -> str:
    """Return the kinds of a file's modules, with their numbers if there are several."""
    numbered = [f"{n} {kind}" for kind, n in kinds.items()]
    return ", ".join(numbered if len(kinds) > 1 else kinds)


def _modules(console: Console, modules: Sequence[dict[str, Any]], every: bool) -> None:
    head = ("module", "r", "alpha", "shape", "form", "dtype", "parameters", "‖ΔW‖")
    if every or len(modules) <= _FEW:
        rows = [(m["name"], *_kind(m), f"{m['parameters']:,}", _number(m["norm"])) for m in modules]
        _table(console, head, rows)
        return
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for m in modules:
        name = re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "*", m["name"])
        groups.setdefault((name, *_kind(m)), []).append(m)
    rows = []
    for (name, *kind), group in groups.items():
        norms = [m["norm"] for m in group if m["norm"] is not None]
        three = (min(norms), statistics.median(norms), max(norms)) if norms else (None,)
        parameters = f"{sum(m['parameters'] for m in group):,}"
        rows.append((name, str(len(group)), *kind, parameters, " … ".join(map(_number, three))))
    _table(console, ("modules", "number", *head[1:-1], "‖ΔW‖ least … median … most"), rows)
    console.print("--all shows every module.", style="dim")


def _kind(module: dict[str, Any]) -> tuple[str, ...]:
    form = f"{module['form']} + DoRA" if module["dora"] else module["form"]
    shape = f"{module['rows']} x {module['columns']}"
    return (str(module["r"]), f"{module['alpha']:g}", shape, form, module["dtype"])


def _tensor_rows(tensors: Sequence[dict[str, Any]], every: bool) -> list[tuple[str, ...]]:
    shown = tensors if every or len(tensors) <= _FEW else tensors[:_FEW]
    left = len(tensors) - len(shown)
    rows = [(t["name"], str(t["shape"]), t["dtype"]) for t in shown]
    return [*rows, (f"… and {left} more (--all)", "", "")] if left else rows


def show_conversion(console: Console, result: dict[str, Any]) -> None:
    """`convert`."""
    facts = [
        ("from", f"{result['source']} ({_KINDS[result['form']]})"),
        ("to", f"{result['target']} ({result['to']})"),
        ("modules", str(len(result["modules"]))),
        ("rank", _several(sorted({m["r"] for m in result["modules"]}))),
    ]
    _facts(console, facts)
    rows = [
        (m["name"], str(m["r"]), f"{m['error']:.2e}" if m["error"] else "exact")
        for m in result["modules"]
        if m["error"] is not None
    ]
    _table(console, ("module", "rank", "relative error"), rows)
    _list(console, "Notes", result["notes"], "yellow")


def show_extraction(console: Console, result: dict[str, Any]) -> None:
    """`extract`."""
    facts = [
        ("out", f"{result['out']} ({result['to']})"),
        ("modules", f"{len(result['modules'])} fitted, {result['unchanged']} unchanged"),
        ("rank", str(result["r"])),
        ("relative error", f"{result['error']:.4f}"),
        (f"best LoRA of rank {2 * result['r']}", f"{result['lora_error']:.4f}"),
    ]
    _facts(console, facts)
    rows = [
        (m["name"], f"{m['size']:.3g}", f"{m['error']:.4f}", f"{m['lora_error']:.4f}")
        for m in result["modules"]
    ]
    _table(console, ("module", "‖change‖", "relative error", "best LoRA's"), rows)
    by_reason: dict[str, list[str]] = {}
    for name, reason in result["left_out"].items():
        by_reason.setdefault(reason, []).append(name)
    left_out = [f"{_several(names)}: {reason}" for reason, names in by_reason.items()]
    _list(console, "Left out", left_out, "yellow")
    _list(console, "Notes", result["notes"], "yellow")


def show_merge(console: Console, result: dict[str, Any]) -> None:
    """`merge`."""
    tensors = "{merged} merged, {replaced} replaced, {copied} as they were".format_map(result)
    facts = [
        ("out", result["out"]),
        ("files", _several(result["files"])),
        ("size", _size(result["bytes"])),
        ("tensors", tensors),
    ]
    if result["kept"]:
        facts.append(("kept of an earlier run", _several(result["kept"])))
    losses = result["losses"]
    if losses:
        worst = max(losses, key=lambda loss: loss["lost_share"])
        lost = f"at most {worst['lost_share']:.2%} of an update ({worst['name']})"
        facts.append(("rounding loses", lost))
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
    head = ("tensor", "dtype", "relative error of the weight", "of the update lost")
    _table(console, head, rows)
    _list(console, "Notes", result["notes"], "yellow")


def show_difference(console: Console, found: dict[str, Any], every: bool) -> None:
    """`diff`."""
    for which, title in (("only_first", found["first"]), ("only_second", found["second"])):
        _list(console, f"Only in {printable(title)} ({len(found[which])})", found[which], "yellow")
    if found["kind"] == "adapters":
        kind, compared = "modules", found["modules"]
        head = ("module", "r", "alpha", "dtype", "‖ΔW‖", "relative difference")
        rows = [_difference_row(m) for m in compared if every or m["different"] or _said(m)]
        bits = f", {sum(m['bit_equal'] for m in compared)} of them bit for bit"
    else:
        kind, compared, bits = "tensors", found["tensors"], ""
        head = ("tensor", "shape", "dtype", "largest difference")
        rows = [
            (t["name"], _both(t["shape"]), _both(t["dtype"]), _number(t["max_difference"]))
            for t in compared
            if every or t["different"]
        ]
    _table(console, head, rows)
    others = [f"{other['name']}: {other['difference']}" for other in found.get("others", ())]
    _list(console, "Other tensors", others, "yellow")
    if not compared:
        console.print(f"There are no common {kind}: no name of one is in the other.")
        return
    same = sum(not item["different"] for item in compared)
    relative = "relative" if kind == "modules" else "absolute"
    equal = f"within {found['tolerance']:g} ({relative})" if found["tolerance"] else "equal"
    console.print(f"{same} of {len(compared)} common {kind} are {equal}{bits}.")


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
    pairs = (_both(module[key]) for key in ("r", "alpha", "dtype"))
    return (module["name"], *pairs, _number(module["norm"]), relative)


def _both(values: Sequence[Any]) -> str:
    first, second = (f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return first if first == second else f"{first} → {second}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(number: int) -> str:
    return rich.filesize.decimal(number, precision=2)


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
    if not rows:
        return
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
