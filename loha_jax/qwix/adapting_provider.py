"""The part that all operations of `LoHaProvider` share: finding the kernel, and adding x·ΔW."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import jax
import numpy as np
import qwix
from flax import linen as nn
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.layout import Layout
from loha_jax.nnx.model_tree import provided_among
from loha_jax.nnx.siblings import adapted_in, intercepted_in
from loha_jax.qwix._qwix_internals import current_module, current_path, is_quantised
from loha_jax.qwix.frozen_product import with_gradient
from loha_jax.qwix.operands import holds, stored_word
from loha_jax.qwix.rules import LoHaRule, check_stack, is_target, warn_of_unmatched
from loha_jax.qwix.storage import LinenStorage, NnxStorage, parameters
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.device_types import split_as
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.field_checks import refuse_unknown_kernel
from loha_jax.targets.matching import near_misses
from loha_jax.targets.module_names import Names, module_name, stack_names
from loha_jax.targets.row_transforms import row_transform
from loha_jax.targets.used_names import check_rows_used
from loha_jax.transform.options import Options
from loha_jax.transform.update_alone import update_alone
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.plan import Target, make_target

if TYPE_CHECKING:
    from loha_jax.qwix._qwix_internals import WithAux

Operand: TypeAlias = "jax.Array | WithAux[qwix.QArray]"
Product = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Use:
    """A kernel that is to be adapted, in a product of the running module.

    Attributes:
        module: the running module.
        path: of the kernel from the root of the model.
        config: of the adapter.
    """

    module: nn.Module | nnx.Module
    path: tuple[str, ...]
    config: LoHaConfig

    @property
    def name(self) -> str:
        """The module's default name."""
        return module_name(self.path)


