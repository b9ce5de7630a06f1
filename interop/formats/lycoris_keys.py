"""The keys of LyCORIS', kohya's and diffusers' files: which tensors belong to which module, and of
what kind each is.

A file may mix kinds: LyCORIS' presets choose an algorithm per module, and user interfaces bundle
token embeddings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from loha_jax.lowrank.initial_values import FACTOR_NAMES
from loha_jax.runtime.untrusted import FileError

from .adapter_file import Foreign
from .peft_names import PREFIX

PARAMETER_OF = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", "diff_b": "bias"}
"""The parameter that each difference is added to.

`diff` and `diff_b` are those of a whole layer (`algo=full`).
"""

EMBEDDINGS = "bundle_emb."
"""The prefix of token embeddings, which A1111 and OneTrainer put into an adapter's file."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?:"
    rf"(?P<part>{'|'.join((*FACTOR_NAMES, 'alpha', 'dora_scale', *PARAMETER_OF))})"
    r"|(?P<b>lora_up|lora_B(?:\.default)?|lora\.up)\.weight"
    r"|(?P<a>lora_down|lora_A(?:\.default)?|lora\.down)\.weight"
    r"|(?P<mid>lora_mid)\.weight)"
)
_OTHER_KINDS = (
    ("LoKr", r"\.lokr_\w+$"),
    ("(IA)³", r"\.on_input$"),
    ("OFT", r"\.oft_\w+(?:\.weight)?$"),
    ("GLoRA", r"\.(?:a1|a2|b1|b2|bm)\.weight$"),
    ("T-LoRA", r"\.lambda_layer$"),
    ("variant of LoRA", r"\.lora[._]\w+.*$"),
)
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Groups:
    """The tensors of a file by kind.

    Attributes:
        modules: by module (with its prefix) and part: `hada_*`, `alpha`, `dora_scale`, `lora_A`,
            `lora_B`, `lora_mid`, and the differences of `PARAMETER_OF`.
        foreign: modules with a tensor that is none of these; all tensors of theirs are in here.
        embeddings: token embeddings, by key.
    """

    modules: dict[str, dict[str, np.ndarray]]
    foreign: dict[str, Foreign]
    embeddings: dict[str, np.ndarray]


def group_keys(state: Mapping[str, np.ndarray]) -> Groups:
    """Sort the tensors of a LyCORIS, kohya or diffusers state dict by module and kind.

    Raises:
        FileError: the keys are PEFT's, two of them are the same tensor of a module, or there are
            none.

    Example:
        >>> one = np.ones((3, 1))
        >>> groups = group_keys({"lora_unet_q.lora_up.weight": one, "lora_unet_k.lokr_w1": one})
        >>> list(groups.modules["lora_unet_q"]), groups.foreign["lora_unet_k"].kind
        (['lora_B'], 'LoKr')
    """
    if any(key.startswith(PREFIX) for key in state):
        raise FileError(
            "these are PEFT's keys, which a folder holds together with the settings (in Python: "
            "`load_peft` or, of a LoRA, `load_lora`)"
        )
    groups = Groups({}, {}, {})
    foreign_of: dict[str, dict[str, np.ndarray]] = {}
    keys_of: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in state.items():
        if key.startswith(EMBEDDINGS):
            groups.embeddings[key] = tensor
            continue
        module, part = _split(key)
        keys_of.setdefault(module, {})[key] = tensor
        parts = groups.modules.setdefault(module, {})
        if part is None:
            foreign_of.setdefault(module, {})[key] = tensor
        elif part in parts:
            raise FileError(f"{module} has two tensors that are its {part}, {key!r} is one of them")
        else:
            parts[part] = tensor
    for module, odd in foreign_of.items():
        del groups.modules[module]
        groups.foreign[module] = Foreign(_kind_of(odd), next(iter(odd)), keys_of[module])
    if not state:
        raise FileError("the file holds no tensor")
    return groups


def _split(key: str) -> tuple[str, str | None]:
    """Return a key's module, and which of its parts it is; None for one that is not known."""
    if found := _KEY.fullmatch(key):
        part = found["part"] or next(name for name in ("a", "b", "mid") if found[name])
        return found["module"], {"a": "lora_A", "b": "lora_B", "mid": "lora_mid"}.get(part, part)
    for _, pattern in _OTHER_KINDS:
        if other := re.search(pattern, key):
            return key[: other.start()], None
    return key.rpartition(".")[0] or key, None


def _kind_of(keys: Iterable[str]) -> str:
    return next(
        (kind for kind, pattern in _OTHER_KINDS for key in keys if re.search(pattern, key)), ""
    )


def are_adapters(keys: Iterable[str]) -> bool:
    """Return whether keys are those of an adapter of any kind, and not of a model's checkpoint."""
    keys = list(keys)
    if any(re.search(r"\.(?:hada_|lora[._]|lokr_|oft_)", key) for key in keys):
        return True
    # A model could have these too.
    small = ("on_input", "lambda_layer", "alpha", "dora_scale", *PARAMETER_OF)
    known = [key for key in keys if key.rpartition(".")[2] in small or EMBEDDINGS in key]
    return bool(keys) and len(known) == len(keys)


def foreign_message(foreign: Mapping[str, Foreign], known: Iterable[str]) -> str:
    """Return a message on the modules that LoHa cannot hold, and how to leave them out.

    Args:
        foreign: these modules.
        known: the other modules of the file.
    """
    unknown = [f.key for f in foreign.values() if not f.kind]
    named = [f"{own} is a {f.kind} adapter ({f.key!r})" for own, f in foreign.items() if f.kind]
    parts: list[str] = []
    if unknown:
        parts.append(f"keys that are not those of a LoHa ({len(unknown)}): {_shown(unknown)}")
    if named:
        parts.append(f"modules that a LoHa cannot hold ({len(named)}): {_shown(named)}")
    known = list(known)
    if not known:
        return "; ".join(parts)
    names = known if len(known) <= len(foreign) else list(foreign)
    pattern = "|".join(map(re.escape, names[:_SHOWN]))
    pattern = pattern if names is known else f"(?!({pattern})$).*"
    more = f", which names the first {_SHOWN} of {len(names)}" if len(names) > _SHOWN else ""
    return (
        f"{'; '.join(parts)}. Nothing is left out unasked: choose the modules to read by a regular "
        f"expression of their whole names in the file, `only=` {pattern!r}{more}"
    )


def _shown(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", … ({len(items)} in all)" if len(items) > _SHOWN else "")


def embeddings_note(embeddings: Mapping[str, np.ndarray]) -> str:
    """Return a note on the token embeddings that a file holds besides weights."""
    names = dict.fromkeys(key.removeprefix(EMBEDDINGS).partition(".")[0] for key in embeddings)
    return (
        f"the file also holds token embeddings ({_shown(list(embeddings))}). They are no weights "
        f"of the model, and are left out: prompts with {', '.join(map(repr, names))} need them "
        "loaded beside the text encoder"
    )
