"""`RowTransform` by itself: exact where it can be, and its errors."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from loha_jax.lowrank.row_transform import RowTransform

RNG = np.random.default_rng(0)


def formula(array, permutation, scale):
    """Row n is row permutation[n] of each block, times scale, in float64."""
    size = len(permutation)
    rows = [n - n % size + permutation[n % size] for n in range(len(array))]
    return np.stack([np.asarray(array[n], np.float64) * scale for n in rows])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1, 8, -0.25])
def test_permutations_and_powers_of_two_are_exact(dtype, scale):
    order, array = [2, 0, 3, 1], RNG.normal(size=(12, 5)).astype(dtype)
    rows = RowTransform(order, scale)
    there = rows.to_torch(array)
    assert there.dtype == dtype
    np.testing.assert_array_equal(np.asarray(there, np.float64), formula(array, order, scale))
    np.testing.assert_array_equal(rows.from_torch(there), array)
    np.testing.assert_array_equal(rows.to_torch(array.T, 1), there.T)
    np.testing.assert_array_equal(rows.from_torch(there.T, 1), array.T)


def test_another_scale_rounds_once():
    """Each value is the float32 that is nearest to the exact product or quotient."""
    array = RNG.normal(size=4096).astype(np.float32)
    rows = RowTransform(scale=128**0.5)
    exact = array.astype(np.longdouble) * np.longdouble(rows.scale)
    np.testing.assert_array_equal(rows.to_torch(array), exact.astype(np.float32))
    exact = array.astype(np.longdouble) / np.longdouble(rows.scale)
    np.testing.assert_array_equal(rows.from_torch(array), exact.astype(np.float32))
    np.testing.assert_allclose(rows.from_torch(rows.to_torch(array)), array, rtol=1.2e-7)
    half = array.astype(ml_dtypes.bfloat16)  # a wider result is no rounded half
    wide = half.astype(np.float64) / rows.scale
    np.testing.assert_array_equal(rows.from_torch(half, dtype=np.float32), wide.astype(np.float32))


def test_rotary_rows_are_those_of_interleaved_pairs():
    """Feature i of Hugging Face's halves is 2i, or 2i + 1, of the pairs; the same in every head."""
    pairs = np.arange(24).reshape(3, 8)
    halves = np.concatenate([pairs[:, ::2], pairs[:, 1::2]], 1)
    np.testing.assert_array_equal(RowTransform.rotary(8).to_torch(pairs.ravel()), halves.ravel())
    assert RowTransform.rotary(8, 2.0) == RowTransform((0, 2, 4, 6, 1, 3, 5, 7), 2)
    assert len({RowTransform([1, 0]), RowTransform((1, 0)), RowTransform((1, 0), 2)}) == 2
    assert repr(RowTransform.rotary(16, 4)) == "RowTransform(<16 rows>, scale=4)"
    assert RowTransform(scale=jnp.float32(4)).scale == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 0],), ValueError, "each of 0 … 1 once, got 2 numbers: 0, 0"),
        (([1, 2],), ValueError, "each of 0 … 1 once"),
        (([],), ValueError, "empty"),
        (([0.0, 1.0],), TypeError, "integer"),
        ((None, 0), ValueError, "finite and not 0, got 0"),
        ((None, float("nan")), ValueError, "finite"),
        ((None, float("inf")), ValueError, "finite"),
        ((None, "2"), TypeError, "number, got '2'"),
        ((None, True), TypeError, "number"),
    ],
)
def test_what_is_no_transform(arguments, error, message):
    with pytest.raises(error, match=message):
        RowTransform(*arguments)


@pytest.mark.parametrize("head", [0, -2, 5])
def test_rotary_heads_are_even(head):
    with pytest.raises(ValueError, match=f"positive and even, got {head}"):
        RowTransform.rotary(head)


def test_what_does_not_fit():
    rows = RowTransform([1, 0, 2], 2)
    with pytest.raises(ValueError, match="blocks of 3 rows, and it has 4"):
        rows.to_torch(np.zeros(4))
    with pytest.raises(ValueError, match="scales by 2, which does not fit int8"):
        rows.to_torch(np.zeros(3, np.int8))
    with pytest.raises(ValueError, match="does not fit float8"):
        rows.to_torch(np.zeros(3, ml_dtypes.float8_e4m3fn))
    with pytest.raises(ValueError, match="too large for float16"):
        rows.to_torch(np.full(3, 6e4, np.float16))
    assert np.isinf(rows.to_torch(np.full(3, np.inf, np.float16))).all()
    assert (
        rows.problem((2, 3)) is rows.problem((6,)) is RowTransform(scale=2).problem((5, 1)) is None
    )
    assert RowTransform(range(6)).problem((2, 3)) is None
    assert "blocks of 3 rows, and it has 12 = 2 x 6" in rows.problem((2, 6))
    assert "and it has 6 = 3 x 2" in rows.problem((3, 2))
    np.testing.assert_array_equal(rows.unscaled.to_torch(np.arange(3, dtype=np.int8)), [1, 0, 2])
