"""LoHa adapters written as PEFT folders, and read from them, bit for bit.

PEFT's tensors are the parameters of a `LoHaWeight`, so an export is a rename and an import a check.
The format is that of files which PEFT 0.21.2 wrote (tests/data/peft).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.processes import in_first_process
from loha_jax.targets.config import PEFT_VERSION, LoHaConfig
from loha_jax.targets.matching import exact_patterns, match_pattern
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.adapters import adapter_names, check_new_adapter
from loha_jax.tree.before_saving import check_before_saving, warn_of_scales
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight

from ..disk.atomic import folder_to_write, write_atomically
from ..disk.paired_files import write_together
from ..formats.adapter_file import errors_about
from ..formats.model_card import MODEL_CARD_NAME, model_card
from ..formats.peft_files import folder_contents, peft_file, peft_state, read_peft
from ..names.conv1d import is_conv1d
from .from_tree import (
    adapted_kernels,
    chosen_adapter,
    from_tree,
    required_kernels,
)
from .saved_modules import saved_tensors
from .to_tree import peft_to_tree
from .without_loha import refuses_misread, warn_of_kernels_without_loha

T = TypeVar("T")
N = TypeVar("N", bound=float)

# There is no pattern for single modules.
_SAME_FOR_ALL = ("use_effective_conv2d", "rank_dropout", "module_dropout")


@refuses_misread(kernels=False)
def save_peft(folder: str | Path, params: PyTree, *, adapters: Sequence[str] | None = None) -> None:
    """Write the adapters of a tree as PEFT's `save_pretrained` does.

    The adapter "default" goes to `folder`, any other one to `folder/<name>`: `adapter_config.json`
    and `adapter_model.safetensors` each, in the factors' dtype. Of a `LycorisConfig` the rank
    stabilisation is folded into alpha and the scalar into `hada_w1_a`. A model card, README.md, is
    put into `folder` where there is none. Config and weights of an adapter appear, or are replaced,
    together, whatever ends the process (docs/guide/saving.md). Of several processes all call this,
    and the first one writes.

    Args:
        folder: made if it is not there.
        params: an adapted tree with values (not under `jax.jit`).
        adapters: which ones; all by default.

    Raises:
        ValueError: the tree has no such adapter, or holds something PEFT's format cannot: a Conv3d,
            a weight decomposition, convolutions with and without cores, a transposed convolution in
            `modules_to_save`.
        NotADirectoryError: `folder` is a file.

    Warns:
        UserWarning: GPT-2's projections, transposed convolutions or embedding tables are adapted,
            which PEFT has no LoHa for; an adapter is untrained (its update is exactly zero), or
            scaled by `loha_jax.scale`; or a kernel has changed since the adapter was made, so that
            the file is not what was trained.

    Example:
        >>> import tempfile, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(folder, params)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    folder = folder_to_write(folder, "save_peft")
    known = adapter_names(params)
    chosen = known if adapters is None else tuple(adapters)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(
            f"You passed adapters={list(chosen)}, but the tree has no "
            f"{', '.join(map(repr, unknown))}; it has {list(known)}."
        )
    if not chosen:
        raise ValueError(
            "This tree has no adapter to save. Call `loha_jax.inject(params, config, key=...)` "
            "first."
        )
    _warn_of_gpt2(params, chosen)
    warn_of_kernels_without_loha(params, chosen, "PEFT", "load_peft")
    # All content is made before the first file is touched.
    configs = {name: peft_config(params, name).to_dict() for name in chosen}
    card = model_card(configs[chosen[0]]).encode()
    contents = {
        name: folder_contents(to_peft_state_dict(params, name), configs[name]) for name in chosen
    }
    check_before_saving(params, chosen)
    warn_of_scales(params, chosen)

    def write() -> None:
        for name in sorted(chosen, key=lambda name: name != "default"):  # which makes the folder
            target = folder if name == "default" else folder / name
            once = {MODEL_CARD_NAME: card} if target == folder else {}
            write_together(target, contents[name], once)
        if not (folder / MODEL_CARD_NAME).exists():  # no adapter "default"
            write_atomically(folder / MODEL_CARD_NAME, card)

    in_first_process(write, f"{folder} was not written")