class AdaptingProvider(qwix.PtqProvider):
    """A provider that adds adapters to products; the operations themselves are `LoHaProvider`'s.

    Attributes:
        config: PEFT's config, in the place of `LoHaRule`s, or None.
        names: torch names by default name, or None; see `loha_jax.inject`.
        targets: the adapted kernels, by path: known once the model has run.
    """

    def __init__(
        self,
        rules: Sequence[qwix.QuantizationRule],
        config: LoHaConfig | None,
        options: Options,
        *,
        names: Names | None,
        disable_jit: bool,
    ):
        super().__init__(rules, disable_jit=disable_jit)
        self.config = config
        self.names = names
        self.targets: dict[tuple[str, ...], tuple[Target, LoHaConfig]] = {}
        self._options = options
        self._seen: set[tuple[str, ...]] = set()  # parameters with a product
        self._lost: dict[tuple[str, ...], str] = {}  # parameters that no operand was known to be
        self._checked = False
        self._model: object = None  # during the first run

    def _computed(
        self,
        op: str,
        operands: Sequence[Operand],
        word: Callable[[], str],
        product: Callable[[DTypeLike | None], Product],
        base: Callable[[], jax.Array],
    ) -> jax.Array:
        """Return an operation with the update of its second operand, if that is to be adapted.

        Args:
            op: qwix' name of the operation.
            operands: of the operation; the second one may be an adapted kernel.
            word: returns the layout of the second operand.
            product: the operation as a function of both operands, for the dtype of its result.
            base: returns the operation without an update, as qwix computes it.
        """
        use, result = self._use(op, operands), base()
        if len(operands) != 2 or is_quantised(operands[0]):
            return result
        x, operand = cast(jax.Array, operands[0]), operands[1]
        if not self._options.forward_mode and (use or is_quantised(operand)):
            kernel = operand.array if is_quantised(operand) else operand
            result = with_gradient(product(result.dtype), x, kernel, result)
        leaf = None if use is None else self._leaf(use, word, operand)
        if use is None or leaf is None:  # None if the adapter has been merged or unloaded
            return result
        leaf = dataclasses.replace(leaf, names=(use.name,) * len(leaf.names))
        wide = float32_or_wider(result.dtype)
        update, stored, shape = product(wide), leaf.kernel.shape, operand.shape

        def reshaped(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return update(x, kernel if shape == stored else kernel.reshape(shape))

        delta = update_alone(reshaped, x, leaf, self._options)
        return (result.astype(wide) + split_as(delta, result)).astype(result.dtype)

    def _use(self, op: str, operands: Sequence[Operand]) -> _Use | None:
        """Return the second operand as a kernel to adapt; None if no adapter is asked for."""
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        wanted = self.config is not None or isinstance(rule, LoHaRule)
        if not wanted and self._checked:
            return None
        module, path = current_module(), current_path()
        known = list(parameters(module))
        found = next((n for x in operands[1:2] for n, p in known if holds(x, p)), None)
        if found is None:
            if wanted:
                self._note_lost(path, operands, known)
            return None
        place = (*path, found)
        name = module_name(place)
        self._seen.add(place)
        if not wanted:
            return None
        config = rule.config if isinstance(rule, LoHaRule) else self.config
        assert config is not None
        if self.config is not None and not is_target(self.config, name, self.names):
            return None
        if len(operands) != 2:
            raise ValueError(
                f"The kernel of {name} is one of {len(operands)} operands of an einsum, which no "
                "adapter fits. Split the einsum, or exclude the module."
            )
        return _Use(module, place, config)

    def _note_lost(
        self,
        path: tuple[str, ...],
        operands: Sequence[Operand],
        known: Sequence[tuple[str, Operand]],
    ) -> None:
        """Note a parameter that an operand may be, but in an order that is not known.

        An error says so after the first run, unless the parameter has been adapted by then.
        """
        for position, operand in enumerate(operands):
            for name, parameter in known:
                same = sorted(operand.shape) == sorted(parameter.shape) and operand.ndim > 1
                first = position != 1 and holds(operand, parameter)
                if first or (position == 1 and same and _made_of(operand, parameter)):
                    why = "stands first in its product" if first else "is transposed or changed"
                    self._lost.setdefault((*path, name), why)

    def _leaf(self, use: _Use, word: Callable[[], str], operand: Operand) -> LoHaWeight | None:
        """Return the adapted kernel; make its adapter while the model is initialised."""
        name = use.path[-1]
        if isinstance(use.module, nnx.Module):
            storage = NnxStorage(use.module, name)
            leaf = storage.leaf()
            if leaf is None and storage.can_create:
                target = self._target(use, word, operand)
                names = ("",) * len(target.names) if self.names is None else target.names
                storage.create(target, use.config, _parameter(use.module, name), names)
                leaf = storage.leaf()
            return leaf
        if use.module.is_initializing():
            instead = (
                "give the parameters the factors of `loha_jax.inject` on the pretrained ones, by "
                "`loha_jax.qwix.linen_params`"
            )
            refuse_unknown_kernel(use.config.init_weights, use.name, instead)
        if use.path not in self.targets:
            self._target(use, word, operand)
        target, config = self.targets[use.path]
        kernel = _parameter(use.module, name)
        if target.shape != kernel.shape:
            target = self._target(use, word, operand)
        return LinenStorage(use.module, name).leaf(target, config, kernel)

    def _target(self, use: _Use, word: Callable[[], str], operand: Operand) -> Target:
        """Return the plan of a new adapter."""
        kernel = _parameter(use.module, use.path[-1])
        shape, seen = tuple(kernel.shape), word()
        if not {"i", "o"} <= set(seen):
            raise self._refusal(
                use, f"its axes {list(operand.shape)} are not input and output axes of one product"
            )
        stored = stored_word(seen, operand.shape, shape)
        if stored is None:
            raise self._refusal(
                use, f"its shape {list(shape)} is reshaped to {list(operand.shape)} across its axes"
            )
        sizes = [size for size, kind in zip(shape, stored, strict=True) if kind == "s"]
        names = stack_names(use.name, sizes, self.names)
        like = jax.ShapeDtypeStruct(shape, kernel.dtype)
        rows = row_transform(use.name, self.names)
        target = make_target(use.config, use.path, names, Layout(stored), like, rows=rows)
        self.targets[use.path] = (target, use.config)
        return target

    def _refusal(self, use: _Use, reason: str) -> ValueError:
        return ValueError(
            f"The kernel of {use.name} ({'/'.join(use.path)}) cannot be adapted: {reason}. Narrow "
            "the rule's module_path, or put a rule for this module before it."
        )

    def process_model_inputs(
        self, model: Any, model_args: Sequence[Any], model_kwargs: dict[str, Any]
    ) -> tuple[Any, Sequence[Any], dict[str, Any]]:
        """Check before the run that adds the adapters that the model has none."""
        if isinstance(model, nnx.Module) and getattr(model, "disable_quant_stats_update", False):
            _refuse_adapted(model)
        if not self._checked:
            self._model = model
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: object) -> object:
        """Check after the first run that the rules have adapted something."""
        first = not self._checked and (method_name == "__call__" or self.targets)
        output = super().process_model_output(method_name, model_output)
        if first:
            self._checked = True
            self._check()
            check_rows_used(self.names, {module_name(path) for path in self._seen})
            if self.config is not None and isinstance(self._model, nnx.Module):
                for _, leaf in provided_among(self._model):
                    check_stack(self.config, leaf)
            if self.config is not None:
                warn_of_unmatched(self.config, map(module_name, self._seen), self.names)
            self._model = None
        return output

    def _check(self) -> None:
        lost = {path: why for path, why in self._lost.items() if path not in self.targets}
        if lost:
            which = ", ".join(f"{'/'.join(path)} {why}" for path, why in sorted(lost.items()))
            raise ValueError(
                f"These parameters match a rule, and no adapter fits their products: {which}. "
                "Exclude them from the rule, or use loha_jax.nnx.inject on a float model."
            )
        if not self.targets:
            raise ValueError(self._nothing_adapted())
        unused = [
            rule.module_path
            for rule, count in zip(self._rules, self._rule_matches, strict=True)
            if isinstance(rule, LoHaRule) and not count
        ]
        if unused:
            warn_caller(f"The rules for module_path={unused} match no operation.")

    def _nothing_adapted(self) -> str:
        """Return the error for rules, or a config, that match nothing."""
        if self.config is not None:
            targets = self.config.target_modules or ()
            wanted = [targets] if isinstance(targets, str) else sorted(targets)
            hint = near_misses(wanted, sorted(set(map(module_name, self._seen))))
            if self.config.layers_to_transform is not None or any(
                re.search(r"\d", name) for name in wanted
            ):
                hint += (
                    " A provider adapts all layers of a scan at once, before they have numbers: "
                    "name no single ones, or use loha_jax.nnx.inject on a float model."
                )
        else:
            wanted = [rule.module_path for rule in self._rules if isinstance(rule, LoHaRule)]
            known = sorted({"/".join(path[:-1]) for path in self._seen})
            parts = [name for name in known if any(re.search(path, name) for path in wanted)]
            hint = near_misses(wanted, parts or known)
            if parts:
                hint += " A module_path has to match the whole path (re.fullmatch)."
        return (
            f"No kernel was adapted: {wanted} match no module whose product is intercepted "
            f"(dot_general, dot, einsum, conv_general_dilated, ragged_dot).{hint}"
        )


