"""`fit_loha`: the LoHa that comes closest to a given change of a weight."""

# JAX's and Optax' own functions are only partly typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from loha_jax.lowrank.truncated_svd import largest_singular_values, precise_product
from loha_jax.runtime.scalars import is_integer, plain_scalar

from ..disk.base_checkpoint import accumulator
from ..formats.adapter_file import AdapterModule

if TYPE_CHECKING:
    import optax

_STEPS_AT_ONCE = 20
_SMALLEST_GAIN = 1e-4
"""A fit ends when so many steps lower the error by less than this share."""
_SMALLEST_SCALE = 1e-12
"""Of a factor. The product of four is then just within float32."""
_MEMORY = 20
"""The steps that L-BFGS remembers."""
_NOISE = 0.01
"""Relative size of the noise in the start. Columns that are zero in both factors would stay so."""


class Pairs(NamedTuple):
    """The two pairs of factors."""

    w1_a: Float[Array, "out r"]
    w1_b: Float[Array, "r columns"]
    w2_a: Float[Array, "out r"]
    w2_b: Float[Array, "r columns"]

    def update(self) -> Float[Array, "out columns"]:
        """Return the product that they stand for."""
        first, second = precise_product(self.w1_a, self.w1_b), precise_product(self.w2_a, self.w2_b)
        return first * second


@dataclasses.dataclass(frozen=True)
class FittedLoHa:
    """A LoHa that was fitted to a change of a weight.

    Attributes:
        factors: hada_w1_a, hada_w2_a `[out, r]` and hada_w1_b, hada_w2_b `[r, in·prod(spatial)]`,
            float32, as in PEFT's files.
        r, alpha: the update is (w1_a @ w1_b) ⊙ (w2_a @ w2_b) · alpha/r.
        error: ‖change − update‖ / ‖change‖ (Frobenius); 0 for a change that is zero.
        lora_error: the same for the best LoRA with equally many parameters, of rank 2r.
        size: ‖change‖.

    Example:
        >>> fitted = fit_loha(np.eye(3), r=2, alpha=8)
        >>> fitted.alpha, fitted.factors["hada_w2_a"].shape
        (8.0, (3, 2))
    """

    factors: dict[str, np.ndarray]
    r: int
    alpha: float
    error: float
    lora_error: float
    size: float

    def module(self, name: str, shape: tuple[int, ...]) -> AdapterModule:
        """Return it as a module of an adapter file, for a weight `[out, in, *spatial]`."""
        in_shape = shape[1:] if len(shape) > 2 else None
        return AdapterModule(name, "loha", self.r, self.alpha, self.factors, in_shape=in_shape)


def fit_loha(
    change: ArrayLike | tuple[ArrayLike, ArrayLike],
    r: int,
    *,
    alpha: float | None = None,
    steps: int = 200,
    starts: int = 1,
) -> FittedLoHa:
    """Fit a LoHa of rank r to a change of a weight, such as that of full fine-tuning.

    It minimises the squared error with L-BFGS. The first start is good for most changes: one pair
    of factors is the best approximation of sign(change)·√|change|, the other that of √|change|. The
    result is a local minimum; more starts, which are random, may find a lower one.

    A LoRA of rank 2r has equally many parameters, and its best error comes from an SVD. It is often
    the smaller one: where few directions hold most of the change. LoHa is ahead where they do not.

    Args:
        change: `[out, in]` or `[out, in, *spatial]`, in torch's orientation: pass the transpose of
            a Dense kernel. Or the tuple (tuned weight, base weight). Torch's tensors are read too.
        r: the rank.
        alpha: of the result, which is scaled by alpha/r; by default r.
        steps: at most so many steps from each start. A fit ends before, when it stands still.
        starts: how many starts to try. The best result is returned.

    Returns:
        The factors and errors. It computes in float32, on JAX's default device, where the change
        has to fit several times.

    Raises:
        ValueError: r, alpha, steps or starts are out of range. Or the change has no two axes, is
            empty, a list or complex, holds values that are not finite or too far from 1 for factors
            in float32, or is a pair of unequal shapes.

    Source: LyCORIS' `extract` does this for LoRA and LoKr, and has no LoHa. L-BFGS is Optax'.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> base = generator.normal(size=(48, 64))
        >>> tuned = base + 0.1 * generator.normal(size=(48, 64))
        >>> fitted = fit_loha((tuned, base), r=4)
        >>> fitted.factors["hada_w1_b"].shape, fitted.error < fitted.lora_error
        ((4, 64), True)
    """
    r, alpha, steps, starts = checked_settings(r, alpha, steps, starts)
    matrix = _matrix(change)
    largest = float(np.abs(matrix).max(initial=0.0))
    if largest == 0:
        return _zero(matrix.shape, r, alpha)
    matrix = matrix / largest  # squares of very small or large values are 0 or inf
    size = math.sqrt(float(np.mean(np.square(matrix, dtype=np.float64))))
    scale = (size * largest) ** 0.25 * (r / alpha) ** 0.25
    if not _SMALLEST_SCALE < scale < 1 / _SMALLEST_SCALE:
        raise ValueError(
            f"`change` has values up to {largest:.3g}; with alpha={alpha:.3g}, the factors would "
            "be too large or too small for float32"
        )
    target = jnp.asarray(matrix / size, jnp.float32)
    fits = (_descend(target, _start(target, r, n), steps) for n in range(starts))
    pairs, error = min(fits, key=lambda fit: fit[1])
    norm = size * largest * math.sqrt(matrix.size)
    factors = {f"hada_{name}": np.asarray(x) * scale for name, x in pairs._asdict().items()}
    return FittedLoHa(factors, r, alpha, error, _lora_error(matrix, 2 * r), norm)


