"""`save_lycoris`: an adapter as a LyCORIS, kohya or ComfyUI file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.processes import in_first_process, on_host
from loha_jax.tree.before_saving import check_before_saving, warn_of_scales
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import SavedWeight

from ..disk.atomic import file_to_write, write_atomically
from ..formats.adapter_file import AdapterFile
from ..formats.lycoris_files import NATIVE_PREFIX, NORM_PARTS, file_bytes, in_dtype, lycoris_state
from .from_tree import adapted_kernels, adapted_names, chosen_adapter, from_tree, saved_leaves
from .row_transforms import rows_of_copy
from .without_loha import warn_of_kernels_without_loha


def save_lycoris(
    path: str | Path,
    params: PyTree,
    *,
    adapter_name: str | None = None,
    prefix: str = NATIVE_PREFIX,
    others: Mapping[str, PyTree] | None = None,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter as a LyCORIS, kohya or ComfyUI file.

    LyCORIS' `create_lycoris_from_weights` opens a file of the default prefix; kohya's scripts and
    most user interfaces want `lora_unet_`, `lora_te_`, …; ComfyUI takes dotted names after
    `diffusion_model.` or `transformer.` too.

    Args:
        path: of the file, in a folder that exists; replaced as a whole.
        params: an adapted tree with values (not under `jax.jit`).
        adapter_name: which adapter; may be left out where a tree has only one.
        prefix: what keys begin with. After one that ends with an underscore the dots of module
            names are written as underscores too, as LyCORIS and kohya do; after a dot, or with
            none, names stay dotted.
        others: further components of the file, trees by their prefix: `{"lora_te_":
            text_encoder_params}`.
        dtype: "float16", "bfloat16" or "float32" for everything but alpha, which is always float32
            (LyCORIS rounds it too); by default each tensor's own.
        metadata: strings for the file's header, over those that the adapter was loaded with. Where
            keys are kohya's, `ss_network_module`, `ss_network_dim`, `ss_network_alpha` and
            `ss_network_args` are added if absent. A hash (`sshs_model_hash`) is that of the tensors
            written, never an earlier one.

    Raises:
        ValueError: see `to_lycoris_state_dict`; or `metadata` holds something other than strings.
        IsADirectoryError: `path` is a folder.

    Warns:
        UserWarning: transposed convolutions or embedding tables are adapted, which LyCORIS has no
            LoHa for.

    Example:
        >>> import tempfile, loha_jax, jax.numpy as jnp
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["conv"])
        >>> base = {"conv": {"kernel": jnp.ones((3, 3, 3, 4, 5)), "bias": jnp.zeros(5)}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lycoris(f"{folder}/adapter.safetensors", params)
    """
    path, metadata = file_to_write(path, "save_lycoris"), dict(metadata or {})
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"A file's metadata are strings; metadata[{key!r}] is {value!r}")
    state: dict[str, np.ndarray] = {}
    convolutions: list[str] = []
    kept: Mapping[str, str] = {}
    for component_prefix, tree in [(prefix, params), *(others or {}).items()]:
        names = None if adapter_name is None else [adapter_name]
        warn_of_kernels_without_loha(tree, names, "LyCORIS", "load_lycoris")
        file = _file(tree, adapter_name)
        component = lycoris_state(file.modules.values(), file.others, component_prefix)
        if both := sorted(state.keys() & component.tensors.keys()):
            raise ValueError(
                f"Two components would both write {both[0]!r}; give each a prefix of its own in "
                "`others`"
            )
        state.update(in_dtype(component.tensors, dtype))
        convolutions += component.convolutions
        kept = {**file.metadata, **kept}
    content = file_bytes(state, {**kept, **metadata}, convolutions)
    for tree in (params, *(others or {}).values()):
        chosen = None if adapter_name is None else [adapter_name]
        check_before_saving(tree, chosen)
        warn_of_scales(tree, chosen)
    in_first_process(lambda: write_atomically(path, content), f"{path} was not written")


def to_lycoris_state_dict(
    params: PyTree,
    adapter_name: str | None = None,
    *,
    prefix: str = NATIVE_PREFIX,
    dtype: DTypeLike | None = None,
) -> dict[str, np.ndarray]:
    """Return LyCORIS' state dict of one adapter: `lycoris_<module>.hada_w1_a` … and `.alpha`.

    Args:
        params: an adapted tree with values.
        adapter_name: which adapter; may be left out where the tree has only one.
        prefix, dtype: as for `save_lycoris`.

    Returns:
        numpy arrays:

        - Factors in PEFT's shapes. The cores of a Conv1d have no trailing axis. `hada_w1_a` is
          multiplied by the scalar of `use_scalar`, as in LyCORIS.
        - `alpha`, a float32 scalar. Rank stabilisation is folded in.
        - `dora_scale`, the norms of a weight decomposition.
        - `w_norm` and `b_norm`, the differences of normalisation layers in `modules_to_save`.

    Raises:
        ValueError: no such adapter; two modules get one name, because dots are written as
            underscores; a value is too large for `dtype`; or the adapter has other
            `modules_to_save`, which LyCORIS has no place for.

    Example:
        >>> import loha_jax, jax.numpy as jnp
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"a": {"q": {"kernel": jnp.ones((3, 3))}}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> sorted(to_lycoris_state_dict(params))[:2]
        ['lycoris_a_q.alpha', 'lycoris_a_q.hada_w1_a']
    """
    file = _file(params, adapter_name)
    return in_dtype(lycoris_state(file.modules.values(), file.others, prefix).tensors, dtype)


@takes_model(changes=False)
def _file(params: PyTree, adapter_name: str | None) -> AdapterFile:
    """Return the adapter with LyCORIS' differences, and the metadata that it was loaded with."""
    adapter_name = chosen_adapter(params, adapter_name)
    kernels = adapted_kernels(params, adapter_name)
    given = [leaf.adapters[adapter_name].config.file_metadata for _, leaf in kernels]
    metadata = next((dict(own) for own in reversed(given) if own), {})
    return dataclasses.replace(from_tree(params, adapter_name, _differences), metadata=metadata)


def _differences(params: PyTree, adapter_name: str) -> dict[str, np.ndarray]:
    """Return the differences of an adapter's saved parameters, by LyCORIS' names.

    Raises:
        ValueError: a saved module is no normalisation layer.
    """
    saved: dict[str, dict[str, SavedWeight]] = {}
    for leaf in saved_leaves(params, adapter_name):
        module, _, parameter = leaf.name.rpartition(".")
        saved.setdefault(module, {})[parameter] = leaf
    adapted = adapted_names(params, adapter_name)
    result: dict[str, np.ndarray] = {}
    for module, leaves in saved.items():
        if not all(
            name in NORM_PARTS and leaf.layout is None and leaf.ndim == 1
            for name, leaf in leaves.items()
        ):
            raise ValueError(
                f"{module} is in modules_to_save, and LyCORIS' files have no place for it (only "
                "for normalisation layers with weight and bias). Use `save_peft`, or keep it in a "
                "checkpoint (`loha_jax.checkpoint`)."
            )
        for name, leaf in leaves.items():
            wide = float32_or_wider(leaf.original.dtype)
            copy, original = on_host(leaf.copies[adapter_name]), on_host(leaf.original)
            part = "diff_b" if module in adapted else NORM_PARTS[name]  # an adapted layer's bias
            change = copy.astype(wide) - original.astype(wide)
            result[f"{module}.{part}"] = (
                change if leaf.rows is None else rows_of_copy(leaf).to_torch(change)
            )
    return result
