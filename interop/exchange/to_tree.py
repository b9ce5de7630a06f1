"""`to_tree`: the modules of an adapter file onto a tree of base parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.inject import apply_plan, stack_factors
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Plan, Saved, Target, plan_injection

from ..formats.adapter_file import AdapterFile, AdapterModule
from ..formats.peft_files import peft_tensors
from ..formats.peft_names import PREFIX
from ..names.resized_vocabulary import resizing_hint
from ..updates.shapes import module_shapes
from .base_layers import base_layer_shapes, with_base_layers
from .mismatch import Mismatch
from .row_transforms import norms_of_kernel, with_kernel_rows
from .saved_modules import batch_counters, saved_shapes, with_counters, with_names_that_end_alike
from .transposed import refuse_turned_copies
from .wrapper_names import unwrapped

T = TypeVar("T")

NAMES_AND_LAYOUTS = (
    "The model's modules are named by its tree; pass `names=` where torch names them otherwise, "
    "`layouts=` where shapes are transposed"
)


def to_tree(
    modules: Mapping[str, AdapterModule],
    base_params: T,
    plan: Plan,
    adapter_name: str,
    *,
    loha: Callable[[AdapterModule, Target], AdapterModule],
    saved: Callable[[Saved, jax.Array], jax.Array],
) -> T:
    """Add the modules of a file to a tree as one more adapter.

    Args:
        modules: by torch name. They fit the plan.
        base_params: the base model's tree.
        plan: which module goes to which kernel.
        adapter_name: of the new adapter.
        loha: makes a module of the file the LoHa that its kernel gets, with torch's rows.
        saved: makes the copy of a leaf that the adapter holds whole, of the original.
    """

    def make_factors(target: Target, kernel: jax.Array) -> dict[str, jax.Array]:
        own = [
            with_kernel_rows(loha(modules[name], target), target).tensors if r else {}
            for name, r in zip(target.names, target.ranks, strict=True)
        ]
        return stack_factors(own, target)

    def make_extras(target: Target, config: LoHaConfig, kernel: jax.Array) -> dict[str, jax.Array]:
        return _stacked_norms(target, modules)

    return apply_plan(base_params, plan, adapter_name, make_factors, saved, make_extras)


def peft_to_tree(
    file: AdapterFile,
    base_params: T,
    config: LoHaConfig,
    adapter_name: str,
    names: Names | None,
    layouts: Layouts | None,
    model_type: str | None = None,
    *,
    loha: Callable[[AdapterModule, Target], AdapterModule] = lambda module, target: module,
) -> T:
    """Add an adapter in one of PEFT's formats, whose config says the targets, to a tree.

    Args:
        file: a LoHa or a LoRA.
        base_params: the base model's tree.
        config: of the LoHa that it becomes.
        adapter_name: of the new adapter.
        names, layouts, model_type: as for `inject`.
        loha: as for `to_tree`.

    Raises:
        ValueError: there are unexpected, missing or misshapen keys; one error names all.
    """
    # PEFT always writes inference_mode=true; an adapter in a tree can always be trained.
    config = dataclasses.replace(config, inference_mode=False)
    file, config = unwrapped(file, config, lambda: NamedTree(base_params, names, layouts).modules)
    plan = plan_injection(
        base_params,
        with_names_that_end_alike(config, file.others),
        names=names,
        layouts=layouts,
        model_type=model_type,
        torch_shapes=module_shapes(file.modules),
    )
    if any(own.layout for own in plan.saved.values()):
        turned = file.config.get("fan_in_fan_out") is True
        tree = NamedTree(base_params, names, layouts)
        refuse_turned_copies(tree, plan.saved, fan_in_fan_out=turned)
    base_layers = base_layer_shapes(plan, base_params)
    counters = batch_counters(plan, file.others)
    _check_fit(file, plan, base_layers, counters)

    def saved(leaf: Saved, original: jax.Array) -> jax.Array:
        dtype = jax.dtypes.canonicalize_dtype(original.dtype)
        given = file.others[leaf.name]
        if leaf.rows is not None:
            given = leaf.rows.from_torch(given, dtype=dtype)
        value = jnp.asarray(given).astype(dtype)
        return leaf.layout.fold(value, leaf.shape) if leaf.layout else value

    params = to_tree(file.modules, base_params, plan, adapter_name, loha=loha, saved=saved)
    params = with_base_layers(params, {n: t for n, t in file.others.items() if n in base_layers})
    # A counter of 0 is written without being noted.
    counts = {name: count for name in counters if (count := int(file.others[name]))}
    return with_counters(params, adapter_name, counts)


def _check_fit(
    file: AdapterFile,
    plan: Plan,
    base_layers: Mapping[str, tuple[int, ...]],
    counters: Collection[str],
) -> None:
    """Raise ValueError with all keys that a plan does not expect, that it lacks or that misfit.

    Args:
        file: a LoHa or a LoRA.
        plan: which module goes to which kernel.
        base_layers, counters: what the file may also hold.
    """
    wanted = _factor_shapes(plan, file.modules) | saved_shapes(plan.saved.values())
    allowed = {**wanted, **base_layers}
    arrays = [peft_tensors(module) for module in file.modules.values()] + [file.others]
    given = {name: np.shape(array) for own in arrays for name, array in own.items()}
    mismatch = Mismatch(
        unexpected=[file.keys[n] for n in given if n not in allowed and n not in counters],
        missing=[PREFIX + name for name in wanted if name not in given],
    )
    for name, shape in allowed.items():
        if name in given:
            mismatch.add_shape(file.keys[name], given[name], shape)
    mismatch.check(
        "the adapter and the model do not fit; nothing was loaded",
        f"{resizing_hint(allowed, given)}{prefix_hint(file.modules, plan)}{NAMES_AND_LAYOUTS}.",
    )


def prefix_hint(modules: Collection[str], plan: Plan) -> str:
    """Return what to do if all names of a file differ from the tree's by one prefix; else ""."""
    wanted = {name for target in plan.targets.values() for name in target.names}
    if not wanted or not modules or wanted & set(modules):
        return ""
    one, other = next(iter(modules)), next(iter(wanted))
    for name in wanted:
        prefix = name.removesuffix(one)
        if prefix.endswith(".") and all(prefix + module in wanted for module in modules):
            pattern = re.escape(prefix) + "(.*)"
            return (
                f"All names in the tree begin with {prefix!r}, those in the file do not: pass "
                f"names={{r'{pattern}': r'\\1'}}. "
            )
    for name in modules:
        prefix = name.removesuffix(other)
        if prefix.endswith(".") and all(prefix + module in modules for module in wanted):
            return (
                f"All names in the file begin with {prefix!r}, those in the tree do not: pass "
                f"names={{r'(.*)': r'{prefix}\\1'}}. "
            )
    return ""


