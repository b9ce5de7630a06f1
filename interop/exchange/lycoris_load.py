"""`load_lycoris`: an adapter of LyCORIS, kohya or ComfyUI onto a tree of base parameters."""

from __future__ import annotations

import collections
import dataclasses
import difflib
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.untrusted import FileError
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.adapters import check_new_adapter
from loha_jax.tree.containers import takes_model
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.plan import Saved, Target

from ..disk.tensor_files import check_finite
from ..formats.adapter_file import AdapterFile, AdapterModule, errors_about
from ..formats.lycoris_files import NORM_PARTS, ModuleNames, split_prefix
from ..formats.lycoris_keys import embeddings_note
from ..formats.read_adapter import module_of, read_lycoris
from ..updates.lora_conversion import loha_of
from .lycoris_plan import Differences, difference, names_at, plan_modules
from .mismatch import Mismatch
from .to_tree import NAMES_AND_LAYOUTS, to_tree

T = TypeVar("T")

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
        >>> config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
        >>> params = loha_jax.inject(base, config, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/adapter.safetensors"
        ...     loha_jax.interop.save_lycoris(path, params)
        ...     load_lycoris(path, base)["a"]["q"]["kernel"].names
        ('a.q',)
    """
    check_new_adapter(base_params, adapter_name)
    adapter = read_lycoris(path, only=only, prefix=prefix)
    with errors_about(path):
        prefix, adapter = _component(adapter, prefix)
    check_finite(adapter.arrays, path)
    mismatch = Mismatch(titles=("modules that the tree lacks", "missing keys", "misshapen"))
    with errors_about(path):
        tree = NamedTree(base_params, names, layouts)
        modules, differences = _found(adapter, prefix, tree, mismatch)
        metadata = adapter.metadata
        plan = plan_modules(modules, differences, base_params, tree, layouts, metadata, mismatch)
    mismatch.check(
        f"{path}: the adapter and the model do not fit; nothing was loaded",
        f"{NAMES_AND_LAYOUTS}, `prefix=` where the keys begin otherwise.",
        FileError,
    )
    if adapter.embeddings:
        warn_caller(f"{path}: {embeddings_note(adapter.embeddings)}")

    def loha(module: AdapterModule, target: Target) -> AdapterModule:
        if conv2d_weights_fix and target.cp and len(target.layout.axes("k")) == 2:
            tensors = {**module.tensors, "hada_t2": module.tensors["hada_t1"]}
            return dataclasses.replace(module, tensors=tensors)
        return module

    def saved(leaf: Saved, original: jax.Array) -> jax.Array:
        module, _, parameter = leaf.name.rpartition(".")
        added = difference(differences[module], parameter)
        if added is None:
            return jnp.array(original, copy=True)
        wide = float32_or_wider(original.dtype)
        if leaf.rows is not None:
            added = leaf.rows.from_torch(added, dtype=wide)
        change = jnp.asarray(added, wide)
        change = leaf.layout.fold(change, leaf.shape) if leaf.layout else change
        return (original.astype(wide) + change).astype(original.dtype)

    return to_tree(modules, base_params, plan, adapter_name, loha=loha, saved=saved)


def _component(adapter: AdapterFile, prefix: str | None) -> tuple[str, AdapterFile]:
    """Return the prefix of one component of a file, and the file with only its modules."""
    owners = dict.fromkeys((*adapter.modules, *map(module_of, adapter.others)))
    counts = collections.Counter(split_prefix(own)[0] for own in owners)
    listed = ", ".join(f"{p!r} ({n} modules)" for p, n in counts.items())
    if prefix is None:
        if len(counts) > 1:
            raise ValueError(
                f"the file has several components: {listed}. Choose one with `prefix=`"
            )
        (prefix,) = counts
    modules = {own: m for own, m in adapter.modules.items() if own.startswith(prefix)}
    others = {key: tensor for key, tensor in adapter.others.items() if key.startswith(prefix)}
    if not modules and others:
        named = ", ".join(dict.fromkeys(map(module_of, others)))
        raise ValueError(
            f"it has only differences of whole parameters ({named}), which are no LoHa. Merge the "
            "file into the model's checkpoint (`loha-jax merge`)"
        )
    if not modules:
        raise ValueError(
            f"no module with factors begins with prefix={prefix!r}; the file has {listed}"
        )
    return prefix, dataclasses.replace(adapter, modules=modules, others=others)


def _found(
    adapter: AdapterFile, prefix: str, tree: NamedTree, mismatch: Mismatch
) -> tuple[dict[str, AdapterModule], Differences]:
    """Return the modules as LoHa, and the differences, by the tree's names; note what it lacks."""
    kernels, norms = (
        [n for p in tree.weights if (p in tree.kernels) is is_kernel for n in names_at(tree, p)]
        for is_kernel in (True, False)
    )
    in_kernels, in_norms = ModuleNames(kernels), ModuleNames(norms)
    origin: dict[str, str] = {}

    def find(name: str, places: list[ModuleNames], known: list[str]) -> str | None:
        found = next((hit for place in places if (hit := place.find(prefix, name))), None)
        if found is None:
            near = _near_miss(name, known) if len(mismatch.unexpected) < _SHOWN_NEAR else ""
            mismatch.unexpected.append(f"{prefix}{name}{near}")
        elif origin.setdefault(found, name) != name:
            raise ValueError(
                f"{prefix}{origin[found]} and {prefix}{name} are both {found} in the tree"
            )
        return found

    modules: dict[str, AdapterModule] = {}
    for own, module in adapter.modules.items():
        if found := find(own[len(prefix) :], [in_kernels], kernels):
            modules[found] = loha_of(module) if module.kind == "lora" else module
    parts_of: Differences = {}
    for key, tensor in adapter.others.items():
        parts_of.setdefault(module_of(key)[len(prefix) :], {})[key.rpartition(".")[2]] = tensor
    differences: Differences = {}
    for name, parts in parts_of.items():
        if parts.keys() <= {*NORM_PARTS.values()}:
            found = find(name, [in_norms], norms)
        else:
            found = find(name, [in_kernels, in_norms], [*kernels, *norms])
        if found:
            differences[found] = parts
    return modules, differences


def _near_miss(name: str, names: list[str]) -> str:
    underscored = {n.replace(".", "_"): n for n in names}
    near = difflib.get_close_matches(name.replace(".", "_"), underscored, n=1, cutoff=0.7)
    return f" (the tree has {underscored[near[0]]})" if near else ""
