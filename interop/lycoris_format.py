"""LyCORIS' and kohya's files as they are, without a model: keys, prefixes and the tensors of each module.

A key is `<prefix><module>.<parameter>`. Most writers put underscores for the dots of the module's name, which cannot be
undone by splitting; `ModuleNames` finds the module among those that there are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from loha_jax.init import FACTOR_NAMES

from .adapter_file import AdapterModule
from .factors import most_common, rank_of
from .files import FileError, safetensors_bytes

NATIVE_PREFIX = "lycoris_"
KOHYA_PREFIX = "lora_"
NORM_PARTS: Mapping[str, str] = {"weight": "w_norm", "bias": "b_norm"}
"""LyCORIS' differences of a normalisation layer's parameters (`train_norm=True`)."""

_PREFIX = re.compile(
    r"lycoris_|lora_(?:prior_)?(?:unet|te\d*|transformer)_"  # LyCORIS; kohya, sd-scripts, OneTrainer
    r"|(?:lycoris|unet|transformer|(?:model\.)?diffusion_model)\."  # ComfyUI, and what diffusers calls its parts
    r"|text_encoder(?:_\d+)?\.|text_encoders\.[^.]+\.(?:transformer\.)?"
)
_CLIP = "text_model"  # a child of transformers 4's CLIPTextModel; in transformers 5 its children are the model's own
_PEFT = re.compile(r"base_model\.model\.")
_PARTS = (*FACTOR_NAMES, "alpha", "dora_scale", *NORM_PARTS.values())
_DTYPES = ("float16", "bfloat16", "float32")
_OTHER_KINDS = (
    ("LoRA", r"\.lora_(?:up|down|mid|A|B)\b|\.lora\.(?:up|down)\b"),
    ("LoKr", r"\.lokr_\w+$"),
    ("(IA)³", r"\.on_input$"),
    ("OFT", r"\.oft_\w+(?:\.weight)?$"),
    ("GLoRA", r"\.(?:a1|a2|b1|b2|bm)\.weight$"),
    ("T-LoRA", r"\.lambda_layer$"),
    ("full-difference", r"\.diff(?:_b)?$"),
)


def split_prefix(name: str) -> tuple[str, str]:
    """A module's name in a file as its component's prefix, "" if none is known, and the rest.

    Example:
        >>> split_prefix("lora_te1_encoder_layers_0_mlp_fc1")
        ('lora_te1_', 'encoder_layers_0_mlp_fc1')
    """
    found = _PREFIX.match(name)
    return ("", name) if found is None else (found[0], name[found.end() :])


def group_keys(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a LyCORIS or kohya state dict by module (with its prefix) and parameter.

    Raises:
        FileError: the keys are PEFT's, another kind of adapter's, or unknown; or there are none.
    """
    if any(_PEFT.match(key) for key in state):
        raise FileError("these are PEFT's keys; `load_peft` opens the folder that holds them")
    for kind, pattern in _OTHER_KINDS:
        if found := next((key for key in state if re.search(pattern, key)), None):
            raise FileError(f"this is (at least in part) a {kind} adapter: {found!r}. A LoHa has hada_* tensors alone")
    modules: dict[str, dict[str, np.ndarray]] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        module, _, part = key.rpartition(".")
        if not module or part not in _PARTS:
            unknown.append(key)
        modules.setdefault(module, {})[part] = tensor
    if unknown:
        raise FileError(f"keys that are not those of a LoHa ({len(unknown)}): {', '.join(unknown[:20])}")
    if not modules:
        raise FileError("the file holds no tensor")
    return modules


def is_norm(parts: Mapping[str, np.ndarray]) -> bool:
    """Whether the parameters of a module are those of a normalisation layer."""
    return any(part in parts for part in NORM_PARTS.values())


def read_module(name: str, parts: Mapping[str, np.ndarray]) -> AdapterModule:
    """The factors of one module, checked; of any dtype.

    Args:
        name: of the module.
        parts: its tensors by LyCORIS' names. Its alpha is r where they have none, or 0; the core of a Conv1d gets its
            trailing 1.

    Raises:
        FileError: tensors are missing or do not fit each other, or alpha is no finite number.
    """
    tensors = {part: parts[part] for part in FACTOR_NAMES if part in parts}
    for part, tensor in tensors.items():
        if part.startswith("hada_t") and tensor.ndim == 3:
            tensors[part] = tensor[..., None]
        elif part.endswith("_b") and tensor.ndim > 2:  # [r, in, *spatial], which A1111 takes too
            tensors[part] = tensor.reshape(tensor.shape[0], -1)
    r = rank_of(name, tensors)
    alpha = float(r)
    if "alpha" in parts:
        given = np.asarray(parts["alpha"])
        if given.size != 1 or not math.isfinite(given.item()):
            raise FileError(f"{name}.alpha should be one finite number, it is {given.tolist()!r:.80}")
        alpha = float(given.item()) or alpha
    return AdapterModule(name, "loha", r, alpha, tensors, parts.get("dora_scale"))


