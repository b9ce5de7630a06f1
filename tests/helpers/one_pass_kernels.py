"""A kernel of an adapted product beside the products in float64."""

import jax.numpy as jnp
import numpy as np
from random_arrays import normal


def assert_equals_the_products(kernel, bound):
    """Compare y and h within `bound` of their largest entry."""
    rank, into, out = kernel.rank, kernel.into, kernel.out
    shapes = [(kernel.rows, into), (into, out), (rank, into), (rank, out)]
    x, w, kb, ka = (
        jnp.asarray(scale * normal(n, kernel.stack, *shape), kernel.dtype)
        for n, (shape, scale) in enumerate(zip(shapes, (1, 1, 1, rank**-0.5), strict=True))
    )
    y, h = kernel.run(x, jnp.swapaxes(w, 1, 2) if kernel.transposed else w, kb, ka)
    x, w, kb, ka = (np.asarray(a, np.float64) for a in (x, w, kb, ka))
    want_h = x @ np.swapaxes(kb, 1, 2)
    assert y.dtype == h.dtype == kernel.dtype
    for got, want in ((h, want_h), (y, x @ w + want_h @ ka)):
        np.testing.assert_allclose(
            np.asarray(got, float), want, rtol=0, atol=bound * abs(want).max(), err_msg=str(kernel)
        )
