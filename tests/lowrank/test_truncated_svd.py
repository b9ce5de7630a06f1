"""The largest singular values, beside numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loha_jax.lowrank.truncated_svd import largest_singular_values


def matrix(rows, columns):
    """Singular values fall slowly, so the start of the iteration can be seen in the result."""
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_result_does_not_depend_on_the_default_kind_of_random_keys(impl):
    weight = jnp.asarray(matrix(48, 64))
    usual = largest_singular_values(weight, 4)
    with jax.default_prng_impl(impl):
        others = largest_singular_values(weight, 4)
    for one, other in zip(usual, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_more_values_than_the_matrix_has_are_zero():
    weight = matrix(6, 5)
    left, values, right = largest_singular_values(jnp.asarray(weight), 7)
    want = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(values, [*want, 0, 0], rtol=1e-5)
    np.testing.assert_allclose((left * values) @ right, weight, atol=1e-5)
