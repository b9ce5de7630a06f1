"""`load_lycoris`: an adapter of LyCORIS, kohya or ComfyUI onto a tree of base parameters."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.weight_decomposition import is_on_out
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.targets.matching import name_endings
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names, all_names, torch_parameter
from loha_jax.tree.containers import takes_model
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Plan, Saved, Target, plan_injection

from ..disk.tensor_files import check_finite
from ..formats.adapter_file import AdapterFile, AdapterModule, errors_about
from ..formats.lycoris_files import NORM_PARTS, ModuleNames, split_prefix
from ..formats.lycoris_keys import PARAMETER_OF, embeddings_note
from ..formats.ranks import most_common, plain_number, ranks_and_alphas
from ..formats.read_adapter import read_lycoris
from ..updates.lora_conversion import loha_of
from ..updates.low_rank_update import LowRankUpdate
from ..updates.shapes import module_shapes
from .mismatch import Mismatch
from .to_tree import NAMES_AND_LAYOUTS, to_tree

T = TypeVar("T")
V = TypeVar("V")

_SHOWN_NEAR = 5  # modules that near misses are looked for: the search is slow


@takes_model(argument="base_params")
def load_lycoris(
    path: str | Path,
    base_params: T,
    *,
    adapter_name: str = "default",
    prefix: str | None = None,
    only: str | None = None,
    names: Names | None = None,
    layouts: Layouts | None = None,
    conv2d_weights_fix: bool = False,
) -> T:
    """Add an adapter that LyCORIS, kohya's scripts or `save_lycoris` wrote to a base model's tree.

    Keys may be LyCORIS' (`lycoris_blocks_0_q.hada_w1_a`), kohya's (`lora_unet_…`, `lora_te_…`,
    `lora_te1_…`), or dotted with a prefix (`diffusion_model.`, `transformer.`, …) or without one.
    Names with underscores are looked up among the tree's modules, never split. CLIP's `text_model`,
    which transformers 5 dropped, may be in one of the two.

    Args:
        path: of the file: `.safetensors`, or a torch pickle (`.pt`, `.bin`, …), which needs torch;
            or of a folder with one: `pytorch_lora_weights.safetensors` (SimpleTuner, diffusers), or
            a single safetensors file.
        base_params: the base model's tree; an adapted one gets one more adapter. Nothing is copied.
        adapter_name: the name in the tree.
        prefix: which component of the file (`"lora_unet_"`): what the keys to load begin with. May
            be left out where the file has only one.
        only: a regular expression for the whole names of modules in the file
            (`"lora_unet_.*attn.*"`); the others are left out.
        names, layouts: as for `loha_jax.inject`.
        conv2d_weights_fix: for files of LyCORIS 1.9.0 and earlier, which used `hada_t1` in the
            place of `hada_t2` in training: takes it for both cores of a 2-D convolution (PEFT's
            converter has the same option).

    Returns:
        The adapted tree, the new adapter active. Its config is a `LycorisConfig`, which keeps the
        file's `metadata`. Factors are float32, whatever the file's dtype. A module without alpha,
        or with 0, is scaled by 1 (alpha = r), as in kohya's scripts, ComfyUI and PEFT's converter;
        LyCORIS 4.1.3 cannot open a file without. Weight decompositions of both axes are loaded
        (LyCORIS reads only one). LoRA modules in the file become the LoHa of their rank that is
        equal to them, as in `load_lora`. Differences of whole parameters (of normalisation layers,
        `train_norm=True`, or of any layer, `algo=full`) become copies of the parameters, as with
        `modules_to_save`. Modules of the tree that are not in the file are not adapted.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: the file is corrupted, or has several components, or modules of a kind that LoHa
            cannot hold (LoKr, OFT, …) and that `only` does not leave out; two modules have the name
            that it uses; or it and the tree do not fit: one error lists all modules that the tree
            lacks and all that are misshapen.

    Warns:
        UserWarning: token embeddings (`bundle_emb.…`) are bundled with the weights; they are not
            loaded.

    Example:
        >>> import tempfile, loha_jax
        >>> base = {"a": {"q": {"kernel": jnp.ones((3, 3))}}}
        >>> params = loha_jax.inject(base, loha_jax.LoHaConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loha_jax.interop.save_lycoris(f"{folder}/adapter.safetensors", params)
        ...     load_lycoris(f"{folder}/adapter.safetensors", base)["a"]["q"]["kernel"].names
        ('a.q',)
    """
    adapter = read_lycoris(path, only=only, prefix=prefix)
    with errors_about(path):
        component = _component(adapter, prefix)
        tree = NamedTree(base_params, names, layouts)
        mismatch = Mismatch(titles=("modules that the tree lacks", "missing keys", "misshapen"))
        found = _found(component, tree, mismatch)
        plan = _plan(found, base_params, names, layouts, tree, adapter.metadata, mismatch)
    check_finite(found.arrays, path)
    mismatch.check(
        f"{path}: the adapter and the model do not fit; nothing was loaded",
        f"{NAMES_AND_LAYOUTS}, `prefix=` where the keys begin otherwise.",
        FileError,
    )
    if adapter.embeddings:
        warn_caller(f"{path}: {embeddings_note(adapter.embeddings)}")

    def loha(module: AdapterModule, target: Target) -> AdapterModule:
        if conv2d_weights_fix and target.cp and len(target.layout.axes("k")) == 2:
            return dataclasses.replace(
                module, tensors={**module.tensors, "hada_t2": module.tensors["hada_t1"]}
            )
        return module

    def saved(leaf: Saved, original: jax.Array) -> jax.Array:
        module, _, parameter = leaf.name.rpartition(".")
        difference = _difference(found.differences[module], parameter)
        if difference is None:
            return jnp.array(original, copy=True)
        wide = float32_or_wider(original.dtype)
        change = jnp.asarray(difference, wide)
        change = leaf.layout.fold(change, leaf.shape) if leaf.layout else change
        return (original.astype(wide) + change).astype(original.dtype)

    return to_tree(found.modules, base_params, plan, adapter_name, loha=loha, saved=saved)


@dataclasses.dataclass(frozen=True)
class _Found:
    """One component of a file, by the tree's module names."""

    modules: dict[str, AdapterModule]
    differences: dict[str, dict[str, np.ndarray]]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by their keys."""
        parts = [*((name, m.arrays) for name, m in self.modules.items()), *self.differences.items()]
        return {f"{name}.{key}": array for name, arrays in parts for key, array in arrays.items()}


def _component(adapter: AdapterFile, prefix: str | None) -> tuple[str, _Found]:
    """The modules of one component, as LoHa, by their names in the file after the prefix."""
    differences: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in adapter.others.items():
        module, _, part = key.rpartition(".")
        differences.setdefault(module, {})[part] = tensor
    counts = collections.Counter(split_prefix(own)[0] for own in {**adapter.modules, **differences})
    listed = ", ".join(f"{p!r} ({n} modules)" for p, n in counts.items())
    if prefix is None:
        if len(counts) > 1:
            raise ValueError(
                f"the file has several components: {listed}. Choose one with `prefix=`"
            )
        (prefix,) = counts
    chosen = _Found(
        {
            own[len(prefix) :]: loha_of(module) if module.kind == "lora" else module
            for own, module in adapter.modules.items()
            if own.startswith(prefix)
        },
        {own[len(prefix) :]: parts for own, parts in differences.items() if own.startswith(prefix)},
    )
    if not chosen.modules and chosen.differences:
        named = ", ".join(prefix + own for own in chosen.differences)
        raise ValueError(
            f"it has only differences of whole parameters ({named}), "
            "which are no LoHa. Merge the file into the model's checkpoint (`loha-jax merge`)"
        )
    if not chosen.modules:
        raise ValueError(
            f"no module with factors begins with prefix={prefix!r}; the file has {listed}"
        )
    return prefix, chosen


def _found(component: tuple[str, _Found], tree: NamedTree, mismatch: Mismatch) -> _Found:
    """The component by the tree's names; modules that the tree lacks are left out and noted."""
    prefix, own = component
    kernels = [name for position in tree.kernels for name in _names_at(tree, position)]
    norms = [
        name
        for position in tree.weights
        if position not in tree.kernels
        for name in _names_at(tree, position)
    ]
    in_kernels, in_norms = ModuleNames(kernels), ModuleNames(norms)
    origin: dict[str, str] = {}
    lacking = mismatch.unexpected

    def resolved(
        parts: Mapping[str, V], lookups: Sequence[ModuleNames], names: list[str]
    ) -> dict[str, V]:
        result = {}
        for name, value in parts.items():
            found = next((hit for lookup in lookups if (hit := lookup.find(prefix, name))), None)
            if found is None:
                lacking.append(
                    f"{prefix}{name}" + _near_miss(name, names) * (len(lacking) < _SHOWN_NEAR)
                )
            elif origin.get(found, name) != name:
                raise ValueError(
                    f"{prefix}{origin[found]} and {prefix}{name} are both {found} in the tree"
                )
            else:
                origin[found], result[found] = name, value
        return result

    of_norms = {
        name: parts
        for name, parts in own.differences.items()
        if parts.keys() <= {*NORM_PARTS.values()}
    }
    of_others = {name: parts for name, parts in own.differences.items() if name not in of_norms}
    modules = resolved(own.modules, [in_kernels], kernels)
    differences = resolved(of_norms, [in_norms], norms)
    differences |= resolved(of_others, [in_kernels, in_norms], [*kernels, *norms])
    return _Found(modules, differences)


def _difference(parts: Mapping[str, np.ndarray], parameter: str) -> np.ndarray | None:
    """The difference that is added to a parameter of a module, "weight" or "bias"."""
    return next((value for part, value in parts.items() if PARAMETER_OF[part] == parameter), None)


def _names_at(tree: NamedTree, position: int) -> Iterable[str]:
    """Names of a weight's modules; all that there could be, where that cannot be told."""
    leaf = tree.leaves[position]
    if isinstance(leaf, LoHaWeight):
        return leaf.names
    try:
        if position not in tree.kernels:
            return all_names(tree.names[position], tree.given_names)
        return tree.module_names(position, tree.layout(position).sizes("s", leaf.shape))
    except (
        ValueError
    ):  # `plan_injection` raises it again for a kernel that the file has factors for
        return tree.possible_names(position)


def _near_miss(name: str, names: list[str]) -> str:
    underscored = {n.replace(".", "_"): n for n in names}
    near = difflib.get_close_matches(name.replace(".", "_"), underscored, n=1, cutoff=0.7)
    return f" (the tree has {underscored[near[0]]})" if near else ""


def _plan(
    found: _Found,
    base_params: PyTree,
    names: Names | None,
    layouts: Layouts | None,
    tree: NamedTree,
    metadata: Mapping[str, str],
    mismatch: Mismatch,
) -> Plan:
    """A plan with the ranks, alphas and forms of the file; entries that do not fit are noted."""
    modules = found.modules
    if not modules:
        return Plan(LycorisConfig(), {}, {})
    settings = ranks_and_alphas(modules)
    config = LycorisConfig(
        r=settings["r"],
        alpha=settings["alpha"],
        target_modules=_targets(modules, tree),
        use_effective_conv2d=any("hada_t1" in m.tensors for m in modules.values()),
        weight_decompose=any(m.dora_scale is not None for m in modules.values()),
        metadata=metadata,
    )
    shapes = module_shapes(modules)
    plan = plan_injection(base_params, config, names=names, layouts=layouts, torch_shapes=shapes)
    targets: dict[int, Target] = {}
    axes: list[str] = []
    for position, target in plan.targets.items():
        given = {name: modules[name] for name in target.names if name in modules}
        shape = target.layout.torch_shape(target.shape)[len(target.stack) :]
        targets[position] = dataclasses.replace(
            target,
            ranks=tuple(modules[name].r if name in modules else 0 for name in target.names),
            alphas=tuple(
                plain_number(modules[n].alpha) if n in modules else config.alpha
                for n in target.names
            ),
            cp=any("hada_t1" in m.tensors for m in given.values()),
        )
        mismatch.misshapen += _misfits(targets[position], given, shape)
        axes += [axis for m in given.values() if (axis := _decomposed_axis(m, shape))]
    saved = _saved(tree, found.differences, targets, mismatch)
    config = dataclasses.replace(
        plan.config,
        **settings,
        modules_to_save=sorted(found.differences) or None,
        wd_on_out=not axes or most_common(axes) == "out",
    )
    return Plan(config, targets, saved)


def _targets(modules: Iterable[str], tree: NamedTree) -> list[str] | str:
    """`target_modules` that match only these modules by PEFT's rules: names also match endings."""
    chosen = frozenset(modules)
    others = (
        name
        for position in tree.weights
        for name in _names_at(tree, position)
        if name not in chosen
    )
    if all(chosen.isdisjoint(name_endings(name)) for name in others):
        return sorted(chosen)
    return "|".join(re.escape(name) for name in sorted(chosen))


def _misfits(
    target: Target, given: Mapping[str, AdapterModule], shape: tuple[int, ...]
) -> list[str]:
    """The misshapen entries of a kernel's modules, whose shape in torch is `shape`."""
    problems: list[str] = []
    forms: dict[tuple[bool, str | None], list[str]] = {}
    dora_shapes = _dora_shapes(shape)
    for name, module in given.items():
        cp, dora = "hada_t1" in module.tensors, module.dora_scale
        wanted = dataclasses.replace(target, cp=cp and any(n != 1 for n in shape[2:])).shapes(
            module.r
        )
        problems += [
            f"{name}.{part}: {list(tensor.shape)} in the file, {list(wanted.get(part, ())) or 'none'} in the model"
            for part, tensor in module.tensors.items()
            if tensor.shape != wanted.get(part)
        ]
        if module.in_shape is not None and not LowRankUpdate.of(module).fits(shape):
            problems.append(
                f"{name}: a kernel [in, ...] of {list(module.in_shape)} in the file, {list(shape[1:])} in the model"
            )
        if dora is not None and dora.shape not in dora_shapes:
            wanted_dora = " or ".join(str(list(allowed)) for allowed in dora_shapes)
            problems.append(
                f"{name}.dora_scale: {list(dora.shape)} in the file, {wanted_dora} in the model"
            )
        forms.setdefault((cp, _decomposed_axis(module, shape)), []).append(name)
    if len(forms) > 1:
        shown = [
            f"{names[0]} has {'' if cp else 'no '}cores and {f'a dora_scale per {axis}' if axis else 'no dora_scale'}"
            for (cp, axis), names in forms.items()
        ]
        problems.append(f"one stacked kernel holds modules of different forms: {', '.join(shown)}")
    return problems


def _dora_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the norms of a kernel `[out, in, *spatial]`: per output or per input feature."""
    out, into, *spatial = shape
    ones = (1,) * len(spatial)
    return (out, 1, *ones), (1, into, *ones)


def _decomposed_axis(module: AdapterModule, shape: tuple[int, ...]) -> str | None:
    """Whose norms a module has, "out" or "in"; None where it has none, or misshapen ones."""
    if module.dora_scale is None or module.dora_scale.shape not in _dora_shapes(shape):
        return None
    return "out" if is_on_out(module.dora_scale.shape, shape, 0) else "in"


def _saved(
    tree: NamedTree,
    differences: Mapping[str, Mapping[str, np.ndarray]],
    targets: Mapping[int, Target],
    mismatch: Mismatch,
) -> dict[int, Saved]:
    """The leaves that the file has differences of; entries that do not fit are noted."""
    # Not by `modules_to_save`, which also matches by the end of a name: the file says which modules it means.
    saved: dict[int, Saved] = {}
    refused: list[str] = []
    for position in tree.names:
        names, parameter = list(_names_at(tree, position)), torch_parameter(tree.paths[position])
        module = next((name for name in names if name in differences), None)
        if module is None or parameter not in NORM_PARTS:
            continue
        leaf, path = tree.leaves[position], ".".join(tree.paths[position])
        if position in tree.kernels and _difference(differences[module], parameter) is None:
            continue
        if position in targets or isinstance(leaf, LoHaWeight):
            refused.append(
                f"{module}.diff: {path} has an adapter, and a tree holds either this or a changed copy"
            )
            continue
        layout, shape = (
            tree.layout(position) if position in tree.kernels else None,
            tuple(leaf.shape),
        )
        if len(names) > 1 or (layout and layout.axes("s")):
            refused.append(
                f"{path} of shape {list(shape)} holds a stack of layers; only single ones are loaded"
            )
        saved[position] = Saved(tree.paths[position], f"{module}.{parameter}", layout, shape)
    mismatch.misshapen += refused
    if not refused:
        mismatch.misshapen += _misshapen_differences(saved.values(), differences)
    return dict(sorted(saved.items()))


def _misshapen_differences(
    saved: Iterable[Saved], differences: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[str]:
    shapes = {
        leaf.name: leaf.layout.torch_shape(leaf.shape) if leaf.layout else leaf.shape
        for leaf in saved
    }
    for module, parts in differences.items():
        for part, value in parts.items():
            wanted = shapes.get(f"{module}.{PARAMETER_OF[part]}")
            if value.shape != wanted:
                shown = "none" if wanted is None else list(wanted)
                yield f"{module}.{part}: {list(value.shape)} in the file, {shown} in the model"
