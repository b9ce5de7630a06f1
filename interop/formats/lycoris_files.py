"""LyCORIS' and kohya's files, without a model: keys, prefixes and the tensors of each module.

A key is `<prefix><module>.<parameter>`. Most writers put underscores for the dots of the module's
name, which cannot be undone by splitting; `ModuleNames` finds the module among those that there
are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.matching import most_common

from ..disk.base_checkpoint import accumulator
from ..disk.tensor_files import safetensors_bytes
from .adapter_file import AdapterModule, times_core
from .lycoris_keys import group_keys
from .ranks import check_floating, misfit, rank_of

NATIVE_PREFIX = "lycoris_"
KOHYA_PREFIX = "lora_"
KOHYA_PARTS: Mapping[str, str] = {"lora_A": "lora_down", "lora_B": "lora_up"}
"""kohya's names of a LoRA's factors."""
NORM_PARTS: Mapping[str, str] = {"weight": "w_norm", "bias": "b_norm"}
"""LyCORIS' differences of a normalisation layer's parameters (`train_norm=True`)."""

_PREFIX = re.compile(
    r"lycoris_"
    r"|lora_(?:prior_)?(?:unet|te\d*|transformer)_"  # kohya, sd-scripts, OneTrainer
    r"|(?:lycoris|unet|transformer|(?:model\.)?diffusion_model)\."  # ComfyUI, diffusers' parts
    r"|text_encoder(?:_\d+)?\.|text_encoders\.[^.]+\.(?:transformer\.)?"
)
# A child of transformers 4's CLIPTextModel; in transformers 5 its children are the model's own.
_CLIP = "text_model"
_DTYPES = ("float16", "bfloat16", "float32")


def split_prefix(name: str) -> tuple[str, str]:
    """Split a module's name in a file into its component's prefix, or "", and the rest.

    Example:
        >>> split_prefix("lora_te1_encoder_layers_0_mlp_fc1")
        ('lora_te1_', 'encoder_layers_0_mlp_fc1')
    """
    found = _PREFIX.match(name)
    return ("", name) if found is None else (found[0], name[found.end() :])


def read_module(name: str, parts: Mapping[str, np.ndarray]) -> AdapterModule:
    """Return the checked factors of one module, in their own dtype.

    Args:
        name: of the module.
        parts: its tensors by `group_keys`' names, of a LoHa or of a LoRA.

    Returns:
        The module. Its alpha is r where the file has none, or 0. The core of a Conv1d has a
        trailing 1. A convolution's flat factors, which OneTrainer and A1111 write as
        `[out, r, 1, 1]` and `[r, in, *spatial]`, are matrices. The core of a LoRA (LyCORIS'
        `lora_mid`) is multiplied into `lora_A`, which is exact and keeps the rank.

    Raises:
        FileError: tensors are missing or do not fit each other, or alpha is no finite number.
    """
    is_lora = any(part.startswith("lora_") for part in parts)
    if is_lora and (both := [part for part in FACTOR_NAMES if part in parts]):
        raise FileError(f"{name} has the factors of a LoRA and {both[0]} of a LoHa")
    if is_lora:
        tensors = _lora_tensors(name, parts)
        r, in_shape = tensors["lora_A"].shape[0], tensors["lora_A"].shape[1:]
        in_shape = in_shape if len(in_shape) > 1 else None
    else:
        tensors, in_shape = _loha_tensors(
            name, {part: parts[part] for part in FACTOR_NAMES if part in parts}
        )
        r = rank_of(name, tensors)
    alpha = float(r)
    if "alpha" in parts:
        given = np.asarray(parts["alpha"])
        if given.size != 1 or not math.isfinite(given.item()):
            raise FileError(
                f"{name}.alpha should be one finite number, it is {given.tolist()!r:.80}"
            )
        alpha = float(given.item()) or alpha
    kind = "lora" if is_lora else "loha"
    return AdapterModule(name, kind, r, alpha, tensors, parts.get("dora_scale"), in_shape=in_shape)


def _loha_tensors(
    name: str, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], tuple[int, ...] | None]:
    """Return the factors in PEFT's shapes, and `(in, *spatial)` where those of the file show it."""
    result: dict[str, np.ndarray] = {}
    in_shapes: dict[str, tuple[int, ...]] = {}
    has_cores = "hada_t1" in tensors or "hada_t2" in tensors
    for part, tensor in tensors.items():
        result[part] = tensor
        if part.startswith("hada_t"):
            result[part] = tensor[..., None] if tensor.ndim == 3 else tensor
        elif tensor.ndim > 2 and (part.endswith("_a") or has_cores):
            if set(tensor.shape[2:]) == {1}:  # otherwise `rank_of` names it
                result[part] = tensor.reshape(tensor.shape[:2])
        elif tensor.ndim > 2 and tensor.size:
            in_shapes[part] = tensor.shape[1:]
            result[part] = tensor.reshape(tensor.shape[0], -1)
    if len(set(in_shapes.values())) > 1:
        raise misfit(name, {part: tensors[part] for part in in_shapes})
    core, w_b = tensors.get("hada_t1"), result.get("hada_w1_b")
    if core is not None and w_b is not None and core.ndim > 2 and w_b.ndim == 2:
        return result, (w_b.shape[1], *core.shape[2:])  # here a Conv1d's core has one such axis
    return result, next(iter(in_shapes.values()), None)


