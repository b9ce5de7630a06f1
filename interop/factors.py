"""The tensors of each module in an adapted kernel, as every file format holds them."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from loha_jax.adapters import adapter_names, check_adapters
from loha_jax.before_saving import check_whole
from loha_jax.init import FACTOR_NAMES
from loha_jax.inject import factor_dtype
from loha_jax.plan import Target
from loha_jax.processes import on_host
from loha_jax.weight import LoHaWeight

from .adapter_file import AdapterModule
from .files import FileError

T = TypeVar("T")


def module_factors(leaf: LoHaWeight, adapter_name: str) -> Iterator[AdapterModule]:
    """The modules of a kernel that the adapter targets, without the padding of a stack.

    Rank stabilisation is folded into alpha, and the scalar, if any, into `hada_w1_a`.
    """
    leaf.require_whole()
    factors = leaf.adapters[adapter_name]
    stack = leaf.layout.sizes("s", leaf.kernel.shape)
    trained = {n: on_host(t).reshape(-1, *t.shape[len(stack) :]) for n, t in factors.trained.items()}
    target = Target(
        (), leaf.names, leaf.layout, tuple(leaf.kernel.shape), None, factors.ranks, factors.alphas, factors.is_cp
    )
    for index, (name, r, alpha) in enumerate(zip(leaf.names, factors.ranks, factors.alphas, strict=True)):
        if r:
            own = {n: trained[n][index][tuple(slice(size) for size in shape)] for n, shape in target.shapes(r).items()}
            if "scalar" in trained:
                own["hada_w1_a"] = own["hada_w1_a"] * trained["scalar"][index].astype(own["hada_w1_a"].dtype)
            dora_scale = trained["dora_scale"][index] if "dora_scale" in trained else None
            yield AdapterModule(name, "loha", r, alpha, own, dora_scale)


def exact_pattern(name: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` that matches a module by its full name, and no other."""
    return f"^{re.escape(name)}"


def most_common(values: Iterable[T]) -> T:
    """The value that occurs most often; the first of several."""
    return collections.Counter(values).most_common(1)[0][0]


def plain_number(alpha: float) -> float:
    """An alpha as people write it: 8, not 8.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def ranks_and_alphas(modules: Mapping[str, AdapterModule]) -> dict[str, Any]:
    """The fields of a config that give each module its own rank and alpha: the most common ones, and patterns."""
    r, alpha = most_common(m.r for m in modules.values()), most_common(m.alpha for m in modules.values())
    return {
        "r": r,
        "alpha": plain_number(alpha),
        "rank_pattern": {exact_pattern(n): m.r for n, m in modules.items() if m.r != r},
        "alpha_pattern": {exact_pattern(n): plain_number(m.alpha) for n, m in modules.items() if m.alpha != alpha},
    }


def stack_dora_scales(target: Target, modules: Mapping[str, AdapterModule]) -> dict[str, jax.Array]:
    """The norms of a kernel's weight decomposition, `{"dora_scale": [*stack, …]}`; {} where it has none.

    Args:
        target: the kernel.
        modules: of an adapter file, by torch name.
    """
    given = [modules[name].dora_scale if name in modules else None for name in target.names]
    first = next((scale for scale in given if scale is not None), None)
    if first is None:
        return {}
    stacked = np.stack([np.zeros(first.shape, first.dtype) if scale is None else scale for scale in given])
    return {"dora_scale": jnp.asarray(stacked.reshape(*target.stack, *first.shape), factor_dtype(target.dtype))}


def rank_of(name: str, tensors: Mapping[str, np.ndarray]) -> int:
    """The rank of one module's factors in PEFT's shapes, whose kernel is not known.

    Args:
        name: for messages.
        tensors: `hada_*`; any order.

    Raises:
        FileError: some are missing, do not fit each other, or do not hold floating-point numbers.
    """
    cores = [part for part in FACTOR_NAMES if part.startswith("hada_t")]
    wanted = [part for part in FACTOR_NAMES if part not in cores or any(core in tensors for core in cores)]
    if missing := [part for part in wanted if part not in tensors]:
        raise FileError(f"{name} lacks {', '.join(missing)}; it has {', '.join(tensors) or 'no factor'}")
    shapes = {part: tensors[part].shape for part in wanted}
    r = shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else 0
    rank_axis = 0 if cores[0] in wanted else 1
    fits = (
        r > 0
        and all(0 not in shape for shape in shapes.values())
        and all(shapes[f"hada_w1_{part}"] == shapes[f"hada_w2_{part}"] for part in "ab")
        and all(len(shapes[part]) == 2 for part in wanted if part not in cores)
        and shapes["hada_w1_a"][rank_axis] == r
        and all(len(shapes[core]) >= 4 and shapes[core][:2] == (r, r) for core in cores if core in wanted)
        and (cores[0] not in wanted or shapes[cores[0]] == shapes[cores[1]])
    )
    if not fits:
        found = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
        raise FileError(f"the factors of {name} do not fit each other: {found}")
    if odd := [part for part in wanted if not jnp.issubdtype(tensors[part].dtype, jnp.floating)]:
        raise FileError(f"{name}.{odd[0]} is {tensors[odd[0]].dtype}; factors hold floating-point numbers")
    return r


def chosen_adapter(params: Any, adapter_name: str | None) -> str:
    """The adapter of that name, or the tree's only one; ValueError where there is no such, or more than one.

    ValueError also for one half of `partition`: all that is written of a tree is chosen here.
    """
    check_whole(params)
    if adapter_name is not None:
        check_adapters(params, [adapter_name])
        return adapter_name
    known = adapter_names(params)
    if len(known) != 1:
        raise ValueError(f"Say which adapter: the tree has {', '.join(known) or 'none'}.")
    return known[0]
