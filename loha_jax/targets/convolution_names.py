"""Names of modules that say something of a convolution, and how torch orients its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMED_CONVOLUTION = re.compile(
    r"(?i)(?!.*(transpose|local|deconv)).*(conv(?!e|i|oy)|patch_embed).*"
)
NAMED_TRANSPOSED = re.compile(r"(?i).*(conv.*transpose|deconv).*")
# Either of the two: torch users call transposed convolutions so, and those behind a resize.
NAMED_UPSAMPLING = re.compile(
    r"(?i)(^|_)(up(s|sampl\w*|scal\w*|scores?|_?conv\w*)?|resize\w*|unpool\w*)(_|\d|$)|"
    r"(^|_)t(rans)?_?conv|conv_?(t|tr|trans|up|upsample)(_?\d+)?$"
)
NAMED_SMALLER = re.compile(r"(?i)(^|_)sr(_|\d|$)|down|reduc|patch|pool|stem|merg|squeeze")
PLAIN_CONVOLUTION = re.compile(r"(?i)(dw|short_|causal_|[qkv]_)?conv_?(\d?_?d)?(_?\d+)*")
IN_A_DECODER = re.compile(r"(?i)(^|_)up|decod|generat|deconv|transpose")

_TORCH_LEAF = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+)?(_reverse)?|(in|q|k|v)_proj_weight")


def is_torch_oriented(leaf: str) -> bool:
    """Return whether a leaf is named as in torch, Equinox and haliax.

    These keep weights as [out, in, *spatial].

    Example:
        >>> [is_torch_oriented(leaf) for leaf in ("weight", "weight_ih", "kernel", "w")]
        [True, True, False, False]
    """
    return _TORCH_LEAF.fullmatch(leaf) is not None


def own_name(path: Sequence[str]) -> str:
    """Return the last part of a leaf's module name that is no index.

    Example:
        >>> own_name(("stem", "conv", "0", "weight"))
        'conv'
    """
    return next((part for part in reversed(path[:-1]) if not part.isdigit()), "")


def without_numbers(path: Sequence[str]) -> list[str]:
    """Return a path in which layers of one kind have one name.

    Example:
        >>> without_numbers(("block", "1", "0", "weight"))
        ['block', '', '', 'weight']
    """
    return ["" if part.isdigit() else part for part in path]
