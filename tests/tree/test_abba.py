"""`init_weights="abba"`: the first pair of factors holds the kernel's largest singular vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantised_kernels import KEY, QWIX, quantised

import loha_jax

RANDOM = np.random.default_rng(0)


def matrix(out, in_, values):
    """A matrix with these singular values."""
    u, _ = np.linalg.qr(RANDOM.standard_normal((out, out)))
    v, _ = np.linalg.qr(RANDOM.standard_normal((in_, in_)))
    return (u[:, : len(values)] * values) @ v[: len(values)]


def inject(kernel, layout, **fields):
    config = loha_jax.LoHaConfig(
        **{"r": 4, "target_modules": ["q"], "init_weights": "abba"} | fields
    )
    params = loha_jax.inject({"q": {"kernel": kernel}}, config, key=KEY, layouts={"q": layout})
    return params["q"]["kernel"].adapters["default"]


def first_product(factors):
    """w1_a w1_b, `[*stack, out, in·prod(spatial)]`, or with a core `[out, in, *spatial]`."""
    f = {name: np.asarray(x) for name, x in factors.tensors.items()}
    if "hada_t1" in f:
        return np.einsum("ijkl,jr,ip->prkl", f["hada_t1"], f["hada_w1_b"], f["hada_w1_a"])
    return f["hada_w1_a"] @ f["hada_w1_b"]


def truncated(weight, r):
    """The best approximation of rank r, with entries of mean square 1."""
    u, s, vt = np.linalg.svd(weight)
    best = (u[:, :r] * s[:r]) @ vt[:r]
    return best / np.sqrt(np.mean(best**2))


@pytest.mark.parametrize("values", [0.7 ** np.arange(40), 1 / np.arange(1, 41), [3, 2, 1, 1e-3]])
def test_the_first_pair_is_the_truncated_svd_of_the_kernel(values):
    weight = matrix(48, 64, np.asarray(values, float))
    factors = inject(jnp.asarray(weight.T, jnp.float32), "io")
    np.testing.assert_allclose(first_product(factors), truncated(weight, 4), atol=2e-2)
    sizes = [np.sqrt(np.mean(np.asarray(x) ** 2)) for x in (factors.hada_w1_a, factors.hada_w1_b)]
    np.testing.assert_allclose(*sizes, rtol=1e-4)
    assert not factors.hada_w2_a.any()


def test_each_layer_of_a_stack_has_its_own_vectors_also_at_its_own_rank():
    weights = [matrix(12, 10, 0.3 ** np.arange(10)) * size for size in (1, 1e-3, 50)]
    kernel = jnp.asarray(np.stack([w.T for w in weights], 1), jnp.float32)  # [in, stack, out]
    factors = inject(kernel, "iso", rank_pattern={"1.q": 2})
    got = first_product(factors)
    for n, (weight, r) in enumerate(zip(weights, (4, 2, 4), strict=True)):
        np.testing.assert_allclose(got[n], truncated(weight, r), atol=2e-3)
    assert not factors.hada_w1_a[1, :, 2:].any()


def test_a_core_is_the_kernel_seen_through_its_largest_vectors():
    """A kernel of Tucker rank 4 is found whole."""
    kernel = np.einsum(
        "klij,ip,jr->klrp", *(RANDOM.standard_normal(s) for s in ((3, 3, 4, 4), (4, 24), (4, 16)))
    )
    factors = inject(jnp.asarray(kernel, jnp.float32), "kkio", use_effective_conv2d=True)
    want = kernel.transpose(3, 2, 0, 1) / np.sqrt(np.mean(kernel**2))
    np.testing.assert_allclose(first_product(factors), want, atol=1e-4)
    for x in (factors.hada_w1_a, factors.hada_w1_b, factors.hada_t1):
        np.testing.assert_allclose(np.mean(np.asarray(x) ** 2), 4 ** (-2 / 3), rtol=1e-4)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_directions_that_the_kernel_does_not_have_are_drawn(rank, core):
    """Of a zero kernel, or one of rank 2, all parts of the update can be trained."""
    weight = matrix(12, 10 * 9, np.ones(rank)) if rank else np.zeros((12, 90))
    kernel = jnp.asarray(weight.reshape(12, 10, 3, 3).transpose(2, 3, 1, 0), jnp.float32)
    factors = inject(kernel, "kkio", use_effective_conv2d=core)
    assert np.mean(first_product(factors) ** 2) == pytest.approx(1, rel=0.3 if core else 1e-4)
    for x in (factors.hada_w1_a, factors.hada_w1_b):
        rows = np.asarray(x).reshape(4, -1) if core or x.shape[0] == 4 else np.asarray(x).T
        assert np.all(np.linalg.norm(rows, axis=1) > 0.1)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("core", [False, True])
def test_very_small_and_very_large_kernels(size, core):
    kernel = jnp.asarray(RANDOM.standard_normal((3, 3, 16, 24)) * size, jnp.float32)
    factors = inject(kernel, "kkio", use_effective_conv2d=core)
    usual = inject(kernel / size, "kkio", use_effective_conv2d=core)
    np.testing.assert_allclose(first_product(factors), first_product(usual), atol=1e-3)


def test_more_ranks_than_the_kernel_has_rows():
    factors = inject(jnp.asarray(RANDOM.standard_normal((64, 3)), jnp.float32), "io", r=6)
    assert np.linalg.matrix_rank(np.asarray(factors.hada_w1_b)) == 6
    assert np.mean(first_product(factors) ** 2) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("scheme", QWIX)
def test_a_quantised_kernel_gives_the_vectors_of_its_values(scheme):
    node = quantised(jnp.asarray(matrix(16, 12, 0.5 ** np.arange(12)).T, jnp.float32), scheme)
    values = np.asarray(loha_jax.dequantise({"q": node})["q"], float).T
    np.testing.assert_allclose(first_product(inject(node, "io")), truncated(values, 4), atol=1e-3)


def test_a_kernel_on_the_host_or_of_bfloat16_is_read_in_float32():
    kernel = jnp.asarray(matrix(16, 12, 0.5 ** np.arange(12)).T, jnp.bfloat16)
    want = truncated(np.asarray(kernel, float).T, 4)
    for given in (kernel, np.asarray(kernel, np.float32)):
        got = inject(given, "io").hada_w1_a
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(first_product(inject(given, "io")), want, atol=1e-3)


def test_shapes_are_those_of_other_initial_values():
    kernel = jax.ShapeDtypeStruct((3, 12, 10), jnp.bfloat16)
    shapes = [inject(kernel, "sio", init_weights=law).arrays for law in ("abba", True)]
    types = [{n: (x.shape, x.dtype) for n, x in arrays.items()} for arrays in shapes]
    assert types[0] == types[1]


def test_under_jit_the_factors_are_the_same():
    kernel = jnp.asarray(matrix(16, 12, 0.5 ** np.arange(12)).T, jnp.float32)
    jitted = jax.jit(lambda kernel: inject(kernel, "io").tensors)(kernel)
    for name, x in inject(kernel, "io").tensors.items():
        np.testing.assert_allclose(jitted[name], x, atol=1e-5)
