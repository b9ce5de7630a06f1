"""The plan of an adapter of LyCORIS: which of its modules goes to which kernel of a tree.

The file itself says which modules it adapts, and with which ranks, alphas and forms.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import PyTree

from loha_jax.lowrank.weight_decomposition import is_on_out
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.targets.matching import most_common, name_endings
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import all_names, torch_parameter
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Plan, Saved, Target, plan_injection

from ..formats.adapter_file import AdapterModule
from ..formats.lycoris_files import NORM_PARTS
from ..formats.lycoris_keys import PARAMETER_OF
from ..formats.ranks import plain_number, ranks_and_alphas
from ..names.conv1d import is_conv1d
from ..updates.low_rank_update import LowRankUpdate
from ..updates.shapes import module_shapes
from .mismatch import Mismatch
from .saved_modules import saved_shapes
from .transposed import is_transposed

Differences = dict[str, dict[str, np.ndarray]]
"""By module and part (`w_norm`, `diff`, …) what is added to parameters."""


def plan_modules(
    modules: Mapping[str, AdapterModule],
    differences: Differences,
    base_params: PyTree,
    tree: NamedTree,
    layouts: Layouts | None,
    metadata: Mapping[str, str],
    mismatch: Mismatch,
) -> Plan:
    """Return a plan with the ranks, alphas and forms of a file.

    Args:
        modules: of kind "loha", by the tree's names.
        differences: of whole parameters, by the tree's names.
        base_params: the base model's tree.
        tree: the same with its names.
        layouts: as for `inject`.
        metadata: of the file.
        mismatch: gets the entries that do not fit.
    """
    if not modules:
        return Plan(LycorisConfig(), {}, {})
    settings = ranks_and_alphas(modules)
    config = LycorisConfig(
        r=settings["r"],
        alpha=settings["alpha"],
        target_modules=_target_modules(modules, tree),
        use_effective_conv2d=any("hada_t1" in m.tensors for m in modules.values()),
        weight_decompose=any(m.dora_scale is not None for m in modules.values()),
        metadata=metadata,
    )
    plan = plan_injection(
        base_params,
        config,
        names=tree.given_names,
        layouts=layouts,
        torch_shapes=module_shapes(modules),
    )
    targets: dict[int, Target] = {}
    axes: list[str] = []
    for position, target in plan.targets.items():
        given = {name: modules[name] for name in target.names if name in modules}
        shape = target.module_shape
        own = [given.get(name) for name in target.names]
        targets[position] = dataclasses.replace(
            target,
            ranks=tuple(m.r if m else 0 for m in own),
            alphas=tuple(plain_number(m.alpha) if m else config.alpha for m in own),
            cp=any("hada_t1" in m.tensors for m in given.values()),
        )
        _check_modules(targets[position], given, shape, mismatch)
        axes += [axis for m in given.values() if (axis := _decomposed_axis(m, shape))]
    saved = _saved(tree, differences, targets, mismatch)
    config = dataclasses.replace(
        plan.config,
        **settings,
        modules_to_save=sorted(differences) or None,
        wd_on_out=not axes or most_common(axes) == "out",
    )
    return Plan(config, targets, saved)


def _target_modules(modules: Iterable[str], tree: NamedTree) -> list[str] | str:
    """Return `target_modules` that match only these modules by PEFT's rules, endings included."""
    chosen = frozenset(modules)
    others = {name for position in tree.weights for name in names_at(tree, position)} - chosen
    if all(chosen.isdisjoint(name_endings(name)) for name in others):
        return sorted(chosen)
    return "|".join(map(re.escape, sorted(chosen)))


def names_at(tree: NamedTree, position: int) -> Iterable[str]:
    """Return names of a weight's modules; all possible ones, where that cannot be told."""
    leaf = tree.leaves[position]
    if isinstance(leaf, LoHaWeight):
        return leaf.names
    try:
        if position not in tree.kernels:
            return all_names(tree.names[position], tree.given_names)
        return tree.module_names(position, tree.layout(position).sizes("s", leaf.shape))
    except ValueError:
        # `plan_injection` raises it again for a kernel that the file has factors for.
        return tree.possible_names(position)


