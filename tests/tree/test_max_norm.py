import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig

KEY = jax.random.key(0)
KERNELS = {
    "dense": ((5, 6), "io", False),
    "stack": ((3, 5, 6), "sio", False),
    "convolution": ((3, 3, 4, 6), "kkio", False),
    "cores": ((3, 3, 4, 6), "kkio", True),
}


def adapted(kind, **options):
    shape, layout, cores = KERNELS[kind]
    config = LycorisConfig(
        r=3,
        alpha=2,
        target_modules=["q"],
        init_weights=False,
        use_effective_conv2d=cores,
        **options,
    )
    params = loha_jax.inject(
        {"q": {"kernel": jnp.zeros(shape)}}, config, key=KEY, layouts={"q": layout}
    )
    if options.get("use_scalar"):
        leaf = params["q"]["kernel"]
        (f,) = leaf.adapters.values()
        scalar = jnp.linspace(-1.0, 2.0, f.scalar.size).reshape(f.scalar.shape) - 0.1
        params["q"]["kernel"] = dataclasses.replace(
            leaf, adapters={"default": dataclasses.replace(f, scalar=scalar)}
        )
    return params


def norms(params, kind):
    """The norms of the merged updates, which stand on a base of zeros."""
    update = np.asarray(loha_jax.merge(params)["q"]["kernel"], np.float64)
    stack = KERNELS[kind][1].count("s")
    return np.sqrt((update**2).reshape(*update.shape[:stack], -1).sum(-1))


@pytest.mark.parametrize("use_scalar", [False, True], ids=["factors", "scalar"])
@pytest.mark.parametrize("kind", KERNELS)
def test_larger_updates_shrink_to_the_limit(kind, use_scalar):
    """Larger updates shrink to the limit and smaller ones stay as they are."""
    params = adapted(kind, use_scalar=use_scalar)
    before = norms(params, kind)
    limit = float(np.median(before)) * (1 if before.ndim else 0.5)
    limited = jax.jit(loha_jax.apply_max_norm)(params, limit)
    np.testing.assert_allclose(norms(limited, kind), np.minimum(before, limit), rtol=1e-5)
    update, shrunk = (np.asarray(loha_jax.merge(p)["q"]["kernel"]) for p in (params, limited))
    ratio = (np.minimum(before, limit) / before).reshape(
        *before.shape, *(1,) * (update.ndim - before.ndim)
    )
    np.testing.assert_allclose(shrunk, update * ratio, rtol=1e-4, atol=1e-7)
    loose = loha_jax.apply_max_norm(params, 2 * float(before.max()))
    for a, b in zip(jax.tree.leaves(loose), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_adapters_that_are_named_are_limited():
    config = LoHaConfig(r=2, target_modules=["q"], init_weights=False)
    params = loha_jax.inject(
        {"q": {"kernel": jnp.zeros((4, 4))}}, config, key=KEY, adapter_name="a"
    )
    params = loha_jax.inject(params, config, key=KEY, adapter_name="b")

    def of(p, name):
        return float(jnp.linalg.norm(loha_jax.merge(p, [name])["q"]["kernel"]))

    limit = of(params, "a") / 4
    for given, limited in ((None, ["b"]), (["a"], ["a"]), (["a", "b"], ["a", "b"])):
        result = loha_jax.apply_max_norm(params, limit, given)
        for name in ("a", "b"):
            assert of(result, name) == pytest.approx(
                limit if name in limited else of(params, name), rel=1e-5
            )


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(limit):
    with pytest.raises(ValueError, match="max_norm should be a positive number"):
        loha_jax.apply_max_norm(adapted("dense"), limit)


def test_an_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="Adapter other not found"):
        loha_jax.apply_max_norm(adapted("dense"), 1.0, ["other"])
