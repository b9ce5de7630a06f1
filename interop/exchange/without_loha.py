"""Adapted kernels of kinds that no format for torch has a LoHa of."""

from __future__ import annotations

from collections.abc import Collection

from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight, leaves_by_path

from ..names.embedding_tables import is_embedding_table
from .transposed import IN_TORCH, transposed_kernels


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
    merge = "merge the adapter (`loha_jax.merge`)"
    by_hand = f"{merge} and convert the weight by hand: {IN_TORCH}"
    head = f"{merge}. If an output head is tied to one, give its torch name with `names=`"
    for kind, kernels, advice in (
        ("transposed convolutions", transposed_kernels(params), by_hand),
        ("embedding tables", _tables(params), head),
    ):
        if found := [
            leaf.label for leaf in kernels if adapters is None or {*adapters} & leaf.adapters.keys()
        ]:
            warn_caller(
                f"{format_name} has no LoHa for {kind} ({', '.join(found)}): only `{loader}` opens "
                f"this adapter. For PyTorch leave them out (`exclude_modules`), or {advice}."
            )


@takes_model(changes=False)
def _tables(params: PyTree) -> list[LoHaWeight]:
    kernels = [(p, leaf) for p, leaf in leaves_by_path(params) if isinstance(leaf, LoHaWeight)]
    return [leaf for path, leaf in kernels if is_embedding_table(path, leaf.names[0])]