def checked_settings(
    r: int, alpha: float | None, steps: int, starts: int
) -> tuple[int, float, int, int]:
    """Return the settings of a fit as plain numbers; raise ValueError if one is out of range."""
    r, steps, starts = _count("r", r), _count("steps", steps), _count("starts", starts)
    return r, _positive("alpha", r if alpha is None else alpha), steps, starts


def _count(name: str, value: int) -> int:
    """Return a positive integer argument; raise ValueError for others."""
    count = plain_scalar(value)
    if not is_integer(count) or count < 1:
        raise ValueError(
            f"`{name}` should be a positive integer value but the value passed is {value!r}"
        )
    return count


def _positive(name: str, value: float) -> float:
    """Return a positive number as a float; raise ValueError for others."""
    number = plain_scalar(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0 < number <= sys.float_info.max:
        raise ValueError(f"`{name}` should be a positive number but the value passed is {value!r}")
    return float(number)


def _matrix(change: ArrayLike | tuple[ArrayLike, ArrayLike]) -> Float[np.ndarray, "out columns"]:
    """Return the change as a matrix, in float32 or wider.

    Raises:
        ValueError: it has no two axes, values that are not finite, or is a pair that does not fit.
    """
    if isinstance(change, tuple):
        if len(change) != 2:
            raise ValueError(
                f"`change` is an array or a pair (tuned, base), not a tuple of {len(change)}"
            )
        tuned, base = (_wide(part) for part in change)
        if tuned.shape != base.shape:
            raise ValueError(
                f"The tuned weight is {list(tuned.shape)} and the base weight {list(base.shape)}; "
                "they should have one shape"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            difference = tuned - base
    else:
        difference = _wide(change)
    if difference.ndim < 2 or not difference.size:
        raise ValueError(
            "`change` should be [out, in] or [out, in, *spatial], not empty, but has the shape "
            f"{list(difference.shape)}"
        )
    if not np.isfinite(difference).all():
        raise ValueError("`change` has values that are not finite; no LoHa comes close to it")
    return difference.reshape(len(difference), -1)  # [out, in, *spatial] -> [out, columns]


def _wide(array: ArrayLike) -> np.ndarray:
    """Return an array in float32 or wider; torch's too.

    Raises:
        ValueError: it is a list or complex.
    """
    if isinstance(array, list):
        raise ValueError("`change` is an array or a tuple (tuned, base), not a list")
    if hasattr(array, "detach"):  # of torch; numpy has no bfloat16
        tensor: Any = array
        tensor = tensor.detach().cpu()
        array = tensor if tensor.element_size() > 4 else tensor.float()
    values = np.asarray(array)
    if np.iscomplexobj(values):
        raise ValueError("`change` has complex values")
    return values.astype(accumulator(values.dtype), copy=False)


def _zero(shape: tuple[int, ...], r: int, alpha: float) -> FittedLoHa:
    """Return the LoHa of no change, which can be trained: one of its factors is zero."""
    out, columns = shape
    ones = {"a": np.ones((out, r), np.float32), "b": np.ones((r, columns), np.float32)}
    factors = {f"hada_w{n}_{side}": value for n in "12" for side, value in ones.items()}
    factors["hada_w2_a"] = np.zeros((out, r), np.float32)
    return FittedLoHa(factors, r, alpha, 0.0, 0.0, 0.0)


def _start(target: Float[Array, "out columns"], r: int, number: int) -> Pairs:
    """Return the start of a number: 0 is made from the target, the others are random."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 4)
    shapes = 2 * ((target.shape[0], r), (r, target.shape[1]))
    drawn = [
        jax.random.normal(key, shape) * r**-0.25 for key, shape in zip(keys, shapes, strict=True)
    ]  # both products have entries of mean square 1, as the target
    if number:
        return Pairs(*drawn)
    factors = [x for matrix in _roots(target) for x in _best(matrix, r)]
    return Pairs(*(x + _NOISE * noise for x, noise in zip(factors, drawn, strict=True)))


def _roots(
    target: Float[Array, "out columns"],
) -> tuple[Float[Array, "out columns"], Float[Array, "out columns"]]:
    """Return two matrices whose Hadamard product is the target."""
    root = jnp.sqrt(jnp.abs(target))
    return jnp.sign(target) * root, root


@functools.partial(jax.jit, static_argnums=1)
def _best(
    matrix: Float[Array, "out columns"], r: int
) -> tuple[Float[Array, "out {r}"], Float[Array, "{r} columns"]]:
    left, values, right = largest_singular_values(matrix, r)
    roots = jnp.sqrt(values)
    return left * roots[None, :], roots[:, None] * right


def _descend(target: Float[Array, "out columns"], start: Pairs, steps: int) -> tuple[Pairs, float]:
    """Return the factors that L-BFGS reaches from a start, and their relative error."""
    pairs, state, error = start, _optimizer().init(start), float(_relative_error(target, start))
    for done in range(0, steps, _STEPS_AT_ONCE):
        count = min(_STEPS_AT_ONCE, steps - done)
        moved, state = _some_steps(target, pairs, state, count)
        new = float(_relative_error(target, moved))
        if not new < error:  # the rounding of float32 is reached
            break
        gain, pairs, error = 1 - new / error, moved, new
        if gain < _SMALLEST_GAIN:
            break
    return pairs, error


def _optimizer() -> optax.GradientTransformationExtraArgs:
    import optax  # takes a while

    return optax.lbfgs(memory_size=_MEMORY)


@jax.jit
def _some_steps(
    target: Float[Array, "out columns"], pairs: Pairs, state: optax.OptState, count: int
) -> tuple[Pairs, optax.OptState]:
    """Take `count` steps of L-BFGS."""
    import optax

    optimizer = _optimizer()

    def loss(pairs: Pairs) -> jax.Array:
        return jnp.mean(jnp.square(pairs.update() - target))

    def step(_: int, carry: tuple[Pairs, optax.OptState]) -> tuple[Pairs, optax.OptState]:
        pairs, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(pairs, state=state)
        moves, state = optimizer.update(
            gradient, state, pairs, value=value, grad=gradient, value_fn=loss
        )
        return cast(Pairs, optax.apply_updates(pairs, moves)), state

    return jax.lax.fori_loop(0, count, step, (pairs, state))


@jax.jit
def _relative_error(target: Float[Array, "out columns"], pairs: Pairs) -> jax.Array:
    return jnp.linalg.norm(pairs.update() - target) / jnp.linalg.norm(target)


def _lora_error(matrix: Float[np.ndarray, "out columns"], rank: int) -> float:
    """Return the relative error of the best matrix of a rank (Eckart and Young, 1936)."""
    squares = np.linalg.svd(matrix, compute_uv=False).astype(np.float64) ** 2
    return math.sqrt(squares[rank:].sum() / squares.sum())
