"""LoRA: adapters written as PEFT LoRA folders, and read from them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from loha_jax.lowrank.initial_values import init_factors
from loha_jax.runtime.processes import in_first_process
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names, stack_names
from loha_jax.tree.adapters import check_new_adapter
from loha_jax.tree.before_saving import check_before_saving
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Target
from loha_jax.tree.text_table import text_table

from ..disk.atomic import file_to_write, folder_to_write, write_atomically
from ..disk.paired_files import write_together
from ..formats.adapter_file import AdapterModule, errors_about
from ..formats.lora_config import check_decomposed, exact_targets, loha_config, lora_config
from ..formats.lora_files import check_form, read_lora, single_file
from ..formats.lora_servers import LoraServer, find_server, server_option
from ..formats.model_card import MODEL_CARD_NAME, model_card
from ..formats.peft_files import folder_contents, peft_state
from ..formats.peft_names import PREFIX
from ..names.conv1d import is_conv1d
from ..updates.lora_conversion import cast_tensors, check_limits, loha_of, lora_of, of_one_rank
from .from_tree import (
    adapted_modules,
    chosen_adapter,
    module_factors,
    required_kernels,
)
from .saved_modules import saved_tensors
from .to_tree import peft_to_tree
from .without_loha import refuses_misread

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter as PEFT's files hold it.

    Attributes:
        tensors: by PEFT's keys.
        config: the content of `adapter_config.json`.
        errors: by module, the relative error of its update in the Frobenius norm; 0 where the LoRA
            is exact.
        server_option: what `save_lora(..., server=)` says the server has to be started with.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    errors: dict[str, float]
    server_option: str | None = None

    def __str__(self) -> str:
        rows = [("module", "rank", "relative error")]
        for name, error in self.errors.items():
            rank = self.tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0]
            rows.append((name, str(rank), f"{error:.2e}" if error else "exact"))
        start = [f"start the server with {self.server_option}"] if self.server_option else []
        return "\n".join([*text_table(rows, right=(1, 2)), *start])


@refuses_misread(kernels=True)
@takes_model(changes=False)
def to_lora(
    params: PyTree,
    adapter_name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    uniform_rank: bool = False,
    names: Names | None = None,
    groups: Mapping[str, int] | None = None,
) -> LoraAdapter:
    """Return the LoRA of an adapter: the exact one, of rank r², or the best one of a smaller rank.

    ΔW is never materialised: the factors of the exact LoRA are Khatri-Rao products of LoHa's, and
    the best approximation comes from an SVD of a matrix of r² rows. The scaling, as the adapter is
    now scaled (`loha_jax.scale`), is in the factors.

    Args:
        params: an adapted tree with values.
        adapter_name: which adapter; may be left out where the tree has only one.
        rank: at most this rank; exact where that is enough.
        energy: in (0, 1], instead of `rank`: the smallest rank of each module that keeps this share
            of the squared singular values.
        uniform_rank: give all modules the largest rank, with zeros, for readers that know only one;
            with convolutions in groups, the next rank that all groups divide.
        names: what was given to `inject`, if anything. The tree holds the torch names of adapted
            modules only; without the others' `target_modules` are full names.
        groups: `{regex: groups}` of the adapted convolutions with groups, by torch name
            (fullmatched). A tree does not show them, and the LoRA of such a convolution, taken for
            one without, does not open.

    Returns:
        Tensors, config and errors; `print` shows a table. A weight decomposition becomes PEFT's
        DoRA, of W plus the approximated update. `modules_to_save` and base weights come along as in
        `to_peft_state_dict`.

    Raises:
        ValueError: no such adapter; rank or energy are out of range; or something that PEFT's LoRA
            cannot hold: norms per input feature, a scaled weight decomposition, an embedding table,
            a transposed convolution.

    PEFT's LoRA knows neither a convolution's dilation nor its padding mode: one with either does
    not work there.

    Example:
        >>> import loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> base = {"q": {"kernel": jnp.ones((6, 5))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> print(to_lora(params))
        module  rank  relative error
        q          4           exact
    """
    adapter_name = chosen_adapter(params, adapter_name)
    check_limits(rank, energy)
    groups = dict(groups or {})
    found: dict[str, AdapterModule] = {}
    errors: dict[str, float] = {}
    used = set()
    kernels = required_kernels(params, adapter_name)
    for _, leaf in kernels:
        for module in _modules(leaf, adapter_name):
            pattern = next((p for p in groups if re.fullmatch(p, module.name)), None)
            if pattern is not None and module.in_shape is None:
                raise ValueError(
                    f"groups[{pattern!r}] names {module.name}, which is no convolution"
                )
            used.add(pattern)
            number = 1 if pattern is None else groups[pattern]
            found[module.name], errors[module.name] = lora_of(module, rank, energy, groups=number)
    if unused := [pattern for pattern in groups if pattern not in used]:
        raise ValueError(f"groups={unused} match no adapted module; these are {', '.join(found)}")
    check_decomposed(found)
    found = of_one_rank(found) if uniform_rank else found
    targets = _targets(params, adapter_name, names)
    tensors = peft_state(found.values(), saved_tensors(params, adapter_name))
    config = kernels[-1][1].adapters[adapter_name].config
    conv1d = any(is_conv1d(leaf.names[0], path, leaf.layout) for path, leaf in kernels)
    return LoraAdapter(tensors, lora_config(config, found, targets, fan_in_fan_out=conv1d), errors)


def _modules(leaf: LoHaWeight, adapter_name: str) -> list[AdapterModule]:
    """Return the modules of a kernel, with the scaling that they have now."""
    factors, result = leaf.adapters[adapter_name], []
    for module in module_factors(leaf, adapter_name):
        if factors.dora_scale is not None and factors.multiplier != 1:
            raise ValueError(
                f"{module.name} has a weight decomposition scaled by {factors.multiplier:g}, and "
                "PEFT's DoRA has no such number. Set it back, "
                f"loha_jax.scale(params, {{{adapter_name!r}: 1}}), or merge the adapter."
            )
        result.append(dataclasses.replace(module, alpha=module.alpha * factors.multiplier))
    return result


def _targets(params: PyTree, adapter_name: str, names: Names | None) -> list[str] | str:
    """Return `target_modules`: the shortest endings if all torch names are known, or full names."""
    tree = NamedTree(params, names, None)
    adapted: set[str] = set()
    others: set[str] = set()
    renamed = False
    for position in tree.weights:
        leaf = tree.leaves[position]
        if isinstance(leaf, LoHaWeight):
            if adapter_name in leaf.adapters:
                adapted.update(adapted_modules(leaf, adapter_name))
            others.update(leaf.names)
            stack = leaf.layout.sizes("s", leaf.kernel.shape)
            renamed |= leaf.names != stack_names(tree.names[position], stack, None)
            if names is not None and leaf.names != (given := tree.module_names(position, stack)):
                raise ValueError(
                    f"names= calls the module {leaf.names[0]} of this adapter {given[0]}. An "
                    "adapter keeps the names that it was made with: give names= to inject. "
                    "`loha-jax convert SRC DST --to lora --names 'REGEX=TEMPLATE'` renames the "
                    "modules of a saved one."
                )
        elif isinstance(leaf, SavedWeight):
            others.add(leaf.name.rpartition(".")[0])
        else:
            others.update(tree.possible_names(position))
    if renamed and names is None:
        return sorted(adapted)
    return exact_targets(adapted, others)


@refuses_misread(kernels=True)
@takes_model(changes=False)
def save_lora(
    path: str | Path,
    params: PyTree,
    *,
    adapter_name: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    uniform_rank: bool = False,
    form: str = "peft",
    prefix: str | None = None,
    server: str | None = None,
    dtype: DTypeLike | None = None,
    names: Names | None = None,
    groups: Mapping[str, int] | None = None,
) -> LoraAdapter:
    """Write an adapter as a LoRA: PEFT's folder, for servers too, or one file for image models.

    `adapter_config.json` and `adapter_model.safetensors` go into PEFT's folder, and a model card,
    README.md, where there is none. Config and weights appear, or are replaced, together. alpha is r
    in every module, so that the scaling is 1 also for a reader that ignores `alpha_pattern`;
    `target_modules` is a list of names.

    Args:
        path: the folder, made if it is not there; or the file.
        params, adapter_name, rank, energy, uniform_rank, names, groups: as for `to_lora`.
        form: "peft" for a folder; "kohya" or "diffusers" for a file. In diffusers' all modules have
            one rank, as its reader scales others wrongly.
        prefix: of a file's keys. kohya's default is "lora_unet_"; diffusers wants the model's part,
            such as "unet." or "transformer.", and MaxDiffusion "diffusion_model.".
        server: "vllm" or "sglang": refuse what this server would refuse, cut off or leave out. Not
            checked is, for vLLM, whether the model that it serves has modules of these names.
        dtype: of the LoRA's tensors; the factors' own by default.

    Returns:
        A report of what was written. `print` shows the error of each module, without that of
        rounding to `dtype`, and how to start the server.

    Raises:
        ValueError: see `to_lora`; or the server does not take this adapter, and of a rank that is
            too large for it, what the best of the largest loses; or a file has no place for
            `modules_to_save`, a weight decomposition or a convolution in groups; or `dtype` holds
            no floating-point numbers, or a value is too large for it.
        NotADirectoryError: `path` is a file, and `form` is "peft".
        IsADirectoryError: `path` is a folder, and `form` is another.

    Example:
        >>> import tempfile, loha_jax
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> base = {"q": {"kernel": jnp.ones((6, 5))}}
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(folder, params, rank=1).config["r"]
        1
    """
    check_form(form, prefix)
    path = (folder_to_write if form == "peft" else file_to_write)(path, "save_lora")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`dtype` should be one of floating-point numbers but the value passed is {dtype!r}"
        )
    uniform_rank = uniform_rank or form == "diffusers"
    make = functools.partial(
        to_lora, params, adapter_name, uniform_rank=uniform_rank, names=names, groups=groups
    )
    known = None if server is None else find_server(server)
    if known is not None and form != "peft":
        raise ValueError(f"`server` reads PEFT's folders, not `form={form!r}`")
    lora = make(rank=rank, energy=energy)
    if known is not None:
        option = server_option(known, lora.config, lora.tensors)
        _check_rank(known, lora, make)
        lora = dataclasses.replace(lora, server_option=option)
    if dtype is not None:
        lora = _in_dtype(lora, jnp.dtype(dtype))
    write = _writer(path, lora, form, prefix)
    check_before_saving(params, None if adapter_name is None else [adapter_name])
    in_first_process(write, f"{path} was not written")
    return lora


def _writer(path: Path, lora: LoraAdapter, form: str, prefix: str | None) -> Callable[[], None]:
    """Return the function that writes the adapter; its content is checked here."""
    if form == "peft":
        files = folder_contents(lora.tensors, lora.config)
        card = {MODEL_CARD_NAME: model_card(lora.config).encode()}  # an author's own stays
        return lambda: write_together(path, files, card)
    content = single_file(form, prefix, lora.tensors)
    return lambda: write_atomically(path, content)


def _check_rank(server: LoraServer, lora: LoraAdapter, make: Callable[..., LoraAdapter]) -> None:
    """Raise ValueError if the rank is more than the server takes, with what that many lose."""
    most = max(server.ranks, default=lora.config["r"])
    if lora.config["r"] > most:
        errors = make(rank=most).errors
        worst = max(errors, key=errors.__getitem__)
        raise ValueError(
            f"The LoRA has rank {lora.config['r']}, and {server.title} takes {most} at most. With "
            f"`rank={most}` the largest relative error of an update is {errors[worst]:.2g} "
            f"({worst}). Or merge the adapter."
        )


def _in_dtype(lora: LoraAdapter, dtype: jnp.dtype) -> LoraAdapter:
    """Return the adapter with its factors in another dtype; saved parameters keep the base's."""
    tensors = dict(lora.tensors)
    for name in lora.errors:
        key = f"{PREFIX}{name}."
        own = {k.removeprefix(key): t for k, t in tensors.items() if k.startswith(f"{key}lora_")}
        tensors |= {key + part: tensor for part, tensor in cast_tensors(name, own, dtype).items()}
    return dataclasses.replace(lora, tensors=tensors)


@takes_model(argument="base_params")
def load_lora(
    folder: str | Path,
    base_params: T,
    *,
    adapter_name: str = "default",
    key: jax.Array | None = None,
    names: Names | None = None,
    layouts: Layouts | None = None,
) -> T:
    """Add a LoRA (or DoRA) adapter that PEFT wrote to a tree of base parameters, as an equal LoHa.

    The first pair of LoHa's factors are `lora_B` and `lora_A`, of the same rank and alpha; the
    second makes a matrix of ones: the first column of `hada_w2_a` and the first row of `hada_w2_b`.
    Convolutions are flat.

    Args:
        folder: holds PEFT's `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, which
            needs torch).
        base_params: the base model's tree; an adapted one gets one more adapter. Nothing is copied.
        adapter_name: the name in the tree; it need not be the one in PEFT.
        key: JAX PRNG key. With it the other columns of `hada_w2_a` are random, as LoHa starts, and
            the second pair trains to more than a LoRA can hold. Without it they are zero, as are
            the rows of `hada_w2_b` that they meet: neither ever gets a gradient, and only the first
            column and row of the second pair train.
        names, layouts: as for `loha_jax.inject`.

    Returns:
        The adapted tree, the new adapter active. DoRA is a `LycorisConfig` with `weight_decompose`;
        LoRA's dropout has no counterpart and is left out.

    Raises:
        FileNotFoundError: the config or the weights are not there.
        ValueError: the file and the tree do not fit (one error names unexpected, missing and
            misshapen keys, with their numbers), or the adapter is more than factors: trained biases
            or embeddings, variants of LoRA, an initialisation that changes the base weights.

    Example:
        >>> import tempfile, loha_jax
        >>> base = {"q": {"kernel": jnp.ones((6, 5))}}
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"], init_weights=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora = save_lora(folder, loha_jax.inject(base, config, key=jax.random.key(0)))
        ...     params = load_lora(folder, base, key=jax.random.key(1))
        >>> params["q"]["kernel"].adapters["default"].hada_w1_a.shape
        (5, 4)
    """
    check_new_adapter(base_params, adapter_name)
    file = read_lora(folder)
    with errors_about(file.path):
        config, loha = loha_config(file.config, file.modules), functools.partial(_loha_of, key)
        return peft_to_tree(file, base_params, config, adapter_name, names, layouts, loha=loha)


def _loha_of(key: jax.Array | None, module: AdapterModule, target: Target) -> AdapterModule:
    """Return the LoHa of a LoRA; with a key, values that change nothing are random."""
    if key is None:
        return loha_of(module)
    shapes = {"hada_w2_a": (module.tensors["lora_B"].shape[0], module.r)}
    spare = init_factors(key, [module.name], shapes, True, target.factor_dtype)
    return loha_of(module, np.asarray(spare["hada_w2_a"][0]))
