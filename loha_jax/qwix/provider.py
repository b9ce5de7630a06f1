"""`LoHaProvider`: LoHa as a qwix provider, in the place of `qwix.LoraProvider`.

qwix runs a model with some functions of JAX intercepted, and asks its provider for the result of
each product. This provider takes the product with the base kernel from qwix, quantised or not, and
adds x·ΔW, computed from the factors as `loha_jax.adapt` computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
import qwix
from flax import linen as nn
from flax import nnx
from jax import lax

from loha_jax.lowrank.hadamard import float32_or_wider
from loha_jax.lowrank.layout import einsum_layout
from loha_jax.qwix._qwix_internals import WithAux, current_module, current_path, is_quantised
from loha_jax.qwix.frozen_product import with_gradient
from loha_jax.qwix.operands import holds, product_word, stored_word
from loha_jax.qwix.rules import LoHaRule, checked_config, is_target, target_of
from loha_jax.qwix.storage import LinenStorage, NnxStorage, parameters
from loha_jax.runtime.caller import warn_caller
from loha_jax.runtime.device_types import split_as
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.matching import near_misses
from loha_jax.targets.module_names import module_name, stack_names
from loha_jax.transform.adapt import make_options
from loha_jax.transform.update_alone import update_alone
from loha_jax.tree.leaves import LoHaWeight
from loha_jax.tree.plan import Target

Operand = jax.Array | WithAux
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
        """The module's name in PEFT's files."""
        return module_name(self.path)


class LoHaProvider(qwix.PtqProvider):
    """Adds LoHa adapters to a Flax model, NNX or Linen, whose base may be quantised.

    The base parameters stay where and what they are. Beside a kernel called `kernel`, an NNX module
    gets the factors `kernel_lora_hada_w1_a`, … as `nnx.LoRAParam`s, so trainers that know LoRA
    train these alone; a Linen module gets parameters of these names.

    Args:
        rules: `LoHaRule`s for adapted modules, and `qwix.QuantizationRule`s for modules that are
            only quantised; the first one that matches a module counts.
        config: PEFT's config, instead of `LoHaRule`s: which modules are adapted, with what rank and
            alpha (`rank_pattern`, `alpha_pattern`). `rules` then only say how the base is
            quantised.
        strategy: "auto", "factored", "fused" or "dense", or a dict by module name; see
            `loha_jax.adapt`.
        training: whether "auto" counts the backward pass.
        forward_mode: use plain products that `jax.jvp` can differentiate.
        disable_jit: see `qwix.PtqProvider`.
        **fields: of the only rule, instead of `rules`: a `LoHaRule`'s, or with `config` a
            `qwix.QuantizationRule`'s.

    Raises:
        ValueError: `rules` and fields are both given, the config needs what a provider cannot do,
            or, when the model runs for the first time, nothing is adapted.

    Example:
        >>> import qwix
        >>> from flax import nnx
        >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 8))
        >>> provider = LoHaProvider(rank=2, alpha=4.0, weight_qtype="int8")
        >>> model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
        >>> model.kernel_lora_hada_w1_a.shape
        (6, 2)
    """

    def __init__(
        self,
        rules: Sequence[qwix.QuantizationRule] | None = None,
        *,
        config: LoHaConfig | None = None,
        strategy: str | dict[str, str] = "auto",
        training: bool = True,
        forward_mode: bool = False,
        disable_jit: bool = False,
        **fields: object,
    ):
        if rules is not None and fields:
            raise ValueError(f"Give either rules or the fields of one rule, not both: {fields}")
        if "dropout" in fields:
            raise TypeError(
                "LoHa has no `dropout` of the input: its dropouts are `rank_dropout` (of the "
                "update's rows) and `module_dropout`"
            )
        if rules is None:
            rules = [(LoHaRule if config is None else qwix.QuantizationRule)(**fields)]  # type: ignore[arg-type]
        if config is not None and any(isinstance(rule, LoHaRule) for rule in rules):
            raise ValueError(
                "With `config` the rules only say how the base is quantised: write them as "
                "qwix.QuantizationRule, or leave `config` out."
            )
        super().__init__(rules, disable_jit=disable_jit)
        self.config = None if config is None else checked_config(config)
        self._options = make_options(strategy, training, forward_mode)
        self.targets: dict[tuple[str, ...], tuple[Target, LoHaConfig]] = {}
        """The adapted kernels, by path: known once the model has run."""
        self._seen: set[str] = set()  # modules with a product of a parameter
        self._lost: dict[tuple[str, ...], str] = {}  # parameters that no operand was known to be
        self._checked = False

    # --- the operations that qwix intercepts ---

    def dot_general(
        self,
        lhs: jax.Array,
        rhs: Operand,
        dimension_numbers: lax.DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        *,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, with the update of an adapted `rhs`."""

        def base() -> jax.Array:
            return super(LoHaProvider, self).dot_general(
                lhs,
                rhs,
                dimension_numbers,
                precision,
                preferred_element_type,
                out_sharding=out_sharding,
            )

        def product(dtype: object) -> Product:
            return lambda x, kernel: lax.dot_general(
                x,
                kernel,
                dimension_numbers,
                precision=precision,
                preferred_element_type=dtype,
                out_sharding=out_sharding,
            )

        (_, contracted), (_, batch) = dimension_numbers

        def word() -> str:
            return product_word(rhs.ndim, contracted, batch)

        return self._computed(
            "dot_general", (lhs, rhs), word, product, preferred_element_type, base
        )

    def einsum(
        self,
        einsum_str: str,
        *operands: Operand,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        _dot_general: Callable[..., jax.Array] = lax.dot_general,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.numpy.einsum`, with the update of an adapted second operand."""

        def base() -> jax.Array:
            return super(LoHaProvider, self).einsum(
                einsum_str,
                *operands,
                precision=precision,
                preferred_element_type=preferred_element_type,
                _dot_general=_dot_general,
                out_sharding=out_sharding,
            )

        def product(dtype: object) -> Product:
            return lambda x, kernel: jnp.einsum(
                einsum_str,
                x,
                kernel,
                precision=precision,
                preferred_element_type=dtype,
                out_sharding=out_sharding,
            )

        def word() -> str:
            shapes = [np.zeros((1,) * operand.ndim) for operand in operands]
            given, result, _ = opt_einsum.parser.parse_einsum_input((einsum_str, *shapes))
            return einsum_layout(f"{given}->{result}") or "?"

        return self._computed("einsum", operands, word, product, preferred_element_type, base)

    def conv_general_dilated(
        self,
        lhs: jax.Array,
        rhs: Operand,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.lax.conv_general_dilated`, with the update of an adapted `rhs`."""
        window = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": dimension_numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
        }
        common = {**window, "precision": precision, "out_sharding": out_sharding}

        def base() -> jax.Array:
            return super(LoHaProvider, self).conv_general_dilated(
                lhs, rhs, **common, preferred_element_type=preferred_element_type
            )

        def product(dtype: object) -> Product:
            return lambda x, kernel: lax.conv_general_dilated(
                x, kernel, **common, preferred_element_type=dtype
            )

        def word() -> str:
            if batch_group_count > 1 or any(n > 1 for n in lhs_dilation or ()):
                return "?"  # a gradient, or a transposed convolution
            numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
            _, into, *spatial = numbers.rhs_spec
            return product_word(rhs.ndim, (into,), (), spatial)

        return self._computed(
            "conv_general_dilated", (lhs, rhs), word, product, preferred_element_type, base
        )

    def ragged_dot(self, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, **kwargs: object):
        """`jax.lax.ragged_dot`, with the update of adapted experts; see `ragged_dot_general`."""
        numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
        dtype = kwargs.pop("preferred_element_type", None)

        def product(dtype: object) -> Product:
            return lambda x, kernel: lax.ragged_dot(
                x, kernel, group_sizes, preferred_element_type=dtype, **kwargs
            )

        return self._ragged("ragged_dot", lhs, rhs, numbers, product, dtype)

    def ragged_dot_general(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        group_sizes: jax.Array,
        ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
        **kwargs: object,
    ) -> jax.Array:
        """`jax.lax.ragged_dot_general`, with the update of adapted experts.

        Each expert is a module of its own. qwix quantises no such kernels. ΔW is materialised.
        """
        numbers = ragged_dot_dimension_numbers
        dtype = kwargs.pop("preferred_element_type", None)

        def product(dtype: object) -> Product:
            return lambda x, kernel: lax.ragged_dot_general(
                x, kernel, group_sizes, numbers, preferred_element_type=dtype, **kwargs
            )

        return self._ragged("ragged_dot_general", lhs, rhs, numbers, product, dtype)

    def _ragged(
        self,
        op: str,
        lhs: jax.Array,
        rhs: jax.Array,
        numbers: lax.RaggedDotDimensionNumbers,
        product: Callable[[object], Product],
        dtype: object,
    ) -> jax.Array:
        def word() -> str:
            (_, contracted), (_, batch) = numbers.dot_dimension_numbers
            return product_word(rhs.ndim, contracted, (*batch, *numbers.rhs_group_dimensions))

        def base() -> jax.Array:
            return product(dtype)(lhs, rhs)

        return self._computed(op, (lhs, rhs), word, product, dtype, base)

    def get_intercept_map(self) -> dict[str, Callable[..., object]]:
        """Return what qwix intercepts, and ragged products."""
        ragged = {
            "jax.lax.ragged_dot": self.ragged_dot,
            "jax.lax.ragged_dot_general": self.ragged_dot_general,
        }
        return super().get_intercept_map() | ragged

    # --- the same for all of them ---

    def _computed(
        self,
        op: str,
        operands: Sequence[Operand],
        word: Callable[[], str],
        product: Callable[[object], Product],
        dtype: object,
        base: Callable[[], jax.Array],
    ) -> jax.Array:
        """Return an operation with the update of its second operand, if that is to be adapted.

        Args:
            op: qwix' name of the operation.
            operands: of the operation; the second one may be an adapted kernel.
            word: returns the layout of the second operand.
            product: the operation as a function of both operands, for the dtype of its result.
            dtype: of the result; None for the operands'.
            base: returns the operation without an update, as qwix computes it.
        """
        use, result = self._use(op, operands), base()
        plain = len(operands) != 2 or is_quantised(operands[0])
        if not plain and not self._options.forward_mode and (use or is_quantised(operands[1])):
            kernel = operands[1].array if is_quantised(operands[1]) else operands[1]
            result = with_gradient(product(result.dtype), operands[0], kernel, result)
        leaf = None if use is None else self._leaf(use, word, operands[1])
        if use is None or leaf is None:  # None if the adapter has been merged or unloaded
            return result
        leaf = dataclasses.replace(leaf, names=(use.name,) * len(leaf.names))
        wide = float32_or_wider(result.dtype)
        update, stored, shape = product(wide), leaf.kernel.shape, operands[1].shape

        def reshaped(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return update(x, kernel if shape == stored else kernel.reshape(shape))

        delta = update_alone(reshaped, operands[0], leaf, self._options)
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
        self._seen.add(name)
        if not wanted:
            return None
        config = self.config if self.config is not None else rule.config
        if self.config is not None and not is_target(self.config, name):
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
        """Return the adapted kernel, in its own shape; a new adapter if the model is initialised."""
        name = use.path[-1]
        if isinstance(use.module, nnx.Module):
            storage = NnxStorage(use.module, name)
            leaf = storage.leaf()
            if leaf is None and storage.can_create:
                target = self._target(use, word, operand)
                storage.create(target, use.config, _parameter(use.module, name))
                leaf = storage.leaf()
            return leaf
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
        names = stack_names(use.name, sizes, None)
        target = target_of(use.config, use.path, names, stored, kernel)
        self.targets[use.path] = (target, use.config)
        return target

    def _refusal(self, use: _Use, reason: str) -> ValueError:
        return ValueError(
            f"The kernel of {use.name} ({'/'.join(use.path)}) cannot be adapted: {reason}. Narrow "
            "the rule's module_path, or put a rule for this module before it."
        )

    def process_model_output(self, method_name: str, model_output: object) -> object:
        """Check after the first run that the rules have adapted something."""
        first = not self._checked and (method_name == "__call__" or self.targets)
        output = super().process_model_output(method_name, model_output)
        if first:
            self._checked = True
            self._check()
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
            wanted = (
                [str(self.config.target_modules)]
                if self.config is not None
                else [rule.module_path for rule in self._rules if isinstance(rule, LoHaRule)]
            )
            known = sorted(self._seen)
            raise ValueError(
                f"No kernel was adapted: {wanted} match no module whose product is intercepted "
                f"(dot_general, dot, einsum, conv_general_dilated, ragged_dot).{near_misses(wanted, known)}"
            )
        unused = [
            rule.module_path
            for rule, count in zip(self._rules, self._rule_matches, strict=True)
            if isinstance(rule, LoHaRule) and not count
        ]
        if unused:
            warn_caller(f"The rules for module_path={unused} match no operation.")


def _parameter(module: nn.Module | nnx.Module, name: str) -> Operand:
    return dict(parameters(module))[name]


def _made_of(operand: Operand, parameter: Operand) -> bool:
    """Return whether an operand was made of a parameter, by a traced operation or by its values."""
    if is_quantised(operand) or is_quantised(parameter):
        return False
    traced: object = operand
    while isinstance(traced, jax.core.Tracer):
        equation = getattr(traced, "parent", None)
        if equation is None or len(equation.in_tracers) != 1:
            break
        traced = equation.in_tracers[0]
        if traced is parameter:
            return True
    if isinstance(traced, jax.core.Tracer) or isinstance(parameter, jax.core.Tracer):
        return False
    values = (np.sort(np.asarray(x, np.float32).ravel()) for x in (traced, parameter))
    return bool(np.array_equal(*values))
