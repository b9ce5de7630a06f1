"""Exchange with PyTorch: PEFT's adapter folders and state dicts."""

from .peft import from_peft_state_dict, load_peft, save_peft, to_peft_state_dict

__all__ = ["from_peft_state_dict", "load_peft", "save_peft", "to_peft_state_dict"]
