"""Training on a mesh gives what training on one device gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_arrays import normal_array

import loha_jax
from tests.devices.meshes import BATCH, LENGTH, SETTINGS, WIDTH, adapter, init, model, place

pytestmark = pytest.mark.usefixtures(
    "x64"
)  # Adam divides by small numbers: in float32 it shows rounding


def train(params, x, run, *, accumulate=1, steps=3, tx=None):
    """Losses, factors and optimizer state after some steps of a jitted, donated training step."""
    tx = optax.adamw(1e-2) if tx is None else tx
    trainable, frozen = loha_jax.partition(params)
    optimizer_state = tx.init(trainable)

    def loss(trainable, frozen, x, key):
        params = loha_jax.dropout(loha_jax.combine(trainable, frozen), key)
        return jnp.mean((run(params, x) - 1) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, optimizer_state, frozen, x, key):
        if accumulate == 1:
            value, grads = jax.value_and_grad(loss)(trainable, frozen, x, key)
        else:
            parts = x.reshape(accumulate, -1, *x.shape[1:])

            def add(total, part):
                new = jax.value_and_grad(loss)(trainable, frozen, part, key)
                return jax.tree.map(lambda a, b: a + b / accumulate, total, new), None

            zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), trainable))
            (value, grads), _ = jax.lax.scan(add, zeros, parts)
        updates, optimizer_state = tx.update(grads, optimizer_state, trainable)
        return optax.apply_updates(trainable, updates), optimizer_state, value

    losses = []
    for n in range(steps):
        given = jax.tree.leaves((trainable, optimizer_state))
        key = jax.random.fold_in(jax.random.key(9), n)
        trainable, optimizer_state, value = step(trainable, optimizer_state, frozen, x, key)
        assert all(a.is_deleted() for a in given if a.ndim), "donated"
        losses.append(value)
    return losses, trainable, optimizer_state


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), ours, theirs)


@functools.cache
def single(accumulate=1, **fields):
    x = normal_array(1, (BATCH, LENGTH, WIDTH))
    params = loha_jax.inject(init(jax.random.key(0)), adapter(**fields), key=jax.random.key(2))
    return jax.device_get(train(params, x, loha_jax.adapt(model), accumulate=accumulate))


def sharded(name, kind=AxisType.Auto, accumulate=1, **fields):
    setting = dataclasses.replace(SETTINGS[name], kind=kind)
    mesh = setting.make_mesh()
    with jax.set_mesh(mesh):
        x = normal_array(1, (BATCH, LENGTH, WIDTH))
        x = jax.device_put(x, NamedSharding(mesh, setting.batch))
        params = loha_jax.inject(
            place(init(jax.random.key(0)), setting, mesh), adapter(**fields), key=jax.random.key(2)
        )
        losses, trainable, state = train(params, x, loha_jax.adapt(model), accumulate=accumulate)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, loha_jax.partition(params)[0])
    jax.tree.map(
        lambda a, s: a.sharding.is_equivalent_to(s, a.ndim) or pytest.fail(f"{a.sharding}"),
        trainable,
        shardings,
    )
    return losses, trainable, state


@pytest.mark.parametrize("name", SETTINGS)
def test_auto_axes(name):
    assert_same(sharded(name), single())


@pytest.mark.parametrize("name", ["data", "fsdp", "data and tensor", "fsdp and tensor"])
def test_explicit_axes(name):
    assert_same(sharded(name, AxisType.Explicit), single())


def test_accumulation_and_dropout():
    fields = {"rank_dropout": 0.3, "module_dropout": 0.2}
    assert_same(sharded("fsdp and tensor", accumulate=4, **fields), single(accumulate=4, **fields))
    assert_same(single(accumulate=4)[0], single()[0])


# Stacked kernels: layers of a scan, and experts.

LAYERS, EXPERTS = 4, 8


def scanned(params, x):
    def layer(x, kernels):
        return x + jnp.tanh(x @ kernels["up"]) @ kernels["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0]


def experts(params, x):
    h = jax.nn.gelu(jnp.einsum("ebd,edf->ebf", x, params["experts"]["up"]))
    return jnp.einsum("ebf,efd->ebd", h, params["experts"]["down"])


STACKED = {
    # model, kernels' stack, x's shape, mesh, up, down, x
    "scan, fsdp and tensor": (
        *(scanned, LAYERS, (BATCH, WIDTH), {"fsdp": 4, "tensor": 2}),
        *(P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P("fsdp")),
    ),
    "scan, layers split": (
        *(scanned, LAYERS, (BATCH, WIDTH), {"layers": 4, "tensor": 2}),
        *(P("layers", None, "tensor"), P("layers", "tensor"), P()),
    ),
    "experts": (
        experts,
        EXPERTS,
        (EXPERTS, BATCH, WIDTH),
        {"experts": 8},
        P("experts"),
        P("experts"),
        P("experts"),
    ),
    "experts and tensor": (
        *(experts, EXPERTS, (EXPERTS, BATCH, WIDTH), {"experts": 4, "tensor": 2}),
        *(P("experts", None, "tensor"), P("experts", "tensor"), P("experts")),
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_kernels(name):
    function, stack, x_shape, mesh_shape, up, down, x_spec = STACKED[name]
    group = "layers" if function is scanned else "experts"
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = {
        "up": jax.random.normal(keys[0], (stack, WIDTH, 48)) / 6,
        "down": jax.random.normal(keys[1], (stack, 48, WIDTH)) / 7,
    }
    x = jax.random.normal(keys[2], x_shape)
    layouts = {f"{group}.up": "sio", f"{group}.down": "sio"}
    config = loha_jax.LoHaConfig(
        r=2, target_modules=["up", "down", r".*\.(up|down)"][:2], init_weights=False
    )
    inject = functools.partial(
        loha_jax.inject, config=config, key=jax.random.key(5), layouts=layouts
    )

    expected = train(inject({group: kernels}), x, loha_jax.adapt(function))
    mesh = jax.make_mesh(
        tuple(mesh_shape.values()), tuple(mesh_shape), axis_types=(AxisType.Auto,) * len(mesh_shape)
    )
    specs = {"up": up, "down": down}
    placed = {n: jax.device_put(kernels[n], NamedSharding(mesh, specs[n])) for n in kernels}
    params = inject({group: placed})
    assert params[group]["up"].adapters["default"].hada_w1_a.sharding.spec[:1] == up[:1]
    ours = train(params, jax.device_put(x, NamedSharding(mesh, x_spec)), loha_jax.adapt(function))
    assert_same(ours, expected)