def _check_modules(
    target: Target, given: Mapping[str, AdapterModule], shape: tuple[int, ...], mismatch: Mismatch
) -> None:
    """Note the misshapen entries of a kernel's modules, whose shape in torch is `shape`."""
    forms: dict[tuple[bool, str | None], str] = {}
    is_convolution = any(n != 1 for n in shape[2:])
    for name, module in given.items():
        cp, norms = "hada_t1" in module.tensors, module.dora_scale
        wanted = dataclasses.replace(target, cp=cp and is_convolution).shapes(module.r)
        for part, tensor in module.tensors.items():
            mismatch.add_shape(f"{name}.{part}", tensor.shape, wanted.get(part))
        if module.in_shape is not None and not LowRankUpdate.of(module).fits(shape):
            mismatch.misshapen.append(
                f"{name}: a kernel [in, ...] of {list(module.in_shape)} in the file, "
                f"{list(shape[1:])} in the model"
            )
        if norms is not None:
            mismatch.add_shape(f"{name}.dora_scale", norms.shape, *_dora_shapes(shape))
        forms.setdefault((cp, _decomposed_axis(module, shape)), name)
    if len(forms) > 1:
        shown = [
            f"{name} has {'' if cp else 'no '}cores and "
            + (f"a dora_scale per {axis}" if axis else "no dora_scale")
            for (cp, axis), name in forms.items()
        ]
        mismatch.misshapen.append(
            f"one stacked kernel holds modules of different forms: {', '.join(shown)}"
        )


def _dora_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a kernel's norms, per output and per input feature."""
    out, into, *spatial = shape
    ones = (1,) * len(spatial)
    return (out, 1, *ones), (1, into, *ones)


def _decomposed_axis(module: AdapterModule, shape: tuple[int, ...]) -> str | None:
    """Return which norms a module has, "out" or "in"; None for none, or misshapen ones."""
    if module.dora_scale is None or module.dora_scale.shape not in _dora_shapes(shape):
        return None
    return "out" if is_on_out(module.dora_scale.shape, shape, 0) else "in"


def difference(parts: Mapping[str, np.ndarray], parameter: str) -> np.ndarray | None:
    """Return the difference that is added to a parameter of a module, "weight" or "bias"."""
    return next((value for part, value in parts.items() if PARAMETER_OF[part] == parameter), None)


def _saved(
    tree: NamedTree, differences: Differences, targets: Mapping[int, Target], mismatch: Mismatch
) -> dict[int, Saved]:
    """Return the leaves that the file has differences of; note entries that do not fit."""
    # Not by `modules_to_save`, which also matches ends of names: the file says which it means.
    saved: dict[int, Saved] = {}
    refused: list[str] = []
    for position in tree.names:
        names, parameter = list(names_at(tree, position)), torch_parameter(tree.paths[position])
        module = next((name for name in names if name in differences), None)
        if module is None or parameter not in NORM_PARTS:
            continue
        leaf, path = tree.leaves[position], ".".join(tree.paths[position])
        is_kernel, shape = position in tree.kernels, tuple(leaf.shape)
        if is_kernel and difference(differences[module], parameter) is None:
            continue
        if position in targets or isinstance(leaf, LoHaWeight):
            refused.append(
                f"{module}.diff: {path} has an adapter, and a tree holds either this or a changed "
                "copy"
            )
            continue
        if is_kernel and is_transposed(tree, position):
            refused.append(
                f"{module}.diff: {path} is a transposed convolution's: convert it by hand"
            )
            continue
        layout = tree.layout(position) if is_kernel else None
        if layout and is_conv1d(module, tree.paths[position], layout):
            refused.append(f"{module}.diff: {path} is of GPT-2's Conv1D: transpose it by hand")
            continue
        if len(names) > 1 or (layout and layout.axes("s")):
            refused.append(
                f"{path} of shape {list(shape)} holds a stack of layers; only single ones are "
                "loaded"
            )
        saved[position] = Saved(
            tree.paths[position], f"{module}.{parameter}", layout, shape, tree.rows(position)
        )
    mismatch.misshapen += refused
    shapes = saved_shapes(saved.values())
    for module, parts in differences.items() if not refused else ():
        for part, value in parts.items():
            wanted = shapes.get(f"{module}.{PARAMETER_OF[part]}")
            mismatch.add_shape(f"{module}.{part}", value.shape, wanted)
    return dict(sorted(saved.items()))
