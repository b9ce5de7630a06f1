"""Exchange with PyTorch: PEFT's adapter folders and state dicts, and LyCORIS' files."""

from .lycoris import save_lycoris, to_lycoris_state_dict
from .peft import from_peft_state_dict, load_peft, save_peft, to_peft_state_dict

__all__ = [
    "from_peft_state_dict",
    "load_peft",
    "save_lycoris",
    "save_peft",
    "to_lycoris_state_dict",
    "to_peft_state_dict",
]
