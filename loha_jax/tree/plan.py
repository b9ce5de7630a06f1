"""What a config would adapt in a tree: names, layouts, ranks and alphas, settled before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from loha_jax.lowrank.initial_values import factor_shapes
from loha_jax.lowrank.layout import Layout
from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.lycoris_config import LycorisConfig
from loha_jax.targets.matching import (
    EXCLUDED,
    match_pattern,
    match_pattern_key,
    match_target,
    near_misses,
    no_match_message,
    resolve_target_modules,
)
from loha_jax.targets.module_names import (
    Names,
    torch_parameter,
)
from loha_jax.targets.target_advice import (
    QUANTISED_ADVICE,
    quantised_kernels,
    require_config,
    scaled_kernel,
    spelling_advice,
)
from loha_jax.tree.named_tree import Layouts, NamedTree


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel that the config targets: all that is known before its factors exist."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    cp: bool

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the kernel's stack axes."""
        return self.layout.sizes("s", self.shape)

    def shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """PEFT's shapes of the factors of one of its modules."""
        out, in_, *spatial = self.layout.torch_shape(self.shape)[len(self.stack) :]
        return factor_shapes(out, in_, spatial, r, self.cp)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A leaf of a module in `modules_to_save`."""

    path: tuple[str, ...]
    name: str
    layout: Layout | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `inject` would do to a tree: the adapted kernels and the saved leaves by flat position."""

    config: LoHaConfig
    targets: dict[int, Target]
    saved: dict[int, Saved]


