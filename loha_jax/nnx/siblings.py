"""How an NNX model holds an adapter: its arrays stand beside the variable that it adapts.

The base variable stays in its place. For a kernel in the attribute `W` of a module, the module gets

- `W_lora_hada_w1_a`, `W_lora_hada_w1_b`, …: the arrays of the adapter "default", of type exactly
  `nnx.LoRAParam`. Those of an adapter NAME are called `W_lora_NAME_hada_w1_a`, …, and those of an
  inactive adapter are `InactiveLoHaParam`s;
- `W_lora`: a static attribute with everything else, a `Settings`;
- `W_lora_rngs`: a `DropoutStream`, if an adapter has a dropout.

A variable of a module in `modules_to_save` gets `W_lora_copy` (or `W_lora_NAME_copy`) and `W_lora`.
A variable in a list or a plain dict is named by its way from the module: `layers_0_lora_…`. A
variable of several modules has the same siblings in each of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, cast

import jax
from flax import nnx
from jaxtyping import PyTree

from loha_jax.nnx.graph import Path, follow, is_owner, is_variable
from loha_jax.nnx.variables import axis_names, scanned_axis, values_of, variable_beside
from loha_jax.runtime._compat import delete_attribute
from loha_jax.tree.dropout import dropout
from loha_jax.tree.factors import UNTRAINED_NAMES, Factors
from loha_jax.tree.leaves import LoHaWeight, SavedWeight
from loha_jax.tree.placement import named_axes
from loha_jax.tree.quantised import wrapped
from loha_jax.tree.stack_axes import StackPlaces, with_stack_in_front

LoHaParam = nnx.LoRAParam
"""A trained array: a factor of an active adapter, or a copy of a module in `modules_to_save`.

`nnx.Optimizer(model, tx, wrt=LoHaParam)` and `nnx.DiffState(0, LoHaParam)` train only these.
"""


class InactiveLoHaParam(nnx.Param):
    """An array of an adapter that is not active: kept and saved, but not trained."""


class Untrained(nnx.Variable):
    """An array of an adapter that is not trained; most adapters have none (`UNTRAINED_NAMES`)."""


class DropoutMode(nnx.Module):
    """The mode of an adapter's dropout; `model.train()` and `model.eval()` set it.

    Attributes:
        deterministic: no dropout.
    """

    deterministic = True

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set `deterministic`; `nnx.view(model, deterministic=...)` calls this."""
        if deterministic is not None:
            self.deterministic = deterministic


