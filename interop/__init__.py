"""Exchange with PyTorch: adapters of PEFT and LyCORIS, base checkpoints and names."""

from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.runtime.untrusted import FileError

from .exchange.as_lora import as_lora
from .exchange.base_weights import load_base
from .exchange.lora import load_lora, save_lora, to_lora
from .exchange.lycoris import save_lycoris, to_lycoris_state_dict
from .exchange.lycoris_load import load_lycoris
from .exchange.merged_checkpoint import save_merged
from .exchange.peft import from_peft_state_dict, load_peft, save_peft, to_peft_state_dict
from .names.name_map import NameMap
from .updates.fitting import FittedLoHa, fit_loha

__all__ = [
    "FileError",
    "FittedLoHa",
    "NameMap",
    "RowTransform",
    "as_lora",
    "fit_loha",
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
