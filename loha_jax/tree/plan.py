"""The plan of an injection: names, layouts, ranks and alphas, settled before a tree is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.initial_values import factor_shapes
from loha_jax.lowrank.layout import Layout
from loha_jax.lowrank.row_transform import RowTransform
from loha_jax.runtime.caller import warn_caller
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.matching import (
    Match,
    match_pattern,
    match_pattern_key,
    match_target,
    name_beginnings,
    name_endings,
    near_misses,
    no_match_message,
    resolve_target_modules,
)
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names, module_name, torch_parameter
from loha_jax.targets.target_advice import (
    QUANTISED_ADVICE,
    require_config,
    scaled_kernel,
    spelling_advice,
)
from loha_jax.tree.factors import Factors, module_index
from loha_jax.tree.grouped_lines import one_line_each
from loha_jax.tree.kernel_samples import KernelSample
from loha_jax.tree.named_tree import NamedTree
from loha_jax.tree.placement import ArrayOrShape
from loha_jax.tree.quantised import unknown_quantised


@dataclasses.dataclass(frozen=True)
class Target:
    """A targeted kernel with all that is known before its factors exist."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    cp: bool
    rows: RowTransform | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the kernel's stack axes."""
        return self.layout.sizes("s", self.shape)

    @property
    def module_shape(self) -> tuple[int, ...]:
        """Shape of one module's weight in torch: `(out, in, *spatial)`."""
        return self.layout.torch_shape(self.shape)[len(self.stack) :]

    @property
    def factor_dtype(self) -> jnp.dtype:
        """Dtype of the factors: float32, or the kernel's if it is wider.

        PEFT's `autocast_adapter_dtype=True` has the same effect.
        """
        return float32_or_wider(self.dtype)

    def shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """Return PEFT's shapes of the factors of one module."""
        out, in_, *spatial = self.module_shape
        return factor_shapes(out, in_, spatial, r, self.cp)

    def factors(
        self, arrays: Mapping[str, Any], config: LoHaConfig, base: KernelSample | None = None
    ) -> Factors:
        """Return the adapter of the kernel that holds these arrays, by their names in `Factors`."""
        return Factors(
            **arrays,
            module_index=module_index(self.ranks, self.alphas, self.stack),
            ranks=self.ranks,
            alphas=self.alphas,
            config=config,
            base=base,
        )


@dataclasses.dataclass(frozen=True)
class Saved:
    """A leaf of a module in `modules_to_save`."""

    path: tuple[str, ...]
    name: str
    layout: Layout | None
    shape: tuple[int, ...]
    rows: RowTransform | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The adapted kernels and the saved leaves of an injection, by position in the flat tree."""

    config: LoHaConfig
    targets: dict[int, Target]
    saved: dict[int, Saved]

    @property
    def positions(self) -> set[int]:
        """The positions of all leaves that change."""
        return {*self.targets, *self.saved}


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A weight with the names of its modules and how the config treats each of them."""

    position: int
    names: tuple[str, ...]
    matches: tuple[Match, ...]

    def named(self, match: Match) -> list[str]:
        """Return the names of the modules that are treated so."""
        return [name for name, own in zip(self.names, self.matches, strict=True) if own is match]


