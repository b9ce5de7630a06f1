"""Adapted kernels inside `jax.shard_map`, written by the model or around the adapted function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_arrays import normal_array

import loha_jax
from loha_jax.transform import one_pass_product
from tests.devices.meshes import collectives

WIDTH, HIDDEN, BATCH = 8, 16, 8
SPECS = {
    "up": P(None, "tensor"),
    "down": P("tensor"),
    "gathered": P("data"),
    "heads": P(None, "tensor"),
}
LAYOUTS = {"heads": "ioo"}


def init():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = {
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
        "gathered": (WIDTH, WIDTH),
        "heads": (WIDTH, 4, 3),
    }
    return {
        name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()
    }, jax.random.normal(next(keys), (BATCH, WIDTH))


def plain(params, x):
    heads = jnp.einsum("bd,dhk->bhk", x, params["heads"])
    return (
        jax.nn.gelu(x @ params["up"]) @ params["down"]
        + x @ params["gathered"]
        + heads.sum((1, 2))[:, None]
    )


def on_devices(params, x):
    """The same for one device's shards.

    Tensor parallelism is written by hand, and one kernel is gathered before its use.
    """
    y = jax.nn.gelu(x @ params["up"]) @ params["down"]
    y += jnp.einsum("bd,dhk->bhk", x, params["heads"]).sum((1, 2))[:, None]
    return jax.lax.psum(y, "tensor") + x @ jax.lax.all_gather(
        params["gathered"], "data", axis=0, tiled=True
    )


def inject(params):
    config = loha_jax.LoHaConfig(r=2, target_modules=list(SPECS), init_weights=False)
    return loha_jax.inject(params, config, key=jax.random.key(5), layouts=LAYOUTS)


def gradients(run, trainable, frozen, x):
    def loss(trainable, frozen, x):
        return jnp.mean(run(loha_jax.combine(trainable, frozen), x) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, x).compile()


@functools.cache
def expected():
    params, x = init()
    halves = loha_jax.partition(inject(params))
    return gradients(lambda params, x: plain(loha_jax.merge(params), x), *halves, x)(*halves, x)


def setting(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    params, x = init()
    placed = {
        name: jax.device_put(kernel, NamedSharding(mesh, SPECS[name]))
        for name, kernel in params.items()
    }
    return mesh, inject(placed), jax.device_put(x, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("strategy", ["auto", "fused", "dense"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto axes", "explicit axes"]
)
def test_model_with_a_shard_map(kind, check_vma, strategy):
    mesh, params, x = setting(kind)
    model = jax.shard_map(
        on_devices, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=P("data"), check_vma=check_vma
    )
    halves = loha_jax.partition(params)
    with jax.set_mesh(mesh):
        step = gradients(loha_jax.adapt(model, strategy=strategy), *halves, x)
        ours = step(*halves, x)
        uses = loha_jax.explain(model, params, x).uses
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, expected()
    )
    assert [use.strategy for use in uses] == ["factored"] * 4
    if (
        strategy == "auto" and check_vma
    ):  # one sum per product of the model, and sums and gathers of factors alone
        sizes = [size for _, size in collectives(step)]
        assert max(sizes) <= max(BATCH // 2 * WIDTH, 2 * HIDDEN, WIDTH * WIDTH)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("around", [False, True], ids=["in the model", "around it"])
def test_kernels_in_a_shard_map(around, check_vma, monkeypatch):
    """Those that suit one are kernels of each device's shards; outside, they are factored.

    JAX's interpreter cannot be checked for the axes that arrays vary over: that is only traced.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(one_pass_product, "INTERPRET", not check_vma)
    mesh, params, x = setting(AxisType.Auto)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params) if around else SPECS
    run, adapt = on_devices, functools.partial(loha_jax.adapt, strategy="pallas")
    run = adapt(run) if around else run
    where = {"mesh": mesh, "in_specs": (specs, P("data")), "out_specs": P("data")}
    run = jax.shard_map(run, check_vma=check_vma, **where)
    run = run if around else adapt(run)
    halves = loha_jax.partition(params)

    def loss(trainable, frozen, x):
        return jnp.mean(run(loha_jax.combine(trainable, frozen), x) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    with jax.set_mesh(mesh):
        assert str(step.trace(*halves, x).jaxpr).count("name=adapted_product") == 6
        outside = loha_jax.explain(plain, params, x, strategy="pallas").uses
        assert {use.strategy for use in outside} == {"factored"}
        if not check_vma:
            ours = step(*halves, x)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
                ours,
                expected(),
            )


def test_shard_map_around_the_adapted_model():
    mesh, params, x = setting(AxisType.Auto)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    run = jax.shard_map(
        loha_jax.adapt(on_devices), mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")
    )
    halves = loha_jax.partition(params)
    ours = gradients(run, *halves, x)(*halves, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, expected()
    )


def test_a_shard_that_is_no_block_of_the_factors():
    """Where the inner one of two out axes is split, the weight is formed: slower, never wrong."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    kernel, x = (
        normal_array(0, (6, 3, 8)),
        normal_array(1, (5, 6)),
    )
    config = loha_jax.LoHaConfig(r=2, target_modules=["heads"], init_weights=False)
    params = loha_jax.inject(
        {"heads": kernel}, config, key=jax.random.key(2), layouts={"heads": "ioo"}
    )
    model = jax.shard_map(
        lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["heads"]),
        mesh=mesh,
        in_specs=({"heads": P(None, None, "tensor")}, P()),
        out_specs=P(None, None, "tensor"),
    )
    expected = jnp.einsum("bd,dhk->bhk", x, loha_jax.merge(params)["heads"])
    np.testing.assert_allclose(loha_jax.adapt(model)(params, x), expected, rtol=1e-5, atol=1e-5)
    (use, *_) = loha_jax.explain(model, params, x).uses
    assert (use.strategy, use.primitive) == ("dense", "shard_map")
