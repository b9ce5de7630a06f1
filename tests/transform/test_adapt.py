"""`adapt(fn)` against `fn(merge(params))` on plain arrays, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pullbacks import (
    KEY,
    adapted,
    assert_close,
    check,
    normal,
)

import loha_jax
from loha_jax import LoHaConfig


def test_a_direct_lax_call_works_under_adapt():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(lambda p, x: jax.lax.dot(x, p["m"]["kernel"]), params, normal(5, 4, seed=1), plain=False)


def test_two_adapters_share_one_product():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    more = loha_jax.inject(
        params, LoHaConfig(r=2, target_modules=["m"], init_weights=False), key=KEY, adapter_name="b"
    )
    both = loha_jax.set_adapter(more, ["default", "b"])
    check(lambda p, x: x @ p["m"]["kernel"], both, normal(5, 4, seed=1))


def test_bfloat16_follows_pefts_dtype_rule():
    params = adapted({"m": {"kernel": normal(64, 48, dtype=jnp.bfloat16)}}, None, ["m"])
    x = normal(32, 64, seed=1, dtype=jnp.bfloat16)
    y = jax.jit(loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"], strategy="factored"))(params, x)
    assert y.dtype == jnp.bfloat16
    # PEFT: (base(x)[bf16] + F.linear(x.float(), dW fp32)).to(bf16)
    f = params["m"]["kernel"].adapters["default"]
    delta = (
        (np.asarray(f.hada_w1_a) @ np.asarray(f.hada_w1_b))
        * (np.asarray(f.hada_w2_a) @ np.asarray(f.hada_w2_b))
        * 2
    )
    base = np.asarray(x, np.float64) @ np.asarray(params["m"]["kernel"].kernel, np.float64)
    expected = base + np.asarray(x, np.float64) @ delta.T
    # Two roundings to bfloat16, of the base's product (XLA may skip that one) and of the sum: half
    # of 2**-7 each.
    assert (
        np.abs(np.asarray(y, np.float64) - expected)
        <= 2**-8 * (np.abs(base) + np.abs(expected)) + 1e-4
    ).all()


def test_forward_mode():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    x = normal(5, 4, seed=1)

    def fn(p, x):
        return x @ p["m"]["kernel"]

    trainable, frozen = loha_jax.partition(params)
    for strategy in ("factored", "fused", "dense"):
        run = loha_jax.adapt(fn, strategy=strategy, forward_mode=True)
        tangent = jax.jvp(
            lambda t, run=run: run(loha_jax.combine(t, frozen), x), (trainable,), (trainable,)
        )[1]
        delta = fn(loha_jax.merge(params), x) - fn(loha_jax.unload(params), x)
        assert_close(tangent, 4 * delta, 2e-5)  # the update is of degree 4 in the factors
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda t: loha_jax.adapt(fn)(loha_jax.combine(t, frozen), x), (trainable,), (trainable,)
        )


def test_vmap_over_adapters_outside():
    base = {"m": {"kernel": normal(4, 6)}}
    several = [
        adapted(base, None, ["m"], r=2),
        jax.tree.map(lambda x: x * 1.1, adapted(base, None, ["m"], r=2)),
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    x = normal(5, 4, seed=1)
    run = loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"])
    out = jax.vmap(run, in_axes=(0, None))(stacked, x)
    assert_close(out, jnp.stack([x @ loha_jax.merge(p)["m"]["kernel"] for p in several]), 2e-5)


def test_arguments_that_are_no_arrays_stay_as_they_are():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])

    def fn(p, x, *, training, mode, scale):
        assert training is True
        assert mode == "sum"
        assert scale == 2
        return {"out": x @ p["m"]["kernel"] * scale, "mode": mode, "none": None}

    out = loha_jax.adapt(fn)(params, normal(5, 4), training=True, mode="sum", scale=2)
    assert out["mode"] == "sum"
    assert out["none"] is None
    assert_close(out["out"], 2 * normal(5, 4) @ loha_jax.merge(params)["m"]["kernel"], 2e-5)


def test_parameters_that_are_returned_are_returned_adapted():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    _, same = loha_jax.adapt(lambda p, x: (x @ p["m"]["kernel"], p))(params, normal(5, 4))
    assert same["m"]["kernel"] is params["m"]["kernel"]
    transposed = loha_jax.adapt(lambda p: p["m"]["kernel"].T)(params)
    assert_close(transposed, loha_jax.merge(params)["m"]["kernel"].T, 2e-5)


def test_values_closed_over_from_an_outer_trace():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])

    def outer(x):
        return loha_jax.adapt(lambda p: (x @ p["m"]["kernel"]).sum())(params)

    gradient = jax.jit(jax.grad(outer))(normal(5, 4))
    assert_close(gradient, jnp.ones((5, 6)) @ loha_jax.merge(params)["m"]["kernel"].T, 2e-5)


def test_saved_modules_are_used_and_trained():
    base = {"q": {"kernel": normal(4, 4)}, "head": {"kernel": normal(4, 2), "bias": normal(2)}}
    params = adapted(base, None, ["q"], modules_to_save=["head"])
    check(
        lambda p, x: (x @ p["q"]["kernel"]) @ p["head"]["kernel"] + p["head"]["bias"],
        params,
        normal(5, 4),
    )


def test_inactive_adapters_cost_nothing():
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    off = loha_jax.set_adapter(params, ())
    run = loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"])
    assert_close(run(off, normal(5, 4)), normal(5, 4) @ loha_jax.unload(params)["m"]["kernel"], 0)
    assert str(jax.make_jaxpr(run)(off, normal(5, 4))).count("dot_general") == 1


def test_the_frozen_base_gets_no_gradient_and_costs_none():
    params = adapted({"m": {"kernel": normal(64, 64)}}, None, ["m"])
    for run in (
        loha_jax.adapt(lambda p, x: x @ p["m"]["kernel"]),
        lambda p, x: x @ p["m"]["kernel"],
    ):
        gradient = jax.grad(lambda p, run=run: run(p, normal(5, 64)).sum())(params)
        assert not gradient["m"]["kernel"].kernel.any()
        assert gradient["m"]["kernel"].adapters["default"].hada_w1_a.any()


def test_sharding_constraints_and_named_scopes_pass_through():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))

    def fn(p, x):
        with jax.named_scope("mine"):
            return x @ jax.lax.with_sharding_constraint(jnp.asarray(p["m"]["kernel"]), spec)

    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(fn, params, normal(5, 4))
    assert "mine" in jax.jit(loha_jax.adapt(fn)).lower(params, normal(5, 4)).as_text(
        debug_info=True
    )


def test_constants_come_back_as_jax_returns_them():
    params, array = adapted({"q": {"kernel": normal(4, 4)}}), np.arange(3.0)

    def fn(p, x):
        numbers = [1, 2.0, True, np.float32(3), np.int64(2), x.shape]
        return [*numbers, array, jnp.zeros(2), None, "s", x, p["q"]["kernel"] @ x]

    x = np.ones(4, np.float32)
    got = loha_jax.adapt(fn)(params, x)
    assert got[9] == "s"
    del got[9]
    want = jax.jit(lambda p, x: [o for o in fn(p, x) if not isinstance(o, str)])(
        loha_jax.merge(params), x
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(g, jax.Array)
        assert (g.dtype, g.weak_type) == (w.dtype, w.weak_type)
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-4)


def test_a_function_that_closes_over_its_weights_is_told_so():
    params, x = adapted({"q": {"kernel": normal(4, 4)}}), normal(2, 4)

    def closed(x):
        return x @ params["q"]["kernel"]

    for fn, args in ((closed, (x,)), (partial(lambda p, x: x @ p["q"]["kernel"], params), (x,))):
        with pytest.warns(
            UserWarning, match=r"closes over adapted kernels .*Pass the adapted tree"
        ) as caught:
            got = loha_jax.adapt(fn)(*args)
        assert caught[0].filename == __file__
        np.testing.assert_allclose(
            got, x @ loha_jax.merge(params)["q"]["kernel"], rtol=0, atol=1e-5
        )
        explanation = loha_jax.explain(fn, x)
        assert not explanation.uses
        assert "No argument holds a kernel with an active adapter; the function closes over" in str(
            explanation
        )
    plain = loha_jax.explain(lambda p, x: x @ p["q"]["kernel"], loha_jax.unload(params), x)
    assert str(plain).endswith(
        "No argument holds a kernel with an active adapter. Pass the adapted tree as an argument."
    )
