"""LyCORIS' own files: what PEFT's format cannot hold, such as an adapted Conv3d, can be saved here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loha_jax.models import takes_model
from loha_jax.weight import LoHaWeight, SavedWeight, is_adapted

from .factors import chosen_adapter, module_factors
from .files import safetensors_bytes, write_atomically

PREFIX = "lycoris_"


@takes_model(changes=False)
def save_lycoris(
    path: str | Path, params: Any, *, adapter_name: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes an adapter as LyCORIS' `save_weights` does; `create_lycoris_from_weights` opens the file.

    Args:
        path: of the file, in a folder that exists; replaced as a whole.
        params: an adapted tree with values (not under `jax.jit`).
        adapter_name: which adapter; may be left out where the tree has only one.
        metadata: strings to put into the file's header.

    Raises:
        ValueError: see `to_lycoris_state_dict`.

    Example:
        >>> import tempfile, loha_jax, jax.numpy as jnp
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["conv"])
        >>> base = {"conv": {"kernel": jnp.ones((3, 3, 3, 4, 5)), "bias": jnp.zeros(5)}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lycoris(f"{folder}/adapter.safetensors", params)
    """
    state = to_lycoris_state_dict(params, adapter_name)
    write_atomically(Path(path), safetensors_bytes(state, metadata or {}))


@takes_model(changes=False)
def to_lycoris_state_dict(params: Any, adapter_name: str | None = None) -> dict[str, np.ndarray]:
    """LyCORIS' state dict of one adapter: `lycoris_<module, dots as underscores>.hada_w1_a` … and `.alpha`.

    Args:
        params: an adapted tree with values.
        adapter_name: which adapter; may be left out where the tree has only one.

    Returns:
        numpy arrays in PEFT's shapes, but for the cores of a Conv1d, which have no trailing axis; alpha as a float32
        scalar (LyCORIS itself rounds it to the factors' dtype).

    Raises:
        ValueError: no such adapter; two modules get one name, because LyCORIS writes dots as underscores; or the
            adapter has `modules_to_save`, which LyCORIS has no place for.

    Example:
        >>> import loha_jax, jax.numpy as jnp
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject({"a": {"q": {"kernel": jnp.ones((3, 3))}}}, config, key=jax.random.key(0))
        >>> sorted(to_lycoris_state_dict(params))[:2]
        ['lycoris_a_q.alpha', 'lycoris_a_q.hada_w1_a']
    """
    adapter_name = chosen_adapter(params, adapter_name)
    state: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    for leaf in jax.tree.leaves(params, is_leaf=is_adapted):
        if isinstance(leaf, SavedWeight) and adapter_name in leaf.copies:
            raise ValueError(
                f"{leaf.name} is in modules_to_save, and LyCORIS' files have no place for it. Use `save_peft`."
            )
        if not isinstance(leaf, LoHaWeight) or adapter_name not in leaf.adapters:
            continue
        for module in module_factors(leaf, adapter_name):
            key = PREFIX + module.name.replace(".", "_")
            if key in owners:
                raise ValueError(f"{owners[key]} and {module.name} would both be {key!r} in LyCORIS' file")
            owners[key] = module.name
            state[f"{key}.alpha"] = np.array(module.alpha, np.float32)
            for part, tensor in module.tensors.items():
                one_axis = part.startswith("hada_t") and len(leaf.layout.axes("k")) == 1
                state[f"{key}.{part}"] = tensor[..., 0] if one_axis else tensor
    return state
