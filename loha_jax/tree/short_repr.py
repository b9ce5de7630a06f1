"""Short texts for arrays, shapes and numbers, as the `repr` of an adapted leaf shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import jax

_KINDS = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def short_array(x: object) -> str:
    """Return dtype and shape of an array, a tracer or a shape, as `f32[4,8]`.

    Of a node that holds arrays, such as Flax' metadata boxes, it returns the type with its arrays;
    of anything else the `repr`.

    Example:
        >>> import jax.numpy as jnp
        >>> short_array(jnp.ones((4, 8))), short_array(jax.ShapeDtypeStruct((), jnp.bfloat16))
        ('f32[4,8]', 'bf16[]')
        >>> short_array((jnp.ones(3), None)), short_array(None), short_array(True)
        ('tuple(f32[3])', 'None', 'True')
    """
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        name = re.sub(r"^[a-z]+(?=\d)", lambda kind: _KINDS.get(kind[0], kind[0]), str(dtype))
        return f"{name}[{','.join(map(str, shape))}]"
    if jax.tree_util.all_leaves([x]) or x is None:
        return repr(x)
    return f"{type(x).__name__}({', '.join(map(short_array, jax.tree.leaves(x)))})"


def number_range(numbers: Sequence[float]) -> str:
    """Return the one number that all modules of a stack have, or the smallest and the largest.

    Example:
        >>> number_range((4, 4)), number_range((4, 2.5, 8))
        ('4', '2.5-8')
    """
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return "-".join(str(n) if isinstance(n, int) else f"{n:g}" for n in ends)


def rank_range(ranks: Sequence[int]) -> str:
    """Return the ranks of a stack's modules; modules that are not adapted have rank 0.

    Example:
        >>> rank_range((4, 4)), rank_range((0, 2, 4, 0))
        ('4', '2-4 in 2 of 4')
    """
    adapted = [r for r in ranks if r]
    if not adapted or len(adapted) == len(ranks):
        return number_range(ranks)
    return f"{number_range(adapted)} in {len(adapted)} of {len(ranks)}"


def adapter_list(adapters: Iterable[tuple[str, str]], active: Sequence[str]) -> str:
    """Return `name: description` of each adapter, with "(inactive)" where it does not count."""
    return ", ".join(
        f"{name}: {description}{'' if name in active else ' (inactive)'}"
        for name, description in adapters
    )
