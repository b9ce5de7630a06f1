"""Exchange with PyTorch: PEFT's adapter folders and state dicts, LyCORIS' files, base checkpoints and names."""

from loha_jax.interop.exchange.base_weights import load_base
from loha_jax.interop.exchange.lora import load_lora, save_lora, to_lora
from loha_jax.interop.exchange.lycoris import save_lycoris, to_lycoris_state_dict
from loha_jax.interop.exchange.lycoris_load import load_lycoris
from loha_jax.interop.exchange.merged_checkpoint import save_merged
from loha_jax.interop.exchange.peft import from_peft_state_dict, load_peft, save_peft, to_peft_state_dict
from loha_jax.interop.names.name_map import NameMap

from loha_jax.runtime.untrusted import FileError

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