def _factor_shapes(plan: Plan, modules: Mapping[str, AdapterModule]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all factors that a plan asks for, by PEFT's names."""
    is_lora = any(module.kind == "lora" for module in modules.values())
    shapes: dict[str, tuple[int, ...]] = {}
    for target in plan.targets.values():
        for name, r in zip(target.names, target.ranks, strict=True):
            if r:
                own = _lora_shapes(target, r, modules.get(name)) if is_lora else target.shapes(r)
                shapes |= {f"{name}.{part}": shape for part, shape in own.items()}
    return shapes


def _lora_shapes(
    target: Target, r: int, module: AdapterModule | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's LoRA; only the file shows a convolution's groups."""
    out, in_, *spatial = target.module_shape
    groups = module.r // module.tensors["lora_B"].shape[1] if module else 1
    ones = (1,) * len(spatial)
    shapes = {
        "lora_A.weight": (r, in_ * groups, *spatial),
        "lora_B.weight": (out, r // groups, *ones),
    }
    if module is not None and module.dora_scale is not None:
        shapes["lora_magnitude_vector"] = (1, out, *ones) if spatial else (out,)
    return shapes


def _stacked_norms(target: Target, modules: Mapping[str, AdapterModule]) -> dict[str, jax.Array]:
    """Return the norms of a kernel, `{"dora_scale": [*stack, …]}`; {} where it has none."""
    given = [modules[name].dora_scale if name in modules else None for name in target.names]
    first = next((norms for norms in given if norms is not None), None)
    if first is None:
        return {}
    zeros = np.zeros_like(first)
    stacked = np.stack([zeros if n is None else norms_of_kernel(n, target) for n in given])
    stacked = stacked.reshape(*target.stack, *first.shape)
    return {"dora_scale": jnp.asarray(stacked, target.factor_dtype)}
