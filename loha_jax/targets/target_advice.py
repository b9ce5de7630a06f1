"""Advice if a config and a tree do not fit: misspelt targets, and objects that are no trees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.runtime.untrusted import fullmatch
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import KERNEL_LEAVES


def spelling_advice(targets: str | Iterable[str] | None, names: Sequence[str]) -> str:
    """Return the rule that entries of `target_modules` break, with the right spelling.

    Example:
        >>> spelling_advice(["q_proj.kernel"], ["layers.0.q_proj"])
        " 'q_proj.kernel': name the module, not the array in it: 'q_proj'."
        >>> "pass target_modules='.*q_proj'" in spelling_advice([".*q_proj"], ["layers.0.q_proj"])
        True
    """
    said = ""
    for target in [targets] if isinstance(targets, str) else sorted(targets or ()):
        right = re.sub(r"/~/|/", ".", target)
        right = re.sub(rf"(\\?\.)({'|'.join(KERNEL_LEAVES)})\$?$", "", right)
        rules = ["names are joined with dots, not slashes"] if "/" in target else []
        if right != re.sub(r"/~/|/", ".", target):
            rules.append("name the module, not the array in it")
        if rules:
            said += f" {target!r}: {' and '.join(rules)}: {right!r}."
        elif not isinstance(targets, str) and re.search(r"[*+?^$|()\[\]\\]", target):
            # A string matches whole names.
            whole = target if _matches(target, names) else f".*{target.lstrip('^')}"
            said += (
                f" {target!r} is a regular expression, and a list holds names or their endings: "
                f"pass target_modules={(whole if _matches(whole, names) else target)!r}."
            )
    return said


def _matches(pattern: str, names: Iterable[str]) -> bool:
    try:
        return any(fullmatch(pattern, name) for name in names)
    except (ValueError, re.error):
        return False


def require_named_leaves(params: PyTree) -> None:
    """Raise TypeError for an object that is no tree of named arrays.

    Such are a bare array, and a model of a framework whose models are no pytrees.

    Raises:
        TypeError: the message says what to pass instead.
    """
    leaves = jax.tree.leaves(params, is_leaf=_is_slot)
    if any("penzai" in _packages(leaf) for leaf in leaves):
        kind = "an unbound penzai model" if any(map(_is_slot, leaves)) else "penzai parameters"
        raise TypeError(
            f"This takes a tree of arrays, got {kind} (in a {type(params).__name__}). Pass "
            "pz.freeze_params(model), which is the model as a tree with its arrays"
        )
    if not jax.tree_util.all_leaves([params]):
        if any("torch" in _packages(leaf) for leaf in jax.tree.leaves(params)):
            raise TypeError(
                "This takes a tree of JAX arrays, got torch tensors: pass {name: "
                "jnp.asarray(t.detach().numpy()) for name, t in state_dict.items()}"
            )
        _refuse_functions(params)
        return
    kind = type(params).__name__
    if hasattr(params, "shape") and hasattr(params, "dtype"):
        raise TypeError(
            f"This takes a tree of arrays, got one array of shape {tuple(params.shape)}, which has "
            "no name to target. "
            'Give it one: {"name": {"kernel": array}}'
        )
    if "keras" in _packages(params):
        raise TypeError(
            "This takes a tree of arrays or a keras.Model (loha_jax.keras), got another "
            f"Keras model or layer ({kind}). Put it into a keras.Model, or pass "
            "{v.path: v.value for v in layer.trainable_variables} and compute with `stateless_call`"
        )
    if params is not None:
        hint = ""
        if hasattr(params, "params") or "flax" in _packages(params):
            hint = ": pass its `params`"
        if "torch" in _packages(params):
            kind = f"torch module ({kind})"
            hint = ": pass its arrays, {name: jnp.asarray(x) for name, x in state_dict}"
        raise TypeError(f"This takes a tree of arrays or an NNX model, got a {kind}{hint}")


def _refuse_functions(params: PyTree) -> None:
    """Raise TypeError for a tree of functions alone, such as a model that Haiku transformed."""
    leaves = jax.tree.leaves(params)
    if leaves and all(callable(leaf) and not hasattr(leaf, "shape") for leaf in leaves):
        raise TypeError(
            f"This takes a tree of arrays, got functions (in a {type(params).__name__}): pass the "
            "parameters that its `init` returns"
        )


def require_config(config: object) -> None:
    """Refuse what is no config of this library.

    Raises:
        TypeError: the message says how to make one of a dictionary or of PEFT's config.
    """
    if isinstance(config, LoHaConfig):
        return
    how = "LoHaConfig(r=8, target_modules=[...])"
    if isinstance(config, Mapping):
        how = "LoHaConfig.from_dict(config)"
    elif "peft" in _packages(config):
        how = "LoHaConfig.from_dict(config.to_dict())"
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    raise TypeError(f"config should be a loha_jax.LoHaConfig, got a {kind}: pass loha_jax.{how}")


def _is_slot(node: object) -> bool:
    """Return whether a node stands for a parameter that penzai has taken out of its model."""
    return type(node).__name__.endswith("Slot") and "penzai" in _packages(node)


def _packages(node: object) -> set[str]:
    return {kind.__module__.split(".")[0] for kind in type(node).__mro__}


_SCALE = re.compile(r"(kernel_|weight_|w_|input_)?scales?(_inv|_weight)?")


def scaled_kernel(
    path: Sequence[str], dtype: DTypeLike, shape_at: Mapping[tuple[str, ...], tuple[int, ...]]
) -> str | None:
    """Describe a float8 kernel that an array beside it multiplies, or return None.

    Args:
        path: of the kernel.
        dtype: of the kernel.
        shape_at: shapes of all leaves by path.

    Example:
        >>> scaled_kernel(("q", "kernel"), "float8_e4m3fn", {("q", "weight_scale_inv"): (1, 1)})
        'q.kernel is float8_e4m3fn, and q.weight_scale_inv looks like its scale'
    """
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating) or jax.numpy.dtype(dtype).itemsize > 1:
        return None
    parent = tuple(path[:-1])
    beside = (p for p in shape_at if p[:-1] == parent and _SCALE.fullmatch(p[-1]))
    if (scale := next(beside, None)) is None:
        return None
    return (
        f"{'.'.join(path)} is {jax.numpy.dtype(dtype)}, and {'.'.join(scale)} looks like its scale"
    )


QUANTISED_ADVICE = (
    "A quantised kernel is one leaf that holds its scale: loha_jax.ScaledArray(values, scale), an "
    "array of qwix or AQT, or one of your own type that loha_jax.register_quantised knows."
)