@takes_model(changes=False)
def _warn_of_gpt2(params: PyTree, adapters: Sequence[str]) -> None:
    kernels = [kernel for name in adapters for kernel in adapted_kernels(params, name)]
    if found := dict.fromkeys(
        leaf.names[0] for p, leaf in kernels if is_conv1d(leaf.names[0], p, leaf.layout)
    ):
        warn_caller(
            f"{', '.join(found)} look like GPT-2's projections, transformers' Conv1D in PyTorch. "
            "PEFT has no LoHa for it and will not open this folder; `load_peft` will. For PyTorch, "
            "write a LoRA (`save_lora`), which PEFT opens, or merge the adapter (`save_merged`)."
        )


@refuses_misread(kernels=False)
@takes_model(changes=False)
def to_peft_state_dict(params: PyTree, adapter_name: str | None = None) -> dict[str, np.ndarray]:
    """Return PEFT's state dict of one adapter: `base_model.model.<module>.hada_w1_a` ….

    Args:
        params: an adapted tree with values.
        adapter_name: which adapter; may be left out where the tree has only one.

    Returns:
        numpy arrays (bfloat16 as `ml_dtypes.bfloat16`) in torch's orientation; a stacked kernel
        gives one set per module. `lm_head` and `embed_tokens` in the config's targets add their
        `base_layer.weight`, as in PEFT.

    Raises:
        ValueError: no such adapter; or a Conv3d or a weight decomposition, which PEFT has no LoHa
            for; or a transposed convolution in `modules_to_save`.
    """
    adapter_name = chosen_adapter(params, adapter_name)
    for _, leaf in adapted_kernels(params, adapter_name):
        _check_for_peft(leaf, adapter_name)
    file = from_tree(params, adapter_name, saved_tensors)
    return peft_state(file.modules.values(), file.others)


def _check_for_peft(leaf: LoHaWeight, adapter_name: str) -> None:
    """Raise ValueError for a kernel that PEFT has no LoHa for."""
    if (axes := len(leaf.layout.axes("k"))) > 2:
        raise ValueError(
            f"{leaf.label} is a convolution over {axes} axes, for which PEFT has no LoHa. Save it "
            "in LyCORIS' form (`save_lycoris`), merge it, or exclude it from the adapter."
        )
    if leaf.adapters[adapter_name].dora_scale is not None:
        raise ValueError(
            f"{leaf.label} has a weight decomposition, and PEFT has none for LoHa. Use "
            "`save_lycoris` or `save_lora`, or merge it (`merge`, `save_merged`)."
        )


