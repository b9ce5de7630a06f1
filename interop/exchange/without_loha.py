"""Adapted leaves that formats of torch have no place for, or that torch would read wrongly."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar, cast

from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.default_layouts import is_named_lookup, is_table_leaf
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.transposed_doubt import bias_shape
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.named_tree import NamedTree

from .transposed import CONV1D, IN_TORCH, conv1d_copies, is_transposed

F = TypeVar("F", bound=Callable[..., Any])

_TABLE = re.compile(r"(?i).*emb.*|wte|wpe|shared|tokens?|table|relative_attention_bias")
_HEAD = re.compile(r"embed_out|unembed(ding)?")


class _Misread(NamedTuple):
    """What torch has no LoHa for, or would read wrongly.

    Attributes:
        turned: adapted kernels of transposed convolutions.
        copies: copies of such kernels.
        tables: adapted embedding tables that torch does not know as output heads.
    """

    turned: list[LoHaWeight]
    copies: list[SavedWeight]
    tables: list[LoHaWeight]


def warn_of_kernels_without_loha(
    params: PyTree, adapters: Collection[str] | None, format_name: str, loader: str
) -> None:
    """Warn of transposed convolutions and embedding tables that are adapted.

    Args:
        params: an adapted tree, or a model.
        adapters: the names of those that are written; None for all.
        format_name: in the message.
        loader: the function that reads the file nevertheless.
    """
    misread = _misread(params)
    merge = "merge the adapter (`loha_jax.merge`)"
    by_hand = f"{merge} and convert the weight by hand: {IN_TORCH}"
    head = f"{merge}. If an output head is tied to one, give its torch name with `names=`"
    for kind, kernels, advice in (
        ("transposed convolutions", misread.turned, by_hand),
        ("embedding tables", misread.tables, head),
    ):
        if found := [leaf.label for leaf in kernels if _is_written(leaf, adapters)]:
            warn_caller(
                f"{format_name} has no LoHa for {kind} ({', '.join(found)}): only `{loader}` opens "
                f"this adapter. For PyTorch leave them out (`exclude_modules`), or {advice}."
            )


def refuses_misread(*, kernels: bool) -> Callable[[F], F]:
    """Decorate a writer of an adapter, so that it refuses what torch would read wrongly.

    That is a copy (`modules_to_save`) of a weight that torch keeps in another order: of a
    transposed convolution, or of GPT-2's `Conv1D`. Where `kernels` is true it is an adapter of a
    transposed convolution or of an embedding table too. The decorator stands outside of
    `takes_model`: the model's layers say which these are.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            given = signature.bind(*args, **kwargs).arguments
            names = given.get("adapters")
            if given.get("adapter_name") is not None:
                names = [given["adapter_name"]]
            _refuse_conv1d(conv1d_copies(given["params"]), names)
            misread = _misread(given["params"])
            _refuse_copies(misread, names)
            if kernels:
                _refuse_kernels(misread, names)
            return function(*args, **kwargs)

        return cast(F, wrapper)

    return decorate


def _refuse_conv1d(copies: list[SavedWeight], names: Collection[str] | None) -> None:
    for leaf in copies:
        if _is_written(leaf, names):
            raise ValueError(
                f"{leaf.label} is the weight of {CONV1D}; copies in files are [out, in]. Leave it "
                "out, or keep the adapter in a checkpoint (`loha_jax.checkpoint`)."
            )


def _refuse_copies(misread: _Misread, names: Collection[str] | None) -> None:
    for leaf in misread.copies:
        if _is_written(leaf, names):
            raise ValueError(
                f"{leaf.label} is the weight of a transposed convolution, or of Keras' depthwise "
                f"one (modules_to_save), and {IN_TORCH}. Leave it out, or keep the adapter in a "
                "checkpoint (`loha_jax.checkpoint`)."
            )


def _refuse_kernels(misread: _Misread, names: Collection[str] | None) -> None:
    for leaf in misread.turned:
        if _is_written(leaf, names):
            raise ValueError(
                f"{leaf.label} is a transposed convolution, which PEFT has no LoRA for: {IN_TORCH}."
                " Leave it out (`exclude_modules`), or merge the adapter."
            )
    for leaf in misread.tables:
        if _is_written(leaf, names):
            raise ValueError(
                f"{leaf.label} is an embedding table, for which PEFT's LoRA has tensors of another "
                "kind. Merge the adapter, or exclude it (`exclude_modules`). If an output head is "
                "tied to it, give the head's torch name to `inject` with `names=`."
            )


@takes_model(changes=False)
def _misread(params: PyTree, layouts: Layouts | None = None) -> _Misread:
    tree, found = NamedTree(params, None, layouts), _Misread([], [], [])
    for n in sorted(tree.kernels):
        leaf = tree.leaves[n]
        if isinstance(leaf, SavedWeight) and is_transposed(tree, n):
            found.copies.append(leaf)
        if not isinstance(leaf, LoHaWeight):
            continue
        if is_transposed(tree, n):
            found.turned.append(leaf)
        if _is_table(tree, n, leaf) and not _is_head(tree, n, leaf):
            found.tables.append(leaf)
    return found


def _is_table(tree: NamedTree, position: int, leaf: LoHaWeight) -> bool:
    """Return whether a kernel is an embedding table: by its layer, or by its name and axes."""
    path, name = tree.paths[position], tree.names[position]
    if name in tree.known.lookups or name in tree.known.own:
        return name in tree.known.lookups
    is_matrix = sorted(leaf.layout.word.replace("s", "")) == ["i", "o"]
    is_alone = bias_shape(path, tree.shape_at) is None
    return is_matrix and is_alone and (is_table_leaf(path) or is_named_lookup(path))


def _is_head(tree: NamedTree, position: int, leaf: LoHaWeight) -> bool:
    """Return whether torch knows a table as the output heads that are tied to it.

    Then `names` gave it other names than its own, and no table's.
    """
    ends = [name.rpartition(".")[2] for name in leaf.names if name != tree.names[position]]
    heads = [end for end in ends if _HEAD.fullmatch(end) or not _TABLE.fullmatch(end)]
    return len(heads) == len(leaf.names)


def _is_written(leaf: LoHaWeight | SavedWeight, adapters: Collection[str] | None) -> bool:
    held = leaf.copies if isinstance(leaf, SavedWeight) else leaf.adapters
    return adapters is None or bool({*adapters} & held.keys())