def plan_injection(
    params: Any,
    config: LoHaConfig,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
    torch_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Matches `config` against a tree and settles names, layouts, ranks and alphas, changing nothing; see `inject`.

    A loader also says what shapes its file shows; see `NamedTree`.
    """
    require_config(config)
    tree = NamedTree(params, names, layouts, torch_shapes)
    quantised = quantised_kernels(params)
    modules = sorted(tree.modules | quantised.keys())
    linear = [*quantised] + [name for position in sorted(tree.kernels) for name in tree.linear_names(position)]
    config_matched = dataclasses.replace(
        config, target_modules=resolve_target_modules(config, modules, linear, model_type)
    )

    if refused := [said for name, said in quantised.items() if match_target(name, config_matched) is True]:
        raise ValueError(f"{'; '.join(refused)}. {QUANTISED_ADVICE}")

    targets: dict[int, Target] = {}
    excluded: list[str] = []
    matched: list[str] = []
    misfits: list[str] = []
    is_quantised = False
    candidates: list[str] = []
    for position in tree.weights:
        candidate_names = tree.names_of(position, config_matched)
        candidates += candidate_names
        hits = [match_target(name, config_matched) for name in candidate_names]
        excluded += [name for name, hit in zip(candidate_names, hits, strict=True) if hit == EXCLUDED]
        wanted = [hit is True for hit in hits]
        if not any(wanted):
            continue
        leaf = tree.leaves[position]
        if position not in tree.kernels or not jnp.issubdtype(leaf.dtype, jnp.floating):
            misfits.append(f"{'.'.join(tree.paths[position])} {leaf.dtype}{list(leaf.shape)}")
            is_quantised |= leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.integer)
            continue
        if said := scaled_kernel(tree.paths[position], leaf.dtype, tree.shape_at):
            raise ValueError(f"{said}. {QUANTISED_ADVICE}")
        layout = tree.layout(position)
        spatial = layout.sizes("k", leaf.shape)
        ranks = tuple(
            match_pattern(n, config.rank_pattern, config.r) if want else 0
            for n, want in zip(candidate_names, wanted, strict=True)
        )
        alphas = tuple(match_pattern(n, config.alpha_pattern, config.alpha) for n in candidate_names)
        if isinstance(config, LycorisConfig) and config.rs_lora:  # folded, as in LyCORIS' files: alpha/r is alpha/√r
            alphas = tuple(alpha * max(r, 1) ** 0.5 for alpha, r in zip(alphas, ranks, strict=True))
        chosen = list(zip(candidate_names, wanted, strict=True))
        matched += [name for name, want in chosen if want]
        targets[position] = Target(
            path=tree.paths[position],
            names=tuple(candidate_names),
            layout=layout,
            shape=tuple(leaf.shape),
            dtype=leaf.dtype,
            ranks=ranks,
            alphas=alphas,
            cp=config.use_effective_conv2d and any(size != 1 for size in spatial),
        )
    if misfits:
        raise ValueError(
            "The targets match modules whose weight cannot be adapted (a LoHa kernel has two or more axes and a "
            f"floating dtype): {', '.join(misfits)}. Narrow `target_modules` or use `exclude_modules`."
            + (f" {QUANTISED_ADVICE}" if is_quantised else "")
        )
    if not targets:
        raise ValueError(no_match_message(config_matched, candidates, excluded))
    _require_distinct([(name, t.path) for t in targets.values() for name in t.names])
    used = {tree.layout_pattern(position) for position in tree.kernels}
    if unused := [pattern for pattern in tree.given_layouts if pattern not in used]:
        warn_caller(
            f"layouts={unused} match no kernel." + near_misses(unused, sorted(tree.names.values())),
        )
    saved = _plan_saved(tree, config_matched, targets)
    _warn_unmatched(config, config_matched, modules, matched, excluded)
    return Plan(config_matched, targets, saved)


def _plan_saved(tree: NamedTree, config: LoHaConfig, targets: Mapping[int, Target]) -> dict[int, Saved]:
    entries = config.all_modules_to_save
    saved: dict[int, Saved] = {}
    used: set[str] = set()
    for position in tree.names:
        hits = {entry for name in tree.possible_names(position) for entry in _entries_above(name, entries)}
        if position in targets or not hits:
            continue
        layout = tree.layout(position) if position in tree.kernels else None
        shape = tuple(tree.leaves[position].shape)
        if layout and layout.axes("s"):
            raise ValueError(
                f"modules_to_save={sorted(hits)} match {'.'.join(tree.paths[position])} of shape {shape}, which "
                f"holds a stack of modules ({layout.word!r}). Only modules that stand alone can be saved whole."
            )
        (module,) = tree.module_names(position, ())
        if own := _entries_above(module, entries):
            used.update(own)
            name = f"{module}.{torch_parameter(tree.paths[position])}"
            saved[position] = Saved(tree.paths[position], name, layout, shape)
    _require_distinct([(s.name, s.path) for s in saved.values()])
    # A sequence classifier's head is called "classifier" or "score"; PEFT's files name both.
    optional = dataclasses.replace(config, modules_to_save=None).all_modules_to_save
    unused = [entry for entry in config.modules_to_save or () if entry not in used and entry not in optional]
    if unused:
        warn_caller(
            f"modules_to_save={unused} match no module and nothing is saved for them."
            + near_misses(unused, sorted(tree.modules)),
        )
    return saved


def _entries_above(name: str, entries: Sequence[str]) -> list[str]:
    """The entries of `modules_to_save` that name the module `name` or one that contains it."""
    ancestors = [".".join(name.split(".")[: n + 1]) for n in range(name.count(".") + 1)]
    return [e for e in entries if any(a == e or a.endswith(f".{e}") for a in ancestors)]


def _require_distinct(named: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for name, path in named:
        if name in seen:
            raise ValueError(
                f"Two kernels have the module name {name!r}: {'.'.join(seen[name])} and {'.'.join(path)}. Give "
                "`names=` that tells them apart, or exclude one."
            )
        seen[name] = path


def _warn_unmatched(
    config: LoHaConfig, resolved: LoHaConfig, modules: list[str], matched: list[str], excluded: list[str]
) -> None:
    """PEFT's warnings for patterns that match nothing, and one that PEFT lacks: for unmatched list entries."""
    if config.target_modules is not None and not isinstance(resolved.target_modules, str):
        entries = sorted(resolved.target_modules or ())
        unused = [e for e in entries if not any(n == e or n.endswith(f".{e}") for n in (*matched, *excluded))]
        if unused:
            warn_caller(
                f"target_modules={unused} match no module; the other entries do."
                + (spelling_advice(unused, modules) or near_misses(unused, modules)),
            )
    if config.exclude_modules and not excluded:
        shown = config.exclude_modules if isinstance(config.exclude_modules, str) else sorted(config.exclude_modules)
        warn_caller(
            f"You have passed exclude_modules={shown} but no modules were excluded. Please check that exclude_modules "
            "was set correctly.",
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        used = {match_pattern_key(name, patterns) for name in matched}
        unused = [p for p in patterns if p not in used and not any(match_pattern_key(n, [p]) for n in matched)]
        if unused:
            warn_caller(
                f"The following {field} keys did not match any targeted module and were ignored: {unused}.",
                RuntimeWarning,
            )
