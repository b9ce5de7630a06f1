"""Exchange with PyTorch: PEFT's adapter folders and state dicts, LyCORIS' files, base checkpoints and names."""

from loha_jax.untrusted import FileError

from .base_weights import load_base, save_merged
from .lora import load_lora, save_lora, to_lora
from .lycoris import save_lycoris, to_lycoris_state_dict
from .lycoris_load import load_lycoris
from .names import NameMap
from .peft import from_peft_state_dict, load_peft, save_peft, to_peft_state_dict

__all__ = [
    "FileError",
    "NameMap",
    "from_peft_state_dict",
    "load_base",
    "load_lora",
    "load_lycoris",
    "load_peft",
    "save_lora",
    "save_lycoris",
    "save_merged",
    "save_peft",
    "to_lora",
    "to_lycoris_state_dict",
    "to_peft_state_dict",
]
