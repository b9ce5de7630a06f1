"""`LoHaProvider`: LoHa as a qwix provider, in the place of `qwix.LoraProvider`.

qwix runs a model with some functions of JAX intercepted, and asks its provider for the result of
each product. This provider takes the product with the base kernel from qwix, quantised or not, and
adds x·ΔW, computed from the factors as `loha_jax.adapt` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax import lax
from jax.typing import DTypeLike
from opt_einsum import parser

from loha_jax.lowrank.layout import einsum_layout
from loha_jax.qwix.adapting_provider import AdaptingProvider, Operand, Product
from loha_jax.qwix.operands import product_word
from loha_jax.qwix.rules import LoHaRule, checked_config
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import Names
from loha_jax.transform.adapt import make_options


class LoHaProvider(AdaptingProvider):
    """Adds LoHa adapters to a Flax model, NNX or Linen, whose base may be quantised.

    The base parameters stay where and what they are. Beside a kernel called `kernel`, an NNX module
    gets the factors `kernel_lora_hada_w1_a`, … as `nnx.LoRAParam`s, so trainers that know LoRA
    train only these. A Linen module gets parameters of these names.

    Args:
        rules: `LoHaRule`s for adapted modules, and `qwix.QuantizationRule`s for modules that are
            only quantised; the first one that matches a module counts.
        config: PEFT's config, instead of `LoHaRule`s: which modules are adapted, with what rank and
            alpha (`rank_pattern`, `alpha_pattern`). `rules` then only say how the base is
            quantised.
        names: torch names of the adapted modules, for files and for `config`; see
            `loha_jax.inject`. A kernel that a scan stacks takes one name with `{}`.
        strategy: "auto", "factored", "fused" or "dense", or a dict by module name; see
            `loha_jax.adapt`.
        compute_dtype: as for `loha_jax.adapt`.
        training: whether "auto" counts the backward pass.
        forward_mode: use plain products that `jax.jvp` can differentiate.
        disable_jit: see `qwix.PtqProvider`.
        **fields: of the only rule, instead of `rules`: a `LoHaRule`'s, or with `config` a
            `qwix.QuantizationRule`'s.

    Raises:
        ValueError: `rules` and fields are both given, a rule is a `qwix.LoraRule`, the config needs
            what a provider cannot do, or, when the model runs for the first time, nothing is
            adapted or the model has adapters already.

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
        names: Names | None = None,
        strategy: str | dict[str, str] = "auto",
        compute_dtype: str = "auto",
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
            kind = LoHaRule if config is None else qwix.QuantizationRule
            rules = [kind(**fields)]  # type: ignore[arg-type]
        if any(isinstance(rule, qwix.LoraRule) for rule in rules):
            raise ValueError(
                "A qwix.LoraRule is for qwix.LoraProvider: here a kernel would get neither LoRA "
                "nor LoHa. Write it as a loha_jax.qwix.LoHaRule."
            )
        if config is not None and any(isinstance(rule, LoHaRule) for rule in rules):
            raise ValueError(
                "With `config` the rules only say how the base is quantised: write them as "
                "qwix.QuantizationRule, or leave `config` out."
            )
        checked = None if config is None else checked_config(config)
        options = make_options(strategy, training, forward_mode, compute_dtype)
        super().__init__(rules, checked, options, names=names, disable_jit=disable_jit)

    # --- the operations that qwix intercepts ---

    def dot_general(  # type: ignore[override]
        self,
        lhs: jax.Array,
        rhs: Operand,
        dimension_numbers: lax.DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, with the update of an adapted `rhs`."""

        common: dict[str, Any] = {"precision": precision, "out_sharding": out_sharding}

        def base() -> jax.Array:
            return super(LoHaProvider, self).dot_general(
                lhs, rhs, dimension_numbers, **common, preferred_element_type=preferred_element_type
            )

        def product(dtype: DTypeLike | None) -> Product:
            return lambda x, kernel: lax.dot_general(
                x, kernel, dimension_numbers, **common, preferred_element_type=dtype
            )

        (_, contracted), (_, batch) = dimension_numbers

        def word() -> str:
            return product_word(rhs.ndim, contracted, batch)

        return self._computed("dot_general", (lhs, rhs), word, product, base)

    def einsum(
        self,
        einsum_str: str,
        *operands: Operand,
        precision: lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        _dot_general: Callable[..., jax.Array] = lax.dot_general,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.numpy.einsum`, with the update of an adapted second operand."""

        common: dict[str, Any] = {"precision": precision, "out_sharding": out_sharding}

        def base() -> jax.Array:
            return super(LoHaProvider, self).einsum(
                einsum_str,
                *operands,  # type: ignore[arg-type]
                **common,
                preferred_element_type=preferred_element_type,
                _dot_general=_dot_general,
            )

        def product(dtype: DTypeLike | None) -> Product:
            return lambda x, kernel: jnp.einsum(
                einsum_str, x, kernel, **common, preferred_element_type=dtype
            )

        def word() -> str:
            shapes = [np.zeros((1,) * operand.ndim) for operand in operands]
            given, result, _ = parser.parse_einsum_input((einsum_str, *shapes))
            return einsum_layout(f"{given}->{result}") or "?"

        return self._computed("einsum", operands, word, product, base)

    def conv_general_dilated(  # type: ignore[override]
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
        preferred_element_type: DTypeLike | None = None,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.lax.conv_general_dilated`, with the update of an adapted `rhs`."""
        common = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": dimension_numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            "precision": precision,
            "out_sharding": out_sharding,
        }

        def base() -> jax.Array:
            return super(LoHaProvider, self).conv_general_dilated(
                lhs, rhs, **common, preferred_element_type=preferred_element_type
            )

        def product(dtype: DTypeLike | None) -> Product:
            return lambda x, kernel: lax.conv_general_dilated(
                x, kernel, **common, preferred_element_type=dtype
            )

        def word() -> str:
            if batch_group_count > 1 or any(n > 1 for n in lhs_dilation or ()):
                return "?"  # a gradient, or a transposed convolution
            numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
            _, into, *spatial = numbers.rhs_spec
            return product_word(rhs.ndim, (into,), (), spatial)

        return self._computed("conv_general_dilated", (lhs, rhs), word, product, base)

    def ragged_dot_general(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        group_sizes: jax.Array,
        ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        group_offset: jax.Array | None = None,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> jax.Array:
        """`jax.lax.ragged_dot_general`, which `ragged_dot` calls, with the update of experts.

        Each expert is a module of its own. qwix quantises no such kernels.
        """
        numbers = ragged_dot_dimension_numbers
        common: dict[str, Any] = {"precision": precision, "out_sharding": out_sharding}
        common["group_offset"] = group_offset

        def product(dtype: DTypeLike | None) -> Product:
            return lambda x, kernel: lax.ragged_dot_general(
                x, kernel, group_sizes, numbers, **common, preferred_element_type=dtype
            )

        def word() -> str:
            (_, contracted), (_, batch) = numbers.dot_dimension_numbers
            return product_word(rhs.ndim, contracted, (*batch, *numbers.rhs_group_dimensions))

        def base() -> jax.Array:
            return product(preferred_element_type)(lhs, rhs)

        return self._computed("ragged_dot_general", (lhs, rhs), word, product, base)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Return what qwix intercepts, and ragged products."""
        ragged = {"jax.lax.ragged_dot_general": self.ragged_dot_general}
        return super().get_intercept_map() | ragged