def plan_injection(
    params: PyTree,
    config: LoHaConfig,
    *,
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
    torch_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Match `config` against a tree and settle names, layouts, ranks and alphas; see `inject`.

    Nothing is changed. A loader also passes the shapes that its file shows; see `NamedTree`.
    """
    require_config(config)
    tree = NamedTree(params, names, layouts, torch_shapes)
    quantised = {
        module_name(path): f"{'.'.join(path)} is of a type that is not known, and holds {held}"
        for path, held in unknown_quantised(params).items()
    }
    modules = sorted(tree.modules | quantised.keys())
    linear = [*quantised, *(n for p in sorted(tree.kernels) for n in tree.linear_names(p))]
    resolved = dataclasses.replace(
        config, target_modules=resolve_target_modules(config, modules, linear, model_type)
    )
    _refuse_quantised(quantised, resolved)
    candidates = [_candidate(tree, position, resolved) for position in tree.weights]
    targeted = [c for c in candidates if Match.TARGETED in c.matches]
    _refuse_misfits(tree, targeted)
    excluded = [name for c in candidates for name in c.named(Match.EXCLUDED)]
    if not targeted:
        raise ValueError(
            no_match_message(resolved, [name for c in candidates for name in c.names], excluded)
        )
    targets = {c.position: _target(tree, c, config) for c in targeted}
    _require_distinct([(name, t.path) for t in targets.values() for name in t.names])
    used = {tree.layout_pattern(position) for position in tree.kernels}
    if unused := [pattern for pattern in tree.given_layouts if pattern not in used]:
        advice = near_misses(unused, sorted(tree.names.values()))
        warn_caller(f"layouts={unused} match no kernel.{advice}")
    saved = _plan_saved(tree, resolved, targets)
    _warn_of_overruled(tree, [*targets, *saved])
    matched = [name for c in targeted for name in c.named(Match.TARGETED)]
    warn_unmatched(config, resolved, modules, matched, excluded)
    return Plan(resolved, targets, saved)


def _candidate(tree: NamedTree, position: int, config: LoHaConfig) -> _Candidate:
    names = tree.names_of(position, config)
    return _Candidate(position, names, tuple(match_target(name, config) for name in names))


def _refuse_quantised(quantised: Mapping[str, str], config: LoHaConfig) -> None:
    """Raise ValueError for targets among kernels of unknown types, which are described by name."""
    if refused := [
        said for name, said in quantised.items() if match_target(name, config) is Match.TARGETED
    ]:
        raise ValueError(f"{'; '.join(refused)}. {QUANTISED_ADVICE}")


def _refuse_misfits(tree: NamedTree, targeted: Sequence[_Candidate]) -> None:
    """Raise ValueError for targets that no adapter fits: vectors, empty, integers, float8."""
    misfits: list[str] = []
    is_quantised = False
    for position in (candidate.position for candidate in targeted):
        leaf = tree.leaves[position]
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        if position not in tree.kernels or not floating or 0 in leaf.shape:
            misfits.append(f"{'.'.join(tree.paths[position])} {leaf.dtype}{list(leaf.shape)}")
            is_quantised |= leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.integer)
        elif scaled := scaled_kernel(tree.paths[position], leaf.dtype, tree.shape_at):
            raise ValueError(f"{scaled}. {QUANTISED_ADVICE}")
        elif contradiction := tree.contradiction(position):
            raise ValueError(contradiction)
    if misfits:
        raise ValueError(
            "The targets match modules whose weight cannot be adapted (a LoHa kernel has two or "
            f"more axes, is not empty, and has a floating dtype): {', '.join(misfits)}. Narrow "
            "`target_modules` or use `exclude_modules`."
            + (f" {QUANTISED_ADVICE}" if is_quantised else "")
        )


def _warn_of_overruled(tree: NamedTree, positions: Sequence[int]) -> None:
    """Warn of kernels whose given layout contradicts what their layer knows."""
    found: list[tuple[str, str]] = []
    for n in tree.kernels.intersection(positions):
        layout, shape = tree.layout(n), tuple(tree.leaves[n].shape)
        own = tree.known.own.get(tree.names[n], layout)
        if layout.contradicts(own, shape):
            how = f"is {own.word!r} to its layer, and was given as {layout.word!r}"
            found.append((".".join(tree.paths[n]), f" of shape {shape} {how}"))
    if lines := one_line_each(sorted(found)):
        warn_caller(
            f"{'; '.join(lines)}. What `layouts=` or `names=` gives counts: updates and files are "
            "those of another weight than the layer's. Leave it out where the layer is right."
        )


def _target(tree: NamedTree, candidate: _Candidate, config: LoHaConfig) -> Target:
    leaf, layout = tree.leaves[candidate.position], tree.layout(candidate.position)
    targeted = [match is Match.TARGETED for match in candidate.matches]
    path = tree.paths[candidate.position]
    rows = tree.rows(candidate.position)
    return make_target(config, path, candidate.names, layout, leaf, targeted, rows)


def make_target(
    config: LoHaConfig,
    path: tuple[str, ...],
    names: Sequence[str],
    layout: Layout,
    kernel: ArrayOrShape,
    targeted: Sequence[bool] | None = None,
    rows: RowTransform | None = None,
) -> Target:
    """Return what an adapter of one kernel is.

    Args:
        config: of the adapter.
        path: of the kernel.
        names: of its modules, one per stack index.
        layout: of the kernel.
        kernel: has its shape and dtype.
        targeted: which modules get an adapter, all by default; the rank of the others is 0.
        rows: of the modules in torch.

    Raises:
        ValueError: the transform of rows does not fit the kernel.
    """
    shape = tuple(kernel.shape)
    ranks = tuple(
        match_pattern(name, config.rank_pattern, config.r) if own else 0
        for name, own in zip(names, targeted or [True] * len(names), strict=True)
    )
    alphas = tuple(
        config.effective_alpha(match_pattern(name, config.alpha_pattern, config.alpha), r)
        for name, r in zip(names, ranks, strict=True)
    )
    # The kernel of a 1x1 convolution has no use for cores.
    cp = any(n != 1 for n in layout.sizes("k", shape)) and bool(config.use_effective_conv2d)
    target = Target(path, tuple(names), layout, shape, kernel.dtype, ranks, alphas, cp, rows)
    if rows and (problem := rows.problem(layout.sizes("o", shape))):
        raise ValueError(f"{'.'.join(path)} of shape {shape}, {names[0]} in torch: {problem}")
    return target


def _plan_saved(
    tree: NamedTree, config: LoHaConfig, targets: Mapping[int, Target]
) -> dict[int, Saved]:
    entries = config.all_modules_to_save
    saved: dict[int, Saved] = {}
    used: set[str] = set()
    for position in tree.names:
        names = tree.possible_names(position)
        hits = {entry for name in names for entry in _entries_above(name, entries)}
        if position in targets or not hits:
            continue
        layout = tree.layout(position) if position in tree.kernels else None
        shape = tuple(tree.leaves[position].shape)
        if layout and layout.axes("s"):
            raise ValueError(
                f"modules_to_save={sorted(hits)} match {'.'.join(tree.paths[position])} of shape "
                f"{shape}, which holds a stack of modules ({layout.word!r}). Only single modules "
                "can be saved whole."
            )
        (module,) = tree.module_names(position, ())
        if own := _entries_above(module, entries):
            used.update(own)
            name = f"{module}.{torch_parameter(tree.paths[position])}"
            saved[position] = Saved(tree.paths[position], name, layout, shape, tree.rows(position))
    _require_distinct([(s.name, s.path) for s in saved.values()])
    # A sequence classifier's head is called "classifier" or "score"; PEFT's files name both.
    optional = dataclasses.replace(config, modules_to_save=None).all_modules_to_save
    known = used.union(optional)
    if unused := [entry for entry in config.modules_to_save or () if entry not in known]:
        advice = near_misses(unused, sorted(tree.modules))
        warn_caller(
            f"modules_to_save={unused} match no module and nothing is saved for them.{advice}"
        )
    return saved


def _entries_above(name: str, entries: Sequence[str]) -> list[str]:
    """Return the entries of `modules_to_save` that name the module or one that contains it."""
    above = frozenset().union(*map(name_endings, name_beginnings(name)))
    return [entry for entry in entries if entry in above]


def _require_distinct(named: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for name, path in named:
        if name in seen:
            raise ValueError(
                f"Two kernels have the module name {name!r}: {'.'.join(seen[name])} and "
                f"{'.'.join(path)}. Give `names=` that tells them apart, or exclude one."
            )
        seen[name] = path


def warn_unmatched(
    config: LoHaConfig,
    resolved: LoHaConfig,
    modules: list[str],
    matched: list[str],
    excluded: list[str],
) -> None:
    """Warn of patterns that match nothing, as PEFT does, and of unmatched entries of lists."""
    if config.target_modules is not None and not isinstance(resolved.target_modules, str):
        used = frozenset().union(*map(name_endings, (*matched, *excluded)))
        if unused := sorted(set(resolved.target_modules or ()) - used):
            warn_caller(
                f"target_modules={unused} match no module; the other entries do."
                + (spelling_advice(unused, modules) or near_misses(unused, modules)),
            )
    if config.exclude_modules and not excluded:
        shown = config.exclude_modules
        shown = shown if isinstance(shown, str) else sorted(shown)
        warn_caller(
            f"You have passed exclude_modules={shown} but no modules were excluded. Please check "
            "that exclude_modules was set correctly.",
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        if unused := [p for p in patterns if not any(match_pattern_key(n, [p]) for n in matched)]:
            warn_caller(
                f"The following {field} keys did not match any targeted module and were ignored: "
                f"{unused}.",
                RuntimeWarning,
            )