def _refuse_adapted(model: nnx.Module) -> None:
    if intercepted_in(model):
        raise ValueError(
            "The model already has the adapters of a LoHaProvider. Apply one provider, with all "
            "its rules, to the float model. loha_jax.merge(model) makes a float model of this one."
        )
    if any(adapted_in(node) for _, node in nnx.iter_graph(model)):
        raise ValueError(
            "The model already has adapters of loha_jax.nnx, which a provider of qwix would not "
            "see. Remove them first with loha_jax.merge(model) or loha_jax.unload(model)."
        )


def _parameter(module: nn.Module | nnx.Module, name: str) -> Operand:
    return dict(parameters(module))[name]


def _made_of(operand: Operand, parameter: Operand) -> bool:
    """Return whether an operand was made of a parameter, by a traced operation or by its values."""
    if is_quantised(operand) or is_quantised(parameter):
        return False
    traced: object = operand
    while isinstance(traced, Tracer):
        equation = getattr(traced, "parent", None)
        if equation is None or len(equation.in_tracers) != 1:
            break
        traced = equation.in_tracers[0]
        if traced is parameter:
            return True
    if isinstance(traced, Tracer) or isinstance(parameter, Tracer):
        return False
    one, other = (np.sort(np.asarray(x, np.float32).ravel()) for x in (traced, parameter))
    return np.array_equal(one, other)
