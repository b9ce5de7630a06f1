"""Embeddings and output heads that an adapter saved with another number of rows than the base has.

Training that adds tokens resizes them (`resize_token_embeddings` in transformers), and PEFT saves
them whole: `modules_to_save=["embed_tokens", "lm_head"]`, or `save_embedding_layers`. A merged
checkpoint takes the new rows, and its config.json the new `vocab_size`, without which transformers
does not open it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(
    r"(?:.*\.)?(?:embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|shared|lm_head|embed_out"
    r"|output_projection|predictions(?:\.decoder)?)\.(?:weight|bias)"
)
Shapes = Mapping[str, tuple[int, ...]]


def is_resized(key: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Return whether an embedding or output head differs only in the size of the vocabulary.

    Example:
        >>> is_resized("model.embed_tokens.weight", (10, 4), (12, 4))
        True
        >>> is_resized("q_proj.weight", (10, 4), (12, 4))
        False
    """
    same_but_rows = len(old) == len(new) and old[1:] == new[1:] and old != new
    return same_but_rows and _NAMES.fullmatch(key) is not None


def resizing_problems(base: Shapes, resized: Shapes, config: Mapping[str, Any]) -> list[str]:
    """List the reasons why a checkpoint with some tensors resized is no model.

    Args:
        base: shapes of all tensors of the base.
        resized: the new shapes of some of them.
        config: the base's config.json, or {}.
    """
    if not resized:
        return []
    shown = ", ".join(f"{key} {list(base[key])} -> {list(new)}" for key, new in resized.items())
    before, after = {base[key][0] for key in resized}, {shape[0] for shape in resized.values()}
    if len(before) > 1 or len(after) > 1:
        return [f"the vocabulary was resized to different sizes: {shown}"]
    (old,) = before
    problems = []
    others = (key for key in base if key not in resized and _NAMES.fullmatch(key))
    if left := [key for key in others if base[key][0] == old]:
        problems.append(
            f"the adapter resized the vocabulary ({shown}) and does not hold {', '.join(left)}, "
            "which must have as many rows. Save both in PEFT, such as with "
            "modules_to_save=['embed_tokens', 'lm_head']"
        )
    said = vocabulary_sizes(config)
    if said and old not in said.values():
        problems.append(
            f"the adapter resized the vocabulary ({shown}), and config.json says {said}, "
            f"which is not the base's {old}"
        )
    return problems


def vocabulary_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of the vocabulary in a config, of the model or of its language model."""
    found: dict[str, Mapping[str, Any]] = {"vocab_size": config}
    for name, part in config.items():
        if isinstance(part, Mapping) and ("text" in name or "llm" in name):
            found[f"{name}.vocab_size"] = part
    sizes = {place: part.get("vocab_size") for place, part in found.items()}
    return {place: size for place, size in sizes.items() if isinstance(size, int)}


def with_vocabulary_size(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return a config in which every size of the vocabulary that was `old` is `new`."""
    result = dict(config)
    for place, size in vocabulary_sizes(config).items():
        part, _, _ = place.rpartition(".")
        if size == old and part:
            result[part] = {**config[part], "vocab_size": new}
        elif size == old:
            result["vocab_size"] = new
    return result


def resizing_note(base: Shapes, resized: Shapes, config: Mapping[str, Any]) -> str:
    """Write the note about a merge that resizes the vocabulary."""
    (key, new), *_ = resized.items()
    said = "which the config has to say (vocab_size)"
    if vocabulary_sizes(config):
        said = "as config.json says now"
    return (
        f"the vocabulary has {new[0]} rows instead of {base[key][0]} ({', '.join(resized)}), "
        f"{said}. The tokenizer is still the base's: put the one of the training into the folder"
    )


def resizing_hint(wanted: Shapes, given: Shapes) -> str:
    """Return how to load an adapter whose vocabulary was resized, or "".

    Args:
        wanted: shapes that the tree's parameters have, by torch name.
        given: those of the file.
    """
    resized = [n for n, old in wanted.items() if n in given and is_resized(n, old, given[n])]
    if not resized:
        return ""
    name = resized[0]
    old, new = wanted[name][0], given[name][0]
    how = f"cut the {old - new} rows off" if new < old else f"append {new - old} rows of zeros to"
    return (
        f"The adapter was trained with a vocabulary of {new}, the model has {old}: load it onto a "
        f"base of the new size. In transformers, `model.resize_token_embeddings({new})` and save; "
        f"in JAX, {how} the vocabulary's axis of {', '.join(resized)} (the file's own rows replace "
        "all of them). "
    )