def module_tensors(module: AdapterModule, *, one_axis: bool) -> dict[str, np.ndarray]:
    """One module's tensors by LyCORIS' names: `read_module` the other way.

    Args:
        module: what to write.
        one_axis: whether it is a Conv1d, whose core has no trailing axis in LyCORIS.
    """
    tensors = {
        part: tensor[..., 0] if one_axis and part.startswith("hada_t") else tensor
        for part, tensor in module.tensors.items()
    }
    if module.dora_scale is not None:
        tensors["dora_scale"] = module.dora_scale
    return {"alpha": np.array(module.alpha, np.float32), **tensors}


def in_dtype(state: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """The tensors in another dtype, but for alphas, which stay float32: half precision would change the scale.

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
    result = {}
    for key, tensor in state.items():
        with np.errstate(over="ignore"):
            result[key] = tensor if key.endswith(".alpha") else tensor.astype(wanted)
        if np.isinf(result[key]).sum() > np.isinf(tensor).sum():
            raise ValueError(f"{key} has values that {wanted.name} cannot hold; choose another dtype")
    return result


def module_key(prefix: str, name: str) -> str:
    """A module's name in a file: after a prefix that ends with an underscore, its dots are underscores too.

    Raises:
        ValueError: the prefix ends with neither.
    """
    if prefix and prefix[-1] not in "._":
        raise ValueError(f"prefix={prefix!r} should end with '_' (names with underscores) or '.' (dotted names)")
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def file_bytes(state: Mapping[str, np.ndarray], metadata: Mapping[str, str], convolutions: Iterable[str] = ()) -> bytes:
    """The content of a file: the tensors, and metadata whose hash is that of these tensors.

    Where keys are kohya's (`lora_…`), what user interfaces read of a network (`ss_network_dim`, …) is added if absent.

    Args:
        state: by the file's keys.
        metadata: strings for the header; hashes of a file that it comes from are left out.
        convolutions: the modules, as the file names them, that have a `conv_dim` of their own in kohya's scripts.
    """
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}  # stale, whatever they were
    data = safetensors_bytes(state, kept)
    if any(key.startswith(KOHYA_PREFIX) for key in state):
        body = data[8 + int.from_bytes(data[:8], "little") :]
        # As sd-scripts and A1111 hash a file. LyCORIS' own depends on an order of the tensors that it does not store.
        hashed = {"sshs_model_hash": hashlib.sha256(body).hexdigest()}
        data = safetensors_bytes(state, {**_network_metadata(state, frozenset(convolutions)), **kept, **hashed})
    return data


def _network_metadata(state: Mapping[str, np.ndarray], convolutions: frozenset[str]) -> dict[str, str]:
    """kohya's description of a network, as far as the tensors show it."""
    modules = group_keys(state)
    parts_of = modules.values()
    of_kind: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for own, parts in modules.items():
        if not is_norm(parts):
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
    if any(is_norm(parts) for parts in parts_of):
        args["train_norm"] = "True"
    r, alpha = most_common(linear or conv)
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(r),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(args),
    }


class ModuleNames:
    """Finds the modules that a file names, among those of a model.

    Args:
        names: the model's dotted module names.
    """

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)
        self._underscored: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._underscored.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, prefix: str, name: str) -> str | None:
        """The dotted name of a module, or None.

        Args:
            prefix: of its component; one that ends with a dot, or none, stands before a dotted name.
            name: in the file, after the prefix.

        Raises:
            ValueError: two modules have that name when their dots are underscores.
        """
        dotted = not prefix.endswith("_")
        for candidate in (name, *self._with_or_without_clip(name)):
            if dotted and (found := next((n for n in (candidate, prefix + candidate) if n in self._names), None)):
                return found
            if dotted and prefix:
                continue
            found = self._underscored.get(candidate.replace(".", "_"), ())
            if len(found) > 1:
                raise ValueError(
                    f"{prefix}{name} could be {' or '.join(found)}: the file writes their dots as underscores"
                )
            if found:
                return found[0]
        return None

    @staticmethod
    def _with_or_without_clip(name: str) -> tuple[str, ...]:
        for separator in "._":
            if name.startswith(_CLIP + separator):
                return (name[len(_CLIP) + 1 :],)
        return (f"{_CLIP}.{name}",)
