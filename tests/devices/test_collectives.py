"""An adapted step sends nothing of a kernel's or an activation's size between devices.

It is compared with the frozen model's step. The frozen step is one that differentiates with respect
to the input, so that its backward pass runs through all layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from random_arrays import normal_array

import loha_jax
from tests.devices.meshes import (
    BATCH,
    HIDDEN,
    LENGTH,
    SETTINGS,
    WIDTH,
    R,
    adapter,
    collectives,
    init,
    model,
    place,
)


@functools.cache
def steps(name, kind):
    """The collectives of the frozen and of the adapted step, and the number of data shards."""
    setting = dataclasses.replace(SETTINGS[name], kind=kind)
    mesh = setting.make_mesh()
    with jax.set_mesh(mesh):
        base = place(init(jax.random.key(0)), setting, mesh)
        batch = NamedSharding(mesh, setting.batch)
        x = jax.device_put(normal_array(1, (BATCH, LENGTH, WIDTH)), batch)
        trainable, frozen = loha_jax.partition(
            loha_jax.inject(base, adapter(), key=jax.random.key(2))
        )
        run = loha_jax.adapt(model)

        def frozen_step(x, base):
            return jax.value_and_grad(lambda x: jnp.mean(model(base, x) ** 2))(x)

        def adapted_step(trainable, frozen, x):
            def loss(trainable, x):
                return jnp.mean(run(loha_jax.combine(trainable, frozen), x) ** 2)

            return jax.value_and_grad(loss, (0, 1))(trainable, x)

        factors = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        plain = jax.jit(frozen_step, out_shardings=(None, batch)).lower(x, base).compile()
        adapted = (
            jax.jit(adapted_step, out_shardings=(None, (factors, batch)))
            .lower(trainable, frozen, x)
            .compile()
        )
    return collectives(plain), collectives(adapted)


CASES = [(name, AxisType.Auto) for name in SETTINGS] + [
    (name, AxisType.Explicit) for name in ("data", "fsdp", "data and tensor", "fsdp and tensor")
]


@pytest.mark.parametrize(
    ("name", "kind"), CASES, ids=[f"{name}, {kind.name}" for name, kind in CASES]
)
def test_nothing_of_a_kernels_or_an_activations_size(name, kind):
    plain, adapted = steps(name, kind)
    assert not plain - adapted, "the frozen model's own collectives are all there"
    # Khatri-Rao factors have r² columns: they are gathered where the kernel's in axis is split,
    # their gradients are added up, and so are products of x with them, [rows, r²], where a split
    # axis is contracted.
    extra = adapted - plain
    khatri_rao, products = R * R * HIDDEN, R * R * BATCH * LENGTH
    assert all(size <= max(khatri_rao, products) for _, size in extra), extra
    assert max(khatri_rao, products) < min(WIDTH * HIDDEN, BATCH * LENGTH * WIDTH)
    gathered = {size for kind, size in extra if kind != "all-reduce"}
    assert all(size <= khatri_rao for size in gathered), extra
    count = sum(extra.values())
    # Per kernel: two gradients, two gathers, two products of rank size, and what moves between the
    # axes of a mesh.
    assert count <= 8 * 4, extra


def test_it_would_be_seen_if_a_kernel_were_gathered():
    """Where the kernels are split, the frozen step itself gathers them: the count finds these."""
    plain, _ = steps("fsdp", AxisType.Auto)
    assert plain["all-gather", WIDTH * HIDDEN] == 4
