import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linen_reference import KEY, close, each_case, flat, randomised, shapes_of

import loha_jax
from loha_jax import linen
from loha_jax.linen import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEmbed


@pytest.mark.usefixtures("x64")
@each_case
def test_fedpara_is_the_flax_layer_with_the_product_as_its_kernel(case):
    layer, x = (
        case.layer(fedpara=True, alpha=None, param_dtype=jnp.float64),
        case.inputs(jnp.float64),
    )
    params = randomised(shapes_of(case, layer))
    plain = case.plain(param_dtype=jnp.float64)
    base = shapes_of(case, plain)
    assert {n for n in params if not n.startswith("hada")} == set(base) - {case.kernel}

    def dense(params):
        rest = {n: v for n, v in params.items() if not n.startswith("hada")}
        kernel = case.fold(params, base[case.kernel].shape, 1.0)
        return plain.apply({"params": {**rest, case.kernel: kernel}}, x, method=case.method)

    def own(params):
        return layer.apply({"params": params}, x, method=case.method)

    def run(fn):
        def loss(params):
            y = fn(params)
            return (y**2).sum(), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (got, y), (want, y_want) = run(own), run(dense)
    close(y, y_want)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [
        (LoHaDense(64, r=4), (1, 48), 48),
        (LoHaDense(64, r=4, alpha=12), (1, 48), 48),
        (LoHaDenseGeneral((8, 8), axis=(-2, -1), r=6), (1, 6, 8), 48),
        (LoHaDenseGeneral(16, batch_dims=(0,), r=4), (3, 1, 48), 48),
        (LoHaConv(32, (3, 3), r=4), (1, 4, 4, 16), 144),
        (LoHaConv(32, (3, 3), r=4, use_effective_conv2d=True), (1, 4, 4, 16), 144),
        (LoHaConv(32, (3,), r=8, use_effective_conv2d=True, feature_group_count=2), (1, 4, 32), 48),
        (LoHaEmbed(64, 48, r=4), None, 48),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_fedpara_starts_with_the_variance_of_lecun_and_he(layer, shape, fan_in, scale):
    """The mean of W² over 400 keys is within 5 standard errors of scale / fan_in.

    Each key is a nearly independent sample.
    """
    layer = layer.clone(fedpara=True, variance_scale=scale)
    x = jnp.zeros((1,), jnp.int32) if shape is None else jnp.zeros(shape)
    abstract = jax.eval_shape(layer.init, KEY, x)

    @jax.jit
    def mean_square(key):
        params = layer.init(key, x)
        kernel = loha_jax.unload(linen.to_adapted(params, layer.init, KEY, x))["params"]
        (name,) = {"kernel", "embedding"} & set(kernel)
        return (kernel[name] ** 2).mean(), kernel[name].mean()

    squares, means = (
        np.asarray(v) for v in jax.lax.map(mean_square, jax.random.split(jax.random.key(7), 400))
    )
    assert abs(squares.mean() - scale / fan_in) < 5 * squares.std() / np.sqrt(len(squares))
    assert (
        squares.std() / np.sqrt(len(squares)) < 0.05 * scale / fan_in
    )  # the bound above says something
    assert abs(means.mean()) < 5 * means.std() / np.sqrt(len(means))
    assert "kernel" not in abstract["params"]


def test_fedpara_reaches_full_rank_with_the_parameters_of_rank_2r():
    params = LoHaDense(64, r=8, fedpara=True).init(KEY, jnp.ones((1, 64)))["params"]
    assert sum(np.size(v) for n, v in params.items() if n.startswith("hada")) == 2 * 8 * (64 + 64)
    weight = flat({n: np.asarray(v, np.float64) for n, v in params.items()}, 1.0)
    assert np.linalg.matrix_rank(weight) == 64  # 2r is 16


def test_fedpara_learns_what_no_matrix_of_rank_2r_can():
    """The identity: the best matrix of rank 2r leaves a squared error of n - 2r."""
    n, r = 16, 4
    layer, x = LoHaDense(n, r=r, fedpara=True, use_bias=False), jnp.eye(n)
    params = layer.init(KEY, x)
    tx = optax.adam(optax.cosine_decay_schedule(5e-2, 3000))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: ((layer.apply(p, x) - x) ** 2).sum())(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, None, 3000))((params, tx.init(params)))
    assert losses[-1] < 0.5 * (n - 2 * r)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_dropout": 0.1},
        {"module_dropout": 0.1},
        {"init_weights": False},
        {"strategy": "fused"},
        {"alpha": 0},
        {"variance_scale": 0.0},
    ],
    ids=str,
)
def test_fedpara_refuses_what_has_no_meaning_for_it(fields):
    with pytest.raises(
        ValueError, match=f"LoHaDense at the root: with fedpara=True .*Got {next(iter(fields))}="
    ):
        LoHaDense(4, fedpara=True, **fields).init(KEY, jnp.ones((1, 2)))


def test_forward_mode():
    x = jax.random.normal(KEY, (2, 3))
    for fields in ({"init_weights": False}, {"fedpara": True}):
        layer = LoHaDense(4, r=2, forward_mode=True, **fields)
        params = layer.init(KEY, x)

        def f(p, layer=layer):
            return layer.apply(p, x)

        tangent = randomised(params)
        if "kernel" in tangent["params"]:
            tangent["params"]["kernel"] *= 0
        out = jax.jvp(f, (params,), (tangent,))[1]
        gradient = jax.grad(lambda p, f=f, out=out: (f(p) * out).sum())(params)
        inner = sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
        )
        np.testing.assert_allclose(inner, (out**2).sum(), rtol=1e-4)
