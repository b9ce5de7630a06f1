"""Embedding tables, and the output heads that are tied to them."""

from __future__ import annotations

from collections.abc import Sequence

from loha_jax.targets.default_layouts import is_named_lookup

# Torch's names of a Linear whose weight is the embedding's.
_OUTPUT_HEADS = ("lm_head", "embed_out", "decoder")


def is_embedding_table(path: Sequence[str], name: str) -> bool:
    """Return whether a kernel is an embedding table.

    One that is known in torch by the output head that is tied to it is none.

    Args:
        path: of the kernel.
        name: of the module in torch.

    Example:
        >>> is_embedding_table(("embed", "embedding"), "model.embed_tokens")
        True
        >>> is_embedding_table(("embed", "embedding"), "lm_head")
        False
    """
    is_table = path[-1] == "embedding" or is_named_lookup(path)
    return is_table and name.rpartition(".")[2] not in _OUTPUT_HEADS
