"""The checks of a config's fields: each returns the value as the config stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

from loha_jax.lowrank.initial_values import INIT_SCHEMES
from loha_jax.runtime.scalars import is_integer, plain_scalar
from loha_jax.runtime.untrusted import check_pattern

TASK_TYPES = (
    *("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM"),
    *("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
)

_LARGEST_RANK = 2**31 - 1
_LARGEST_ALPHA = 3.4e38  # float32


def checked_field(name: str, value: object) -> Any:
    """Return a field's value as `LoHaConfig` stores it: Python's numbers, tuples and frozensets.

    Raises:
        ValueError: no adapter can be made from the value.

    Example:
        >>> checked_field("target_modules", ["q", "v"]) == frozenset({"q", "v"})
        True
    """
    value = _plain(value)
    check = _CHECKS.get(name)
    return value if check is None else check(name, value)


def _plain(value: Any) -> Any:
    """Return a field's value with Python's own numbers for numpy's, in its lists and dicts too."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist()
    if type(value) in (list, tuple, set, frozenset):
        return type(value)([plain_scalar(item) for item in value])
    if type(value) is dict:
        return {key: plain_scalar(item) for key, item in value.items()}
    return plain_scalar(value)


def _wrong(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"`{name}` should {expected} but the value passed is {value!r}")


def _task_type(name: str, value: object) -> Any:
    if value is not None and value not in TASK_TYPES:
        raise ValueError(
            f"Invalid task type: {value!r}. Must be one of the following task types: "
            f"{', '.join(TASK_TYPES)}."
        )
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or is_integer(value)


def _rank(name: str, value: object) -> int:
    if not is_integer(value) or not 1 <= value <= _LARGEST_RANK:
        raise _wrong(name, "be a positive integer value", value)
    return value


def _alpha(name: str, value: object) -> float:
    if not _is_number(value) or not abs(value) <= _LARGEST_ALPHA:
        raise _wrong(name, "be a finite number", value)
    return value


def _probability(name: str, value: object) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise _wrong(name, "be a probability in [0, 1)", value)
    return value


def _regex(name: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise ValueError(f"`{name}` should hold strings but holds {pattern!r}")
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise ValueError(
            f"`{name}` holds {pattern!r}, which is not a regular expression: {error}"
        ) from None
    return pattern


def _pattern_table(check: Callable[[str, Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    """Return the check of a `{pattern: value}` field whose values pass `check`."""

    def table(name: str, value: object) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise _wrong(name, "be a dict of pattern: value", value)
        return {_regex(name, p): check(f"{name}[{p!r}]", v) for p, v in value.items()}

    return table


def _strings(name: str, values: object) -> list[str]:
    held = list(values) if isinstance(values, Iterable) else None
    if held is None or not all(isinstance(value, str) for value in held):
        raise _wrong(name, "be a list of strings", values if held is None else held)
    return held


def _module_names(name: str, value: object) -> str | frozenset[str] | None:
    if isinstance(value, str):
        return _regex(name, value) if value else value
    return None if value is None else frozenset(_strings(name, value))


def _modules_to_save(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise ValueError(
            f"`{name}` should be a list of module names but the value passed is the string "
            f"{value!r}; write [{value!r}]"
        )
    return tuple(_regex(name, entry) for entry in dict.fromkeys(_strings(name, value)))


def _layers_to_transform(name: str, value: object) -> object:
    if value is None or is_integer(value):
        return value
    indices = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(map(is_integer, indices)):
        raise _wrong(name, "hold integers", value)
    return indices


def _layers_pattern(name: str, value: object) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _regex(name, value)
    return tuple(_regex(name, pattern) for pattern in _strings(name, value))


def _init_weights(name: str, value: object) -> bool | str:
    if not isinstance(value, bool) and (not isinstance(value, str) or value not in INIT_SCHEMES):
        raise _wrong(name, f"be True, False or one of {sorted(INIT_SCHEMES)}", value)
    return value


def refuse_unknown_kernel(init_weights: bool | str, where: str, instead: str) -> None:
    """Check, where a kernel is created together with its factors, that they do not depend on it.

    Raises:
        ValueError: they do; the message begins with `where` and ends with what to do `instead`.
    """
    if init_weights == "abba":
        raise ValueError(
            f"{where}: init_weights='abba' starts from the singular vectors of the kernel, which "
            f"is created at the same time. Use 'calibrated', or {instead}."
        )


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "task_type": _task_type,
    "peft_type": lambda *_: "LOHA",
    "rank_pattern": _pattern_table(_rank),
    "alpha_pattern": _pattern_table(_alpha),
    "r": _rank,
    "alpha": _alpha,
    "rank_dropout": _probability,
    "module_dropout": _probability,
    "target_modules": _module_names,
    "exclude_modules": _module_names,
    "init_weights": _init_weights,
    "layers_to_transform": _layers_to_transform,
    "layers_pattern": _layers_pattern,
    "modules_to_save": _modules_to_save,
}
