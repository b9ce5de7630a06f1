"""`plot_modules`: the updates of an adapter as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LAYER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
"""A number that stands alone in a module's name, between dots, underscores or brackets."""

_PANELS = {"norm": "‖ΔW‖", "effective_rank": "effective rank of ΔW"}


def plot_modules(modules: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the norm and the effective rank of each update, a line for each kind of module.

    A module that belongs to no layer is a dotted line across the picture.

    Args:
        modules: as `inspect_path(…, effective_ranks=True)` describes them.
        path: the picture to write: .png, .svg, .pdf or what else matplotlib knows.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no module, or matplotlib does not write such files.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    if not modules:
        raise ValueError("There is no adapter to plot: no module has factors.")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (quantity, label) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        across = axes.get_yaxis_transform()
        for kind, points in lines(modules, quantity).items():
            if points[0][0] is not None:
                axes.plot(*zip(*points, strict=True), marker=".", label=kind)
                continue
            for _, value in points:  # several, if a file has a module of that name for each model
                axes.plot((0, 1), (value, value), ":", transform=across, label=kind)
        axes.set(xlabel="layer", ylabel=label, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def lines(
    modules: Sequence[Mapping[str, Any]], quantity: str
) -> dict[str, list[tuple[int | None, float]]]:
    """Return `(layer, value)` of the modules by kind: by their names without the layer's number.

    The layer is the first number in a name, None where there is none. Values that are not known are
    left out.

    Example:
        >>> modules = [{"name": f"layers.{n}.q", "norm": n / 2} for n in range(3)]
        >>> lines(modules, "norm")
        {'layers.*.q': [(0, 0.0), (1, 0.5), (2, 1.0)]}
    """
    found: dict[str, list[tuple[int | None, float]]] = {}
    for module in modules:
        number = _LAYER.search(module["name"])
        kind = _LAYER.sub("*", module["name"], count=1)
        if module[quantity] is not None:
            point = (int(number[0]) if number else None, module[quantity])
            found.setdefault(kind, []).append(point)
    return {kind: sorted(points) for kind, points in found.items()}
