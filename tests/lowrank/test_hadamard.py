"""Values against numpy, gradients against JAX's float64 autodiff of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from random_arrays import normal

from loha_jax import hada_weight, hada_weight_cp, khatri_rao_columns, khatri_rao_rows

VALUES = (1, 2, 5)
# (o, i, r): each pair of values of two of them stands in one of the nine.
SIZES = [(VALUES[n], VALUES[m], VALUES[(n + m) % 3]) for n in range(3) for m in range(3)]
SPATIAL = [(3, 3), (3, 1), (1, 3), (4, 1), (5,), (2, 2, 2)]


def flat_factors(o, i, r, stack=()):
    return [normal(n, *stack, *shape) for n, shape in enumerate([(o, r), (r, i), (o, r), (r, i)])]


def cp_factors(o, i, r, spatial, stack=()):
    shapes = [(r, r, *spatial), (r, o), (r, i)] * 2
    return [normal(n, *stack, *shape) for n, shape in enumerate(shapes)]


def plain(w1_a, w1_b, w2_a, w2_b, scale):
    return (w1_a @ w1_b) * (w2_a @ w2_b) * scale


def plain_cp(t1, w1_a, w1_b, t2, w2_a, w2_b, scale):
    first = jnp.einsum("ij...,jq,ip->pq...", t1, w1_b, w1_a)
    return first * jnp.einsum("ij...,jq,ip->pq...", t2, w2_b, w2_a) * scale


def assert_same_derivatives(fn, reference, args, bound=1e-12):
    @jax.jit
    def value_and_gradients(*args):
        out, pullback = jax.vjp(fn, *args)
        expected, expected_pullback = jax.vjp(reference, *args)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return out, pullback(cotangent), expected, expected_pullback(cotangent)

    out, gradients, expected, expected_gradients = value_and_gradients(*args)
    np.testing.assert_allclose(out, expected, rtol=bound, atol=bound)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(
            got, want, rtol=bound, atol=bound * float(jnp.abs(want).max() + 1)
        )


@pytest.mark.parametrize(("o", "i", "r"), SIZES)
def test_hada_weight_equals_autodiff(o, i, r):
    """`hada_weight` and its gradients equal autodiff in float64."""
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (*flat_factors(o, i, r), np.array(1.7))]
        assert_same_derivatives(hada_weight, plain, args)


@pytest.mark.parametrize(
    ("o", "i", "r", "spatial"),
    # each value of each of the three with every kernel
    [(*SIZES[3 * n + (n + k) % 3], space) for k, space in enumerate(SPATIAL) for n in range(3)],
)
def test_hada_weight_cp_equals_autodiff(o, i, r, spatial):
    """`hada_weight_cp` and its gradients equal autodiff in float64."""
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (*cp_factors(o, i, r, spatial), np.array(0.6))]
        assert_same_derivatives(hada_weight_cp, plain_cp, args)


@pytest.mark.parametrize(("o", "i", "r"), SIZES)
def test_khatri_rao_factors_multiply_to_the_update(o, i, r):
    with jax.enable_x64(True):
        a1, b1, a2, b2 = map(jnp.asarray, flat_factors(o, i, r, (2,)))
        ka, kb = khatri_rao_rows(a1, a2), khatri_rao_columns(b1, b2)
        assert ka.shape == (2, o, r * r)
        assert kb.shape == (2, r * r, i)
        np.testing.assert_allclose(ka @ kb, plain(a1, b1, a2, b2, 1.0), rtol=1e-12, atol=1e-12)


def test_stacks_equal_their_parts(x64):
    scale = jnp.array([0.5, 2.0])
    factors = [jnp.asarray(x) for x in flat_factors(3, 4, 2, (2,))]
    cores = [jnp.asarray(x) for x in cp_factors(3, 4, 2, (3, 3), (2,))]
    for n in range(2):
        np.testing.assert_allclose(
            hada_weight(*factors, scale)[n], hada_weight(*(f[n] for f in factors), scale[n])
        )
        np.testing.assert_allclose(
            hada_weight_cp(*cores, scale)[n], hada_weight_cp(*(f[n] for f in cores), scale[n])
        )


def test_forward_mode_works_when_asked_for(x64):
    args = tuple(jnp.asarray(x) for x in flat_factors(3, 4, 2))
    tangent = jax.jvp(lambda *a: hada_weight(*a, forward_mode=True), args, args)[1]
    np.testing.assert_allclose(
        tangent, 4 * hada_weight(*args), rtol=1e-12
    )  # of degree 4 in the factors
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(hada_weight, args, args)


def test_bfloat16_accumulates_in_float32():
    exact = flat_factors(32, 48, 16)
    low = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    expected = plain(*(np.asarray(x, np.float64) for x in low), 1.0)
    got = hada_weight(*low)
    assert got.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_only_the_factors_are_saved_for_the_backward_pass():
    args = [jnp.asarray(x, jnp.float32) for x in flat_factors(64, 96, 4)]
    _, pullback = jax.vjp(hada_weight, *args)
    assert max(leaf.size for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size")) <= 96 * 4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 2), (3, 5), (4, 2), (2, 5)], "hada_w1_a .* and hada_w1_b .* do not fit"),
        ([(4, 2), (2, 5), (4, 3), (2, 5)], "hada_w2_a"),
        ([(4, 2), (2, 5), (3, 2), (2, 5)], "two factors differ"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        hada_weight(*(jnp.ones(shape) for shape in shapes))


def test_cp_shapes_that_do_not_fit_are_named():
    good = [jnp.ones(x.shape) for x in cp_factors(4, 5, 2, (3, 3))]
    with pytest.raises(ValueError, match="hada_t1"):
        hada_weight_cp(jnp.ones((3, 2, 3, 3)), *good[1:])
    with pytest.raises(ValueError, match="two factors differ"):
        hada_weight_cp(*good[:3], jnp.ones((2, 2, 1, 3)), *good[4:])


def test_shapes_in_annotations_are_checked():
    """Wrong shapes that would broadcast in silence are errors under test."""
    with pytest.raises(TypeCheckError, match="khatri_rao_rows"):
        khatri_rao_rows(jnp.ones((5, 2)), jnp.ones((1, 2)))
