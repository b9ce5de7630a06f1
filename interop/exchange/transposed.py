"""Weights that torch keeps with the inputs in front: transposed convolutions, GPT-2's `Conv1D`.

No format for torch has an adapter of a transposed convolution, whose weight is
`[in, out, *spatial]` there, with the taps reversed. Copies of both are in no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import PyTree

from loha_jax.targets.default_layouts import is_torchs_transposed, is_transposed_convolution
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import SavedWeight, leaves_by_path
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Saved

from ..names.conv1d import is_conv1d, looks_like_conv1d

IN_TORCH = "torch keeps their weights as [in, out, *spatial] with the taps reversed"
CONV1D = "GPT-2's Conv1D (modules_to_save), which torch keeps as [in, out]"


def is_transposed(tree: NamedTree, position: int) -> bool:
    """Return whether a kernel is a transposed convolution's: by its layer, its name or its axes."""
    path = tree.paths[position]
    if is_transposed_convolution(path) or tree.is_transposed_convolution(position):
        return True
    return is_torchs_transposed(path, tree.layout(position))


@takes_model(changes=False)
def conv1d_copies(params: PyTree) -> list[SavedWeight]:
    """Return the leaves with copies of the weights of GPT-2's `Conv1D`."""
    saved = [(p, leaf) for p, leaf in leaves_by_path(params) if isinstance(leaf, SavedWeight)]
    return [leaf for path, leaf in saved if is_conv1d_copy(leaf, path)]


def is_conv1d_copy(copy: Saved | SavedWeight, path: Sequence[str]) -> bool:
    """Return whether a copy (`modules_to_save`) is of the weight of GPT-2's `Conv1D`."""
    module = copy.name.rpartition(".")[0]
    return copy.layout is not None and is_conv1d(module, path, copy.layout)


def refuse_turned_copies(
    tree: NamedTree, saved: Mapping[int, Saved], *, fan_in_fan_out: bool
) -> None:
    """Raise ValueError for a file's copies of weights that torch keeps with the inputs in front.

    Args:
        tree: that the file is loaded onto.
        saved: what becomes of the file's copies, by position.
        fan_in_fan_out: whether the file says that its layers are of that kind (GPT-2's).
    """
    kernels = {n: own for n, own in saved.items() if n in tree.kernels}
    if found := [own.name for n, own in kernels.items() if is_transposed(tree, n)]:
        raise ValueError(
            f"{', '.join(found)} are of transposed convolutions, or of Keras' depthwise ones "
            f"(modules_to_save), and {IN_TORCH}: convert them by hand"
        )
    if found := [
        own.name
        for own in kernels.values()
        if is_conv1d_copy(own, own.path)
        or (fan_in_fan_out and looks_like_conv1d(own.name.rpartition(".")[0]))
    ]:
        raise ValueError(f"{', '.join(found)} are weights of {CONV1D}: transpose them by hand")
