"""Adapted kernels in loops, branches, transformations and custom derivatives."""

import jax
import jax.numpy as jnp
import pytest
from pullbacks import adapted, assert_close, check, normal

import loha_jax


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_takes_one_layer_of_a_stack_per_step(remat, length):
    def fn(p, x):
        def body(c, w):
            return (jnp.tanh(c @ w), c.sum())

        return jax.lax.scan(
            jax.checkpoint(body) if remat else body, x, jnp.asarray(p["layers"]["kernel"])
        )

    params = adapted({"layers": {"kernel": normal(length, 4, 4)}}, {"layers": "sio"}, r".*layers")
    check(fn, params, normal(5, 4, seed=1))


CONTROL = {
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "jit returns the weight": lambda w, x: x @ jax.jit(lambda w: w.T)(w).T,
    "scan with a constant": lambda w, x: jax.lax.scan(
        lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=3
    ),
    "scan carries the weight along": lambda w, x: jax.lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), None, length=3
    )[0][0],
    "scan over broadcast copies": lambda w, x: jax.lax.scan(
        lambda c, v: (jnp.tanh(c @ v), None), x, jnp.broadcast_to(w, (3, *w.shape))
    )[0],
    "reversed, unrolled scan": lambda w, x: jax.lax.scan(
        lambda c, t: (jnp.tanh(c @ w + t), c), x, jnp.arange(4.0), reverse=True, unroll=2
    ),
    "fori_loop": lambda w, x: jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x),
    "cond": lambda w, x: jax.lax.cond(x.sum() > 0, lambda c: c @ w, lambda c: c @ w.T * 2, x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda c: c, lambda c: c @ w], x),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "remat with a policy": lambda w, x: jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable
    )(w, x),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "vmap over the weight's columns": lambda w, x: jax.vmap(lambda c: x @ c, in_axes=1, out_axes=1)(
        w
    ),
    "grad inside": lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x),
    "jvp inside": lambda w, x: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (x,))[1],
    "hessian-vector product inside": lambda w, x: jax.grad(
        lambda x: jnp.vdot(jax.grad(lambda x: jnp.tanh(x @ w).sum())(x), x)
    )(x),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_and_transformations_inside(name):
    params = adapted({"m": {"kernel": normal(4, 4)}}, None, ["m"])
    dense = {"vmap over the weight's columns": ()}.get(name, ())
    # Reverse mode cannot go through a while loop of unknown length; fori_loop's is known, so it is
    # a scan.
    check(
        lambda p, x: CONTROL[name](jnp.asarray(p["m"]["kernel"]), x),
        params,
        normal(5, 4, seed=1),
        dense=dense,
    )


def test_while_loop_forward():
    def fn(p, x):
        w = jnp.asarray(p["m"]["kernel"])
        return jax.lax.while_loop(
            lambda c: (c[0] < 3) & (jnp.abs(c[1] @ w).max() < 1e6),
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)),
            (0, x),
        )[1]

    params = adapted({"m": {"kernel": normal(4, 4)}}, None, ["m"])
    x = normal(5, 4, seed=1)
    assert_close(jax.jit(loha_jax.adapt(fn))(params, x), fn(loha_jax.merge(params), x), 2e-5)
    assert not loha_jax.explain(fn, params, x).dense


@jax.custom_vjp
def doubled_gradient(w, x):
    return jnp.tanh(x @ w)


def _doubled_forward(w, x):
    return doubled_gradient(w, x), (w, x)


def _doubled_backward(residuals, g):
    w, x = residuals
    g = 2 * g * (1 - jnp.tanh(x @ w) ** 2)
    return x.T @ g, g @ w.T


doubled_gradient.defvjp(_doubled_forward, _doubled_backward)


@jax.custom_jvp
def straight_through(w, x):
    return jnp.tanh(x @ w)


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return straight_through(w, x), dx @ w + x @ dw


@pytest.mark.parametrize("fn", [doubled_gradient, straight_through])
def test_custom_derivatives_of_the_user_are_kept(fn):
    params = adapted({"m": {"kernel": normal(4, 6)}}, None, ["m"])
    check(lambda p, x: fn(jnp.asarray(p["m"]["kernel"]), x), params, normal(5, 4, seed=1))
    plain = jax.grad(lambda x: fn(jnp.asarray(loha_jax.merge(params)["m"]["kernel"]), x).sum())(
        normal(5, 4, seed=1)
    )
    ours = jax.grad(
        lambda x: loha_jax.adapt(lambda p, x: fn(p["m"]["kernel"], x))(params, x).sum()
    )(normal(5, 4, seed=1))
    assert_close(ours, plain, 2e-5)


def test_unequal_ranks_in_a_scanned_stack():
    params = adapted(
        {"layers": {"kernel": normal(3, 4, 4)}},
        {"layers": "sio"},
        r"layers\.[02]|[02]\.layers",
        rank_pattern={"2.layers": 5},
    )
    assert params["layers"]["kernel"].adapters["default"].ranks == (3, 0, 5)
    check(
        lambda p, x: jax.lax.scan(
            lambda c, w: (c @ w, None), x, jnp.asarray(p["layers"]["kernel"])
        )[0],
        params,
        normal(5, 4),
    )
