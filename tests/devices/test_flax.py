"""Flax' own ways of saying how parameters are split.

Linen's boxes with logical names, NNX' metadata.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_arrays import normal_array

import loha_jax
import loha_jax.nnx
from loha_jax import LoHaConfig

RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None), ("batch", "fsdp"))
CONFIG = LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False)


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def logical(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(16, kernel_init=logical("embed", "mlp"), name="up")(x))
        return x + nn.Dense(8, kernel_init=logical("mlp", "embed"), name="down")(h), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.with_logical_constraint(x, ("batch", None))
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = Block(name="first")(x, None)
        return scanned(name="rest")(x, None)[0]


def test_linen_logical_names():
    """Shard everything from abstract parameters, as Flax' guide does, then train on the mesh."""
    model, x = Net(), normal_array(1, (16, 8))
    layouts = {r"rest\..*": "sio"}
    inject = functools.partial(
        loha_jax.inject, config=CONFIG, key=jax.random.key(3), layouts=layouts
    )

    def create():
        return inject(model.init(jax.random.key(0), x)["params"])

    abstract = jax.eval_shape(create)
    specs = nn.get_partition_spec(abstract)
    kernel = specs["rest"]["up"]["kernel"]
    assert kernel.kernel == P("layers", "embed", "mlp")
    assert kernel.adapters["default"].hada_w1_a == P("layers", "mlp", None)
    assert kernel.adapters["default"].hada_w1_b == P("layers", None, "embed")
    shardings = nn.logical_to_mesh_sharding(specs, mesh(), RULES)
    params = jax.jit(create, out_shardings=shardings)()
    up = params["first"]["up"]["kernel"]
    assert up.kernel.value.sharding.spec == P("fsdp", "tensor")
    assert up.adapters["default"].hada_w1_a.value.sharding.spec == P("tensor", None)
    assert up.adapters["default"].hada_w2_b.value.sharding.spec == P(None, "fsdp")

    def gradients(params, run):
        trainable, frozen = loha_jax.partition(params)

        def loss(trainable):
            return jnp.mean(run({"params": loha_jax.combine(trainable, frozen)}, x) ** 2)

        return jax.jit(jax.value_and_grad(loss))(trainable)

    plain = create()
    expected = gradients(nn.meta.unbox(plain), model.apply)
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        for run in (loha_jax.adapt(model.apply), model.apply):
            ours = nn.meta.unbox(gradients(params, run))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, expected
            )
        merged = loha_jax.merge(params)
    assert merged["rest"]["up"]["kernel"].names == ("layers", "embed", "mlp")


def test_nnx_metadata():
    def build(rngs):
        def linear(into, out, names):
            kernel_init = nnx.with_partitioning(nnx.initializers.normal(), names)
            return nnx.Linear(into, out, kernel_init=kernel_init, rngs=rngs)

        return nnx.Sequential(
            linear(8, 16, ("fsdp", "tensor")), nnx.gelu, linear(16, 8, ("tensor", "fsdp"))
        )

    config = LoHaConfig(r=2, target_modules=["layers.0", "layers.2"], init_weights=False)
    x = normal_array(1, (16, 8))
    with jax.set_mesh(mesh()):
        model = build(nnx.Rngs(0))
    loha_jax.nnx.inject(model, config, rngs=nnx.Rngs(1))
    wanted = {"hada_w1_a": ("tensor", None), "hada_w1_b": (None, "fsdp")}
    for name, names in wanted.items():
        factor = getattr(model.layers[0], f"kernel_lora_{name}")
        assert factor.get_metadata()["out_sharding"] == names
        assert factor.get_value().sharding == NamedSharding(mesh(), P(*names))
    specs = nnx.get_partition_spec(nnx.state(model, loha_jax.nnx.LoHaParam))
    assert specs["layers"][2]["kernel_lora_hada_w2_a"].get_value() == P("fsdp", None)

    single = nnx.clone(model)
    nnx.update(single, jax.device_get(nnx.state(single)))

    def gradients(model, x):
        wrt = nnx.DiffState(0, loha_jax.nnx.LoHaParam)
        return nnx.jit(nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2), argnums=wrt))(model, x)

    with jax.set_mesh(mesh()):
        ours = gradients(model, jax.device_put(x, NamedSharding(mesh(), P("fsdp"))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        ours,
        gradients(single, x),
    )