class DropoutStream(nnx.RngStream, DropoutMode):
    """The random stream of an adapter's dropout; `[*stack]` keys for a stacked kernel."""

    def next_key(self) -> jax.Array:
        """Return a new key.

        A stream of a stack holds one key per index. The first is used, and the masks differ by
        index.
        """
        keys, counts = self.key.get_value(), self.count.get_value()
        self.count.set_value(counts + 1)
        return jax.random.fold_in(keys.reshape(-1)[0], counts.reshape(-1)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """All that an adapted variable has besides arrays; equal if it computes the same.

    Attributes:
        path: from the module to the variable.
        template: the leaf without its base, and with the ends of the attributes' names for arrays.
        intercepted: True if a provider adds the update while the model runs. Calls of the module
            then do not run through `adapt`.
        from_end: where the stack axes of the arrays are (`StackPlaces`).
    """

    path: Path
    template: LoHaWeight | SavedWeight
    intercepted: bool = False
    from_end: bool = False

    @functools.cached_property
    def flat(self) -> tuple[list[str], Any]:
        """The names in the template, and its structure."""
        return jax.tree.flatten(self.template)

    @property
    def _computing(self) -> tuple[object, ...]:
        return self.path, *self.flat, self.intercepted, self.from_end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self._computing == other._computing

    def __hash__(self) -> int:
        return hash((self.path, self.flat[1]))

    def __reduce__(self) -> tuple[object, ...]:
        return Settings, (self.path, self.template, self.intercepted, self.from_end)

    def __repr__(self) -> str:
        return repr(self.template)

    @property
    def drops(self) -> bool:
        """True if an active adapter has a dropout."""
        if isinstance(self.template, SavedWeight):
            return False
        return any(map(_drops, self.template.active_adapters))


@dataclasses.dataclass(frozen=True)
class AdaptedVariable:
    """An adapted variable of a module, with what is beside it.

    Attributes:
        owner: the module.
        settings: its static attribute.
    """

    owner: nnx.Pytree
    settings: Settings

    @property
    def base(self) -> PyTree[nnx.Variable]:
        """The model's own variable; for a quantised kernel, the tree of its variables."""
        return follow(self.owner, self.settings.path)

    def attribute(self, name: str) -> str:
        """Return the name of the attribute of an array of the template."""
        return f"{prefix(self.settings.path)}_{name}"

    @property
    def arrays(self) -> list[nnx.Variable]:
        """The variables beside the base, in the order of the leaf."""
        return [getattr(self.owner, self.attribute(name)) for name in self.settings.flat[0]]

    @property
    def variables(self) -> list[nnx.Variable]:
        """All variables beside the base, those of the random stream included."""
        stream = () if self.mode is None else vars(self.mode).values()
        return [*self.arrays, *filter(is_variable, stream)]

    @property
    def mode(self) -> DropoutMode | None:
        """The dropout's random stream; only its mode, if it has no stream."""
        return vars(self.owner).get(self.attribute("rngs"))

    def set_mode(self, mode: DropoutMode) -> None:
        """Put another random stream beside the variable."""
        setattr(self.owner, self.attribute("rngs"), mode)

    def leaf(self) -> LoHaWeight | SavedWeight:
        """Return the variable as a leaf of a tree, whose factors have their stack axes in front.

        Axes that a scan or vmap has added since it was adapted are stack axes.

        Raises:
            ValueError: the factors have another rank than the settings, as after `nnx.update` with
                an adapter of another rank; or it is unclear which axes were added
                (`with_stack_in_front`).
        """
        leaf = self._stored()
        return leaf if isinstance(leaf, SavedWeight) else self._in_front(leaf)[0]

    def _stored(self) -> LoHaWeight | SavedWeight:
        leaf = self.settings.flat[1].unflatten([variable.get_value() for variable in self.arrays])
        base = wrapped(values_of(self.base))
        if isinstance(leaf, SavedWeight):
            return dataclasses.replace(leaf, original=base)
        return dataclasses.replace(leaf, kernel=base)

    def _in_front(self, leaf: LoHaWeight) -> tuple[LoHaWeight, StackPlaces]:
        axis = scanned_axis(self.base)
        found = with_stack_in_front(leaf, from_end=self.settings.from_end, axis=axis)
        _check_ranks(found[0])
        return found

    @property
    def places(self) -> StackPlaces | None:
        """The places of the stack axes; None for a variable without factors."""
        leaf = self._stored()
        return None if isinstance(leaf, SavedWeight) else self._in_front(leaf)[1]

    def leaf_for_call(self) -> LoHaWeight | SavedWeight:
        """Return the leaf, with dropout's masks in training mode.

        Raises:
            ValueError: the adapter drops out, and has no random stream.
        """
        leaf, mode = self.leaf(), self.mode
        if isinstance(leaf, SavedWeight) or mode is None or mode.deterministic:
            return leaf
        if not self.settings.drops:
            return leaf
        if not isinstance(mode, DropoutStream):
            raise ValueError(
                f"The adapter of {leaf.label} drops out in training and has no random stream. Give "
                "it one with loha_jax.nnx.set_dropout(model, rngs), or call model.eval()."
            )
        return dropout(leaf, mode.next_key())

    def current_copy(self) -> nnx.Variable:
        """Return the variable of a saved module that is in use: the active copy, or the base."""
        template = cast(SavedWeight, self.settings.template)
        name = template.copy_of(template.active)
        if name is None:
            return self.base
        return getattr(self.owner, self.attribute(template.copies[name]))

    def remove(self) -> None:
        """Delete all that is beside the variable."""
        names = map(self.attribute, ("rngs", *self.settings.flat[0]))
        for name in (prefix(self.settings.path), *names):
            if name in vars(self.owner):
                delete_attribute(self.owner, name)


def adapted_in(module: object) -> list[AdaptedVariable]:
    """Return the adapted variables of a module itself, not those of the modules in it."""
    if not is_owner(module):
        return []
    settings = [value for value in vars(module).values() if isinstance(value, Settings)]
    return [AdaptedVariable(module, of) for of in settings]


def called_in(module: object) -> list[AdaptedVariable]:
    """Return the adapted variables of a module itself that calls of it compute with."""
    return [adapted for adapted in adapted_in(module) if not adapted.settings.intercepted]


def intercepted_in(model: nnx.Module) -> bool:
    """Return whether a provider adds the adapters of a model, or some of them."""
    return any(
        of.settings.intercepted for _, node in nnx.iter_graph(model) for of in adapted_in(node)
    )


def called_among(graph: Iterable[tuple[Path, object]]) -> dict[Path, AdaptedVariable]:
    """Return the adapted variables among the parts of a graph that calls compute with, by path."""
    parts = list(graph)
    adapted = {id(of.base): of for _, node in parts for of in called_in(node)}
    return {path: adapted[id(node)] for path, node in parts if id(node) in adapted}


@dataclasses.dataclass(frozen=True)
class Siblings:
    """New variables for a leaf. A variable of several modules has the same ones in each.

    Attributes:
        template, intercepted, from_end: see `Settings`.
        variables: the arrays and the random stream, by the ends of the attributes' names.
    """

    template: LoHaWeight | SavedWeight
    variables: dict[str, nnx.Variable | DropoutMode]
    intercepted: bool = False
    from_end: bool = False

    @classmethod
    def of(
        cls,
        leaf: LoHaWeight | SavedWeight,
        base: PyTree[nnx.Variable],
        *,
        old: AdaptedVariable | None = None,
        intercepted: bool = False,
    ) -> Siblings:
        """Make the variables of a leaf.

        Args:
            leaf: an adapted leaf.
            base: the variable that is adapted, which gives its metadata; for a quantised kernel,
                the tree of its variables.
            old: the adapted variable that it was, if any. Its dropout's mode or random stream, the
                places of its stack axes, and `intercepted` stay.
            intercepted: see `Settings`.
        """
        mode = None
        if old is not None:
            mode, intercepted = old.mode, old.settings.intercepted
        if isinstance(leaf, SavedWeight):
            copies = {name: _name(name, "copy") for name in leaf.copies}
            template = dataclasses.replace(leaf, original=None, copies=copies)
            variables: dict[str, nnx.Variable | DropoutMode] = {}
            for name, copy in leaf.copies.items():
                kind = type(base) if leaf.is_buffer else _kind(name in leaf.active)
                variables[copies[name]] = variable_beside(base, kind, copy, axis_names(base))
            return cls(template, variables)
        places = _places(leaf, old)
        adapters, variables = {}, {}
        for name, factors in leaf.adapters.items():
            axes = named_axes(axis_names(base), leaf, factors)
            names = {array: _name(name, array) for array in factors.arrays}
            for array, value in factors.arrays.items():
                kind = Untrained if array in UNTRAINED_NAMES else _kind(name in leaf.active)
                stored, own = places.from_front(value), axes.get(array)
                if own is not None:
                    own = tuple(own[axis] for axis in places.order(len(own)))
                variables[names[array]] = variable_beside(base, kind, stored, own)
            adapters[name] = dataclasses.replace(factors, **names)
        if any(map(_drops, adapters.values())):
            variables["rngs"] = mode or DropoutMode()
        template = dataclasses.replace(leaf, kernel=None, adapters=adapters)
        return cls(template, variables, intercepted, places.from_end)

    def attributes(self, path: Path) -> dict[str, Settings | nnx.Variable | DropoutMode]:
        """Return the attributes of a module from which `path` leads to the variable."""
        start = prefix(path)
        beside = {f"{start}_{name}": variable for name, variable in self.variables.items()}
        settings = Settings(path, self.template, self.intercepted, self.from_end)
        return {start: settings, **beside}

    def put(self, owner: nnx.Pytree, path: Path) -> None:
        """Set the attributes of a module from which `path` leads to the variable."""
        for name, value in self.attributes(path).items():
            setattr(owner, name, value)


def prefix(path: Path) -> str:
    """Return the name of the static attribute, with which the names of all siblings begin."""
    return "_".join((*map(str, path), "lora"))


def _name(adapter: str, array: str) -> str:
    return array if adapter == "default" else f"{adapter}_{array}"


def _kind(active: bool) -> type[nnx.Param]:
    return LoHaParam if active else InactiveLoHaParam


def _drops(factors: Factors) -> bool:
    return bool(factors.config.rank_dropout or factors.config.module_dropout)


def _check_ranks(leaf: LoHaWeight) -> None:
    for name, factors in leaf.adapters.items():
        rank, shape = max(factors.ranks), getattr(factors.hada_w1_b, "shape", ())
        if len(shape) > 1 and shape[-2] != rank:
            raise ValueError(
                f"The factors of adapter {name!r} have rank {shape[-2]}, but its settings say "
                f"{rank}. nnx.update copies arrays without ranks and alphas: load the adapter into "
                "this model under another name, interop.load_peft(folder, model, adapter_name=…)."
            )


def _places(leaf: LoHaWeight, old: AdaptedVariable | None) -> StackPlaces:
    """Return the places of the stack axes in the new arrays: where they have been, if anywhere."""
    places = None if old is None else old.places
    return StackPlaces(leaf.layout.strip(len(leaf.kernel.shape))) if places is None else places