@takes_model(changes=False)
def peft_config(params: PyTree, adapter_name: str | None = None) -> LoHaConfig:
    """Return the config that `save_peft` writes for an adapter.

    `inference_mode` is true, and patterns survive sorting.

    The heads that a task type saves (`classifier`, `score`, …) are in `modules_to_save`, each once:
    PEFT appends them again at every load. PEFT sorts `rank_pattern` and `alpha_pattern` when it
    writes them, although the first match wins. Where that would change a module's rank or alpha,
    patterns for the full names of the modules are written.

    Raises:
        ValueError: no such adapter, or layers that were made with their adapters differ in what
            PEFT has one setting for: convolutions with and without cores, or the dropouts.
    """
    adapter_name = chosen_adapter(params, adapter_name)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    settings: dict[str, dict[float, str]] = {field: {} for field in _SAME_FOR_ALL}
    kernels = required_kernels(params, adapter_name)
    config = kernels[-1][1].adapters[adapter_name].config
    for _, leaf in kernels:
        factors = leaf.adapters[adapter_name]
        for field in ("rank_dropout", "module_dropout"):
            settings[field].setdefault(getattr(factors.config, field), leaf.label)
        if any(size != 1 for size in leaf.layout.sizes("k", leaf.kernel.shape)):
            settings["use_effective_conv2d"].setdefault(factors.is_cp, leaf.label)
        for name, r, alpha in zip(leaf.names, factors.ranks, factors.alphas, strict=True):
            if r:
                ranks[name], alphas[name] = r, alpha
    for field, found in settings.items():
        if len(found) > 1:
            raise ValueError(
                f"PEFT's config has one {field} for all modules, the adapter {adapter_name} has "
                + ", ".join(f"{value} in {label}" for value, label in found.items())
                + ". Make the layers with the same setting, or keep them in adapters of their own."
            )
    config = config.as_peft(alphas.values())
    has_cores = next(iter(settings["use_effective_conv2d"]), config.use_effective_conv2d)
    return dataclasses.replace(
        config,
        use_effective_conv2d=bool(has_cores),
        inference_mode=True,
        peft_version=PEFT_VERSION,
        # None: the layers were made with their adapters (nnx.LoHaLinear), not targeted by name.
        target_modules=sorted(ranks) if config.target_modules is None else config.target_modules,
        modules_to_save=config.all_modules_to_save or None,
        rank_pattern=_sortable(config.rank_pattern, config.r, ranks),
        alpha_pattern=_sortable(config.alpha_pattern, config.alpha, alphas),
    )


def _sortable(patterns: Mapping[str, N], default: N, wanted: Mapping[str, N]) -> dict[str, N]:
    ordered = dict(sorted(patterns.items()))
    if all(match_pattern(name, ordered, default) == value for name, value in wanted.items()):
        return dict(patterns)
    return exact_patterns(wanted, default)


@takes_model(argument="base_params")
def load_peft(
    folder: str | Path,
    base_params: T,
    *,
    adapter_name: str = "default",
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
) -> T:
    """Add an adapter that PEFT (or `save_peft`) wrote to a tree of base parameters.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin`
            (which needs torch); or `pytorch_lora_weights.safetensors`, which diffusers'
            `save_lora_adapter` writes with the config inside.
        base_params: the base model's tree; an adapted one gets one more adapter. Nothing is copied.
        adapter_name: the name in the tree; it need not be the one in PEFT.
        names, layouts, model_type: as for `loha_jax.inject`.

    Returns:
        The adapted tree, the new adapter active. A `base_layer.weight` in the file replaces the
        kernel, as in PEFT.

    Raises:
        FileNotFoundError: the config or the weights are not there.
        interop.FileError: a file is corrupted or holds NaN, or it and the tree do not fit; one
            error names unexpected, missing and misshapen keys, with their numbers.

    Example:
        >>> import tempfile, loha_jax
        >>> base = {"q": {"kernel": jnp.ones((3, 3))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(folder, params)
        ...     load_peft(folder, base)["q"]["kernel"].adapters["default"].hada_w1_a.shape
        (3, 2)
    """
    check_new_adapter(base_params, adapter_name)
    file = read_peft(folder)
    with errors_about(file.path):
        config = LoHaConfig.from_dict(file.config)
        return peft_to_tree(file, base_params, config, adapter_name, names, layouts, model_type)


@takes_model(argument="base_params")
def from_peft_state_dict(
    state: Mapping[str, ArrayLike],
    config: LoHaConfig,
    base_params: T,
    *,
    adapter_name: str = "default",
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
) -> T:
    """Add an adapter from PEFT's state dict; see `load_peft`.

    Args:
        state: arrays by PEFT's keys, with or without the prefix "base_model.model." and the
            adapter's name at the end.
        config: the adapter's config.
        base_params: the base model's tree.
        adapter_name, names, layouts, model_type: as for `load_peft`.

    Raises:
        ValueError: unexpected, missing or misshapen keys, all in one error; nothing is changed.
    """
    file = peft_file(config, state, Path())
    config = LoHaConfig.from_dict(file.config)
    return peft_to_tree(file, base_params, config, adapter_name, names, layouts, model_type)