def _lora_tensors(name: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `lora_A [r, in, *spatial]` and `lora_B [out, r, 1, ...]` of a LoRA."""
    if missing := [f"{part} ({other})" for part, other in KOHYA_PARTS.items() if part not in parts]:
        raise FileError(f"{name} lacks {', '.join(missing)}; it has {', '.join(parts)}")
    tensors = {part: parts[part] for part in (*KOHYA_PARTS, "lora_mid") if part in parts}
    check_floating(name, tensors)
    a, b, core = tensors["lora_A"], tensors["lora_B"], tensors.get("lora_mid")
    fits = a.ndim >= 2 and b.ndim >= 2 and set(b.shape[2:]) <= {1} and a.shape[0] == b.shape[1]
    fits = fits and all(0 not in tensor.shape for tensor in tensors.values())
    if core is not None and fits:
        fits = core.ndim >= 3 and core.shape[:2] == (len(a), len(a)) and set(a.shape[2:]) <= {1}
    if not fits:
        raise misfit(name, tensors)
    if core is not None:
        wide = accumulator(a.dtype)
        a = times_core(core.astype(wide), a.reshape(a.shape[:2]).astype(wide))
    return {"lora_A": a, "lora_B": b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2))}


class LycorisState(NamedTuple):
    """The content of a LyCORIS file.

    Attributes:
        tensors: by the file's keys.
        convolutions: the modules, as the file names them, that are convolutions.
    """

    tensors: dict[str, np.ndarray]
    convolutions: list[str]


def lycoris_state(
    modules: Iterable[AdapterModule], others: Mapping[str, np.ndarray], prefix: str | None
) -> LycorisState:
    """Return the content of a LyCORIS file.

    Args:
        modules: of kind "loha", with torch's names. A convolution has an `in_shape`.
        others: LyCORIS' differences, by `<module>.<part>`.
        prefix: of all keys. None keeps each module's own, and the keys of `others`.

    Raises:
        ValueError: two modules would have one name, since dots are written as underscores.
    """
    state = LycorisState({}, [])
    owners: dict[str, str] = {}

    def add(own: str, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        if owners.setdefault(own, name) != name:
            raise ValueError(f"{owners[own]} and {name} would both be {own!r} in the file")
        state.tensors.update({f"{own}.{part}": tensor for part, tensor in tensors.items()})

    for module in modules:
        own = module_key(module.prefix if prefix is None else prefix, module.name)
        if own in owners:
            raise ValueError(f"{owners[own]} and {module.name} would both be {own!r} in the file")
        add(own, module.name, _module_tensors(module))
        if "hada_t1" in module.tensors or math.prod((module.in_shape or ())[1:]) > 1:
            state.convolutions.append(own)
    for key, value in others.items():
        name, _, part = key.rpartition(".")
        add(name if prefix is None else module_key(prefix, name), name, {part: value})
    return state


def _module_tensors(module: AdapterModule) -> dict[str, np.ndarray]:
    """Return one module's tensors by LyCORIS' names: `read_module` the other way."""
    tensors = {"alpha": np.array(module.alpha, np.float32), **module.arrays}
    if len(module.in_shape or ()) == 2:  # a Conv1d's core has no trailing axis
        tensors |= {part: t[..., 0] for part, t in tensors.items() if part.startswith("hada_t")}
    return tensors


def in_dtype(state: Mapping[str, np.ndarray], dtype: DTypeLike | None) -> dict[str, np.ndarray]:
    """Return the tensors in another dtype; alphas stay float32, since rounding changes the scale.

    Args:
        state: by the file's keys.
        dtype: "float16", "bfloat16" or "float32", or None for what they are.

    Raises:
        ValueError: another dtype, or a value is too large for it.
    """
    if dtype is None:
        return dict(state)
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted.name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: LyCORIS' files hold {', '.join(_DTYPES)}")
    result: dict[str, np.ndarray] = {}
    for key, tensor in state.items():
        with np.errstate(over="ignore"):
            result[key] = tensor if key.endswith(".alpha") else tensor.astype(wanted)
        if np.isinf(result[key]).sum() > np.isinf(tensor).sum():
            raise ValueError(
                f"{key} has values that {wanted.name} cannot hold; choose another dtype"
            )
    return result


def module_key(prefix: str, name: str) -> str:
    """Return a module's name in a file: its dots are underscores if the prefix ends with one.

    Raises:
        ValueError: the prefix ends with neither.
    """
    if prefix and prefix[-1] not in "._":
        raise ValueError(
            f"prefix={prefix!r} should end with '_' (names with underscores) or '.' (dotted names)"
        )
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def file_bytes(
    state: Mapping[str, np.ndarray], metadata: Mapping[str, str], convolutions: Iterable[str]
) -> bytes:
    """Return the content of a file: the tensors, and metadata with their hash.

    Where keys are kohya's (`lora_…`), what user interfaces read of a network (`ss_network_dim`, …)
    is added if absent.

    Args:
        state: by the file's keys.
        metadata: strings for the header; hashes of a file that it comes from are left out.
        convolutions: the modules, as the file names them, that have a `conv_dim` of their own in
            kohya's scripts.
    """
    # Earlier hashes are stale.
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    data = safetensors_bytes(state, kept)
    if any(key.startswith(KOHYA_PREFIX) for key in state):
        body = data[8 + int.from_bytes(data[:8], "little") :]
        # As sd-scripts and A1111 hash a file. LyCORIS' own hash depends on an order of the tensors
        # that it does not store.
        hashed = {"sshs_model_hash": hashlib.sha256(body).hexdigest()}
        network = _network_metadata(state, frozenset(convolutions))
        data = safetensors_bytes(state, {**network, **kept, **hashed})
    return data


def _network_metadata(
    state: Mapping[str, np.ndarray], convolutions: frozenset[str]
) -> dict[str, str]:
    """kohya's description of a network, as far as the tensors show it."""
    modules = group_keys(state).modules
    parts_of = modules.values()
    of_kind: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for own, parts in modules.items():
        if "hada_w1_b" in parts:
            of_kind[own in convolutions].append((len(parts["hada_w1_b"]), parts["alpha"].item()))
    linear, conv = of_kind[False], of_kind[True]
    if not linear and not conv:
        return {}
    dora = [parts["dora_scale"] for parts in parts_of if "dora_scale" in parts]
    args = {"algo": "loha"}
    if conv:
        args["conv_dim"], args["conv_alpha"] = map(str, most_common(conv))
    args["use_tucker"] = str(any("hada_t1" in parts for parts in parts_of))
    if dora:
        args |= {"dora_wd": "True", "wd_on_output": str(any(len(d) > 1 for d in dora))}
    if any("w_norm" in parts or "b_norm" in parts for parts in parts_of):
        args["train_norm"] = "True"
    r, alpha = most_common(linear or conv)
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(r),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(args),
    }


class ModuleNames:
    """The modules of a model, found by the names that a file has for them.

    Args:
        names: the model's dotted module names.
    """

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)
        self._underscored: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._underscored.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, prefix: str, name: str) -> str | None:
        """Return the dotted name of a module, or None.

        Args:
            prefix: of its component; one that ends with a dot, or none, stands before a dotted
                name.
            name: in the file, after the prefix.

        Raises:
            ValueError: two modules have that name when their dots are underscores.
        """
        dotted = not prefix.endswith("_")
        other = name[len(_CLIP) + 1 :] if re.match(rf"{_CLIP}[._]", name) else f"{_CLIP}.{name}"
        for candidate in (name, other):
            if dotted and (own := self._names & {candidate, prefix + candidate}):
                return candidate if candidate in own else prefix + candidate
            if dotted and prefix:
                continue
            found = self._underscored.get(candidate.replace(".", "_"), ())
            if len(found) > 1:
                raise ValueError(
                    f"{prefix}{name} could be {' or '.join(found)}: the file writes their dots as "
                    "underscores"
                )
            if found:
                return found[0]
        return None
