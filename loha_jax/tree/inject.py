"""`inject`: the same tree, with each targeted kernel replaced by a `LoHaWeight`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from loha_jax.lowrank.initial_values import init_factors
from loha_jax.lowrank.singular_pair import singular_pair
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.promotion import standard_promotion
from loha_jax.runtime.scalars import check_key
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.adapters import check_new_adapter
from loha_jax.tree.containers import takes_model
from loha_jax.tree.factors import norms_of_adapted
from loha_jax.tree.frozen_leaves import frozen_leaves
from loha_jax.tree.kernel_samples import KernelSample, sample_kernels
from loha_jax.tree.leaves import LoHaWeight, SavedWeight, base_of, flatten_whole, is_adapted
from loha_jax.tree.placement import follow_kernel, place_like
from loha_jax.tree.plan import Plan, Saved, Target, plan_injection
from loha_jax.tree.quantised import QuantisedArray, as_array, wrapped

T = TypeVar("T")


@takes_model
def inject(
    params: T,
    config: LoHaConfig,
    *,
    key: jax.Array,
    adapter_name: str = "default",
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
) -> T:
    """Add a LoHa adapter to a tree of parameters.

    Return the same tree in which each targeted kernel is a `LoHaWeight` around the very same array
    (base weights are never copied), and each leaf of a module in `modules_to_save` a `SavedWeight`.
    The tree can be used at once: `model.apply({"params": inject(params, config, key=key)}, x)`
    gives the adapted model's output, and `loha_jax.adapt(model.apply)` gives it without
    materialising ΔW. Injecting again with another name adds an adapter, which becomes the active
    one.

    Args:
        params: any pytree of arrays: a Flax params dict, an `nnx.State`, an Equinox module. An
            `nnx.Module` is changed in place (`loha_jax.nnx.inject` takes its rngs). A tree of
            `jax.ShapeDtypeStruct` gives a tree of shapes, as under `jax.eval_shape`.
        config: the kernels to adapt and the adapter's settings.
        key: JAX PRNG key. The same key gives the same factors whatever the order of the tree or the
            adapter's name.
        adapter_name: PEFT's name of the adapter; may not contain a dot.
        names: torch module names if they differ from the tree's: an `interop.NameMap`, a function
            of the default name (the path joined with dots, without "params" and "kernel"), or
            `{regex: template}`; see `loha_jax.targets.module_names.stack_names`. Leaves keep the
            transforms of rows that a map has for them.
        layouts: `{regex: layout}`, fullmatched against the default dotted name, for kernels of
            three or more axes that neither their layer nor a bias or a name settles
            (docs/guide/layouts.md). `infer_layouts` reads them off the model.
        model_type: a Hugging Face model type, for PEFT's default `target_modules` if the config has
            None.

    On a mesh each factor is sharded like its kernel: w*_a along the output axes, w*_b along the
    input axes, stack axes like the kernel's (`loha_jax.tree.placement.factor_axes`).

    Factors are float32 if the kernel is float32 or narrower (as with PEFT's
    `autocast_adapter_dtype`), else float64.

    Raises:
        ValueError: nothing matches (with the nearest names), a matched module has no kernel that
            can be adapted, a kernel's layout is ambiguous, two leaves have one name, or the
            adapter's name is taken or invalid.
        TypeError: `key` is no JAX PRNG key.

    Warns:
        UserWarning: an entry of `target_modules`, `exclude_modules` or `modules_to_save` matches
            nothing.
        UserWarning: a layout that is given contradicts what the kernel's layer knows.
        UserWarning: r² is more than 16 times the rank that a kernel's update can have.
        RuntimeWarning: a key of `rank_pattern` or `alpha_pattern` matches no adapted module.

    Mirrors PEFT's `get_peft_model` and `add_adapter`.

    Example:
        >>> params = {"layer": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}}
        >>> config = LoHaConfig(r=2, target_modules=["query"])
        >>> adapted = inject(params, config, key=jax.random.key(0))
        >>> adapted["layer"]["query"]["kernel"].adapters["default"].hada_w1_a.shape
        (4, 2)
    """
    check_key(key)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        settings = {"adapter_name": adapter_name, "names": names, "layouts": layouts}
        build = functools.partial(inject, config=config, key=key, model_type=model_type, **settings)
        return _with_shardings(jax.eval_shape(build, params), params)
    plan = plan_injection(params, config, names=names, layouts=layouts, model_type=model_type)
    if wasted := _with_rank_to_spare(plan):
        warn_caller(
            f"r = {config.r} allows updates of rank {config.r**2}, far above what the kernel of "
            f"{wasted[0]} can have; {len(wasted)} module(s) are so small. A smaller r "
            "(`rank_pattern`) has full rank already: an r of the root of the smaller side.",
        )
    make_factors = functools.partial(initial_factors, key=key, config=config)
    return apply_plan(params, plan, adapter_name, make_factors, _copy, _initial_extras)


def _copy(saved: Saved, kernel: jax.Array) -> jax.Array:
    return jnp.array(kernel, copy=True)


def _with_rank_to_spare(plan: Plan) -> list[str]:
    """Return the modules for which r² exceeds 16 times the largest rank of an update."""
    return [
        name
        for target in plan.targets.values()
        for name, r in zip(target.names, target.ranks, strict=True)
        if r * r > 16 * min(target.module_shape[0], math.prod(target.module_shape[1:])) > 16
    ]


def apply_plan(
    params: T,
    plan: Plan,
    adapter_name: str,
    make_factors: Callable[[Target, jax.Array], dict[str, jax.Array]],
    make_copy: Callable[[Saved, jax.Array], jax.Array],
    make_extras: Callable[[Target, LoHaConfig, jax.Array], dict[str, jax.Array]],
) -> T:
    """Put the leaves of `plan` into a tree.

    The functions make the factors, the copies and LyCORIS' extra arrays.
    """
    check_new_adapter(params, adapter_name)
    leaves, treedef = flatten_whole(params)
    leaves = [wrapped(leaf) if n in plan.positions else leaf for n, leaf in enumerate(leaves)]
    others = [None if n in plan.positions else leaf for n, leaf in enumerate(leaves)]
    kernels = {n: base_of(leaves[n]) for n in plan.targets}
    samples = _base_samples(kernels, frozen_leaves(treedef.unflatten(others)))
    for n, target in plan.targets.items():
        extras = make_extras(target, plan.config, kernels[n])
        if "dora_scale" in extras:
            norms = norms_of_adapted(extras["dora_scale"], target.ranks, target.stack)
            extras = {**extras, "dora_scale": norms}
        arrays = {**make_factors(target, kernels[n]), **extras}
        factors = target.factors(arrays, plan.config, samples.get(n))
        known = leaves[n].adapters if isinstance(leaves[n], LoHaWeight) else {}
        leaf = LoHaWeight(kernels[n], known, target.layout, target.names, (), target.rows)
        factors = follow_kernel(factors, kernels[n], target.layout)
        leaves[n] = leaf.with_adapter(adapter_name, factors)
    for n, saved in plan.saved.items():
        leaf, original = leaves[n], base_of(leaves[n])
        if not isinstance(leaf, SavedWeight):
            leaf = SavedWeight(original, {}, saved.layout, saved.name, (), rows=saved.rows)
        copy = place_like(make_copy(saved, original), original)
        leaves[n] = leaf.with_copy(adapter_name, copy)
    for n, leaf in enumerate(leaves):  # the new adapter is the active one everywhere
        if is_adapted(leaf) and leaf.active != (adapter_name,):
            leaves[n] = dataclasses.replace(leaf, active=(adapter_name,))
    return treedef.unflatten(leaves)


def with_samples(params: T) -> T:
    """Note anew what the adapters were made on, after a file has brought base weights."""
    leaves, treedef = flatten_whole(params)
    kernels = {n: leaf.kernel for n, leaf in enumerate(leaves) if isinstance(leaf, LoHaWeight)}
    for n, base in _base_samples(kernels, frozen_leaves(params)).items():
        adapters = {
            name: dataclasses.replace(f, base=base) for name, f in leaves[n].adapters.items()
        }
        leaves[n] = dataclasses.replace(leaves[n], adapters=adapters)
    return treedef.unflatten(leaves)


def _base_samples(
    kernels: Mapping[int, jax.Array], frozen: Mapping[tuple[str, ...], jax.Array]
) -> dict[int, KernelSample]:
    """Return samples of kernels by position, each with those of the frozen leaves beside it."""
    samples = sample_kernels({**kernels, **frozen})  # one transfer from the devices
    beside = {path: samples[path] for path in frozen if path in samples}
    return {n: dataclasses.replace(samples[n], beside=beside) for n in kernels if n in samples}


def _with_shardings(shapes: T, params: T) -> T:
    """Return the shapes of an adapted tree with the shardings of the shapes it was made of."""

    def like(leaf: object, old: object) -> object:
        base = wrapped(base_of(old))
        if isinstance(leaf, LoHaWeight):
            placed = {n: follow_kernel(f, base, leaf.layout) for n, f in leaf.adapters.items()}
            return dataclasses.replace(leaf, kernel=base, adapters=placed)
        if isinstance(leaf, SavedWeight):
            copy = base.placed_type if isinstance(base, QuantisedArray) else base
            copies = dict.fromkeys(leaf.copies, copy)
            return dataclasses.replace(leaf, original=base, copies=copies)
        return old

    return jax.tree.map(like, shapes, params, is_leaf=is_adapted)


@standard_promotion()
def initial_factors(
    target: Target, kernel: jax.Array, key: jax.Array, config: LoHaConfig
) -> dict[str, jax.Array]:
    """Draw the factors of a new adapter of one kernel, by the law that its config names."""
    scheme, dtype = config.initial_values, target.factor_dtype
    if len(set(target.ranks)) == 1:
        shapes = target.shapes(target.ranks[0])
        drawn = init_factors(key, target.names, shapes, scheme, dtype, target.stack)
    else:
        per_module = [
            init_factors(key, [name], target.shapes(r), scheme, dtype, ()) if r else {}
            for name, r in zip(target.names, target.ranks, strict=True)
        ]
        drawn = stack_factors(per_module, target)
    if scheme == "abba":
        # The factors lie where the key is, which may be another device than the kernel's.
        placed = follow_kernel(target.factors(drawn, config), kernel, target.layout).tensors
        drawn |= singular_pair(as_array(kernel), target.layout, placed, target.ranks)
    return drawn


@standard_promotion()
def _initial_extras(target: Target, config: LoHaConfig, kernel: jax.Array) -> dict[str, jax.Array]:
    return config.extra_arrays(as_array(kernel), target.layout, target.factor_dtype)


def stack_factors(
    per_module: Sequence[Mapping[str, ArrayLike]], target: Target
) -> dict[str, jax.Array]:
    """Stack PEFT's tensors of each module of one kernel, as `Factors` holds them.

    They are stacked along the kernel's stack axes and padded with zeros to the largest rank.
    """
    padded, dtype = target.shapes(max(target.ranks)), target.factor_dtype
    stacked = {}
    for name, shape in padded.items():
        rows = []
        for tensors in per_module:
            value = jnp.asarray(tensors[name], dtype) if tensors else jnp.zeros(shape, dtype)
            missing = np.subtract(shape, value.shape)
            rows.append(jnp.pad(value, [(0, int(n)) for n in missing]))
        stacked[name] = jnp.stack(rows).reshape(*target.stack, *shape)
    return stacked
