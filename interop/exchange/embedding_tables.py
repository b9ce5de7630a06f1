"""Adapted embedding tables: no format for torch has a LoHa of one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.default_layouts import is_named_lookup
from loha_jax.tree.adapters import adapter_names
from loha_jax.tree.containers import takes_model

from .from_tree import adapted_kernels

# Torch's names of a Linear whose weight is the embedding's.
_OUTPUT_HEADS = ("lm_head", "embed_out", "decoder")


def is_embedding_table(path: Sequence[str], name: str) -> bool:
    """Return whether a kernel is an embedding table.

    One that is known in torch by the output head that is tied to it is none.

    Args:
        path: of the kernel.
        name: of the module in torch.
    """
    is_table = path[-1] == "embedding" or is_named_lookup(path)
    return is_table and name.rpartition(".")[2] not in _OUTPUT_HEADS


@takes_model(changes=False)
def warn_of_tables(
    params: PyTree, adapters: Collection[str] | None, format_name: str, loader: str
) -> None:
    """Warn of adapted embedding tables, which a format has no LoHa for.

    Args:
        params: an adapted tree, or a model.
        adapters: the names of those that are written; None for all.
        format_name: in the message.
        loader: the function that reads the file nevertheless.
    """
    names = adapter_names(params) if adapters is None else adapters
    kernels = [kernel for name in names for kernel in adapted_kernels(params, name)]
    tables = [leaf for path, leaf in kernels if is_embedding_table(path, leaf.names[0])]
    if found := dict.fromkeys(leaf.label for leaf in tables):
        warn_caller(
            f"{', '.join(found)} are embedding tables, which {format_name} has no LoHa for: only "
            f"`{loader}` opens this adapter. For PyTorch leave them out (`exclude_modules`), train "
            "them whole (`modules_to_save`), or merge the adapter (`save_merged`). An output head "
            "that is tied to one is known by its torch name (`names=`)."
        )
