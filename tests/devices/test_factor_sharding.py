"""Factors lie where their kernel lies: whoever makes them, whatever the kernel's axes mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, LycorisConfig, interop
from tests.devices.meshes import collectives

KEY = jax.random.key(0)

# (shape, layout, how the kernel is split, w*_a, w*_b, stack) on a mesh of 4 (fsdp) x 2 (tensor)
FLAT = {
    "dense": ((8, 12), "io", P("fsdp", "tensor"), P("tensor", None), P(None, "fsdp"), P()),
    "both axes on one": (
        (8, 16),
        "io",
        P(None, ("fsdp", "tensor")),
        P(("fsdp", "tensor"), None),
        P(None, None),
        P(),
    ),
    "torch's order": ((12, 8), "oi", P("tensor", "fsdp"), P("tensor", None), P(None, "fsdp"), P()),
    "query": ((8, 4, 6), "ioo", P("fsdp", "tensor", None), P("tensor", None), P(None, "fsdp"), P()),
    "attention output": (
        (4, 6, 8),
        "iio",
        P("tensor", None, "fsdp"),
        P("fsdp", None),
        P(None, "tensor"),
        P(),
    ),
    "split head dimension": (
        (8, 3, 6),
        "ioo",
        P(None, None, "tensor"),
        P(None, None),
        P(None, None),
        P(),
    ),
    "one head": ((8, 1, 6), "ioo", P(None, None, "tensor"), P("tensor", None), P(None, None), P()),
    "other order": ((6, 4, 8), "i1 i0 o", P(None, "tensor"), P(None, None), P(None, "tensor"), P()),
    "stack of layers": (
        (4, 8, 6),
        "sio",
        P("fsdp", None, "tensor"),
        P("fsdp", "tensor", None),
        P("fsdp", None, None),
        P("fsdp"),
    ),
    "stack behind": (
        (8, 4, 6),
        "iso",
        P("tensor", "fsdp"),
        P("fsdp", None, None),
        P("fsdp", None, "tensor"),
        P("fsdp"),
    ),
    "fused key and value": (
        (2, 4, 8, 3),
        "soio",
        P(None, "tensor", "fsdp"),
        P(None, "tensor", None),
        P(None, None, "fsdp"),
        P(None),
    ),
    "convolution": (
        (3, 3, 4, 6),
        "kkio",
        P(None, None, "fsdp", "tensor"),
        P("tensor", None),
        P(None, "fsdp"),
        P(),
    ),
    "not split": ((8, 12), "io", P(), P(None, None), P(None, None), P()),
}


@functools.cache
def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)


def place(array, spec, kind=AxisType.Auto):
    return jax.device_put(array, NamedSharding(mesh(kind), spec))


def factors_of(tree, name="default"):
    return tree["layer"]["kernel"].adapters[name]


def check(factors, plain, w_a, w_b, _=None):
    wanted = {"hada_w1_a": w_a, "hada_w2_a": w_a, "hada_w1_b": w_b, "hada_w2_b": w_b}
    for name, spec in wanted.items():
        array = getattr(factors, name)
        assert array.sharding.is_equivalent_to(
            NamedSharding(array.sharding.mesh, spec), array.ndim
        ), (name, spec)
        np.testing.assert_array_equal(array, getattr(plain, name))


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_inject(name, kind):
    shape, word, spec, *wanted = FLAT[name]
    kernel = normal_array(0, shape)
    config = LoHaConfig(r=2, target_modules=".*", init_weights=False)
    inject = functools.partial(
        loha_jax.inject, config=config, key=jax.random.key(1), layouts={"layer": word}
    )
    plain = inject({"layer": {"kernel": kernel}})
    placed = {"layer": {"kernel": place(kernel, spec, kind)}}
    tree = inject(placed)
    assert tree["layer"]["kernel"].kernel is placed["layer"]["kernel"]
    check(factors_of(tree), factors_of(plain), *wanted)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    described = inject(shapes)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), described, tree)


@pytest.mark.parametrize("name", ["dense", "torch's order", "stack behind", "fused key and value"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_singular_vectors_of_a_split_kernel(name, kind):
    shape, word, spec, w_a, w_b, _ = FLAT[name]
    kernel = normal_array(0, shape)
    config = LoHaConfig(r=2, target_modules=".*", init_weights="abba")
    plain, split = (
        factors_of(
            loha_jax.inject({"layer": {"kernel": k}}, config, key=KEY, layouts={"layer": word})
        )
        for k in (kernel, place(kernel, spec, kind))
    )
    products = [np.asarray(f.hada_w1_a) @ np.asarray(f.hada_w1_b) for f in (plain, split)]
    np.testing.assert_allclose(*products, atol=1e-4)
    assert split.hada_w1_a.sharding.is_equivalent_to(
        NamedSharding(split.hada_w1_a.sharding.mesh, w_a), split.hada_w1_a.ndim
    )
    assert split.hada_w1_b.sharding.is_equivalent_to(
        NamedSharding(split.hada_w1_b.sharding.mesh, w_b), split.hada_w1_b.ndim
    )


@pytest.mark.parametrize("scheme", [True, "abba"])
@pytest.mark.parametrize("kernel", ["device", "mesh", "explicit mesh"])
@pytest.mark.parametrize("key", ["device", "mesh"])
def test_a_key_that_is_committed_to_other_devices_than_the_kernel(scheme, kernel, key):
    plain = normal_array(0, (8, 12))
    places = {
        "device": lambda x: jax.device_put(x, jax.devices()[3]),
        "mesh": lambda x: place(x, P("fsdp", "tensor")),
        "explicit mesh": lambda x: place(x, P("fsdp", "tensor"), AxisType.Explicit),
    }
    keys = {"device": jax.device_put(KEY, jax.devices()[1]), "mesh": place(KEY, P())}
    config = LoHaConfig(r=2, target_modules=".*", init_weights=scheme)
    got, want = (
        factors_of(loha_jax.inject({"layer": {"kernel": k}}, config, key=key_))
        for k, key_ in ((places[kernel](plain), keys[key]), (plain, KEY))
    )
    for name, x in want.tensors.items():
        assert getattr(got, name).sharding.device_set == places[kernel](plain).sharding.device_set
        if name.startswith("hada_w2") or scheme is True:
            np.testing.assert_array_equal(getattr(got, name), x)
    products = [np.asarray(f.hada_w1_a) @ np.asarray(f.hada_w1_b) for f in (got, want)]
    np.testing.assert_allclose(*products, atol=1e-4)


def test_singular_vectors_move_no_kernel():
    """Between devices go arrays of r + 8 columns."""
    kernel = place(normal_array(0, (1024, 512)), P("fsdp", "tensor"))
    config = LoHaConfig(r=4, target_modules=".*", init_weights="abba")
    compiled = jax.jit(
        lambda kernel: (
            factors_of(loha_jax.inject({"layer": {"kernel": kernel}}, config, key=KEY)).tensors
        )
    )
    moved = collectives(compiled.lower(kernel).compile())
    assert moved
    assert max(elements for _, elements in moved) == 1024 * (4 + 8)


def test_cores_and_norms():
    kernel = normal_array(0, (3, 3, 4, 6))

    def place_kernel(tree):
        return {"layer": {"kernel": place(tree, P(None, None, "fsdp", "tensor"))}}

    config = LoHaConfig(r=2, target_modules=".*", use_effective_conv2d=True)
    factors = factors_of(
        loha_jax.inject(place_kernel(kernel), config, key=KEY, layouts={"layer": "kkio"})
    )
    assert factors.hada_w1_a.sharding.spec == P(None, "tensor")
    assert factors.hada_w1_b.sharding.spec == P(None, "fsdp")
    assert factors.hada_t1.sharding.spec == P(None, None, None, None)

    for on_out, spec in (
        (True, P("tensor", None, None, None)),
        (False, P(None, "fsdp", None, None)),
    ):
        config = LycorisConfig(
            r=2, target_modules=".*", weight_decompose=True, wd_on_out=on_out, use_scalar=True
        )
        factors = factors_of(
            loha_jax.inject(place_kernel(kernel), config, key=KEY, layouts={"layer": "kkio"})
        )
        assert factors.dora_scale.sharding.spec == spec
        assert factors.scalar.sharding.spec == P()


def test_files_and_sums(tmp_path):
    """Loaded factors, and those made of other adapters, lie there too."""
    kernel, spec = normal_array(0, (8, 12)), P("fsdp", "tensor")
    base = {"layer": {"kernel": kernel}, "head": {"kernel": kernel}}
    placed = {"layer": {"kernel": place(kernel, spec)}, "head": {"kernel": place(kernel, spec)}}
    config = LoHaConfig(r=2, target_modules=["layer"], modules_to_save=["head"], init_weights=False)
    params = loha_jax.inject(placed, config, key=KEY)
    assert params["head"]["kernel"].copies["default"].sharding.spec == spec
    interop.save_peft(tmp_path, params)
    loaded = interop.load_peft(tmp_path, placed)
    check(
        factors_of(loaded),
        factors_of(loha_jax.inject(base, config, key=KEY)),
        P("tensor", None),
        P(None, "fsdp"),
        P(),
    )
    assert loaded["head"]["kernel"].copies["default"].sharding.spec == spec
    summed = factors_of(loha_jax.add_weighted_adapter(loaded, ["default"], [0.5], "sum"), "sum")
    assert (summed.hada_w1_a.sharding.spec, summed.hada_w2_b.sharding.spec) == (
        P("tensor", None),
        P(None, "fsdp"),
    )
    merged = loha_jax.merge(loaded)
    assert merged["layer"]["kernel"].sharding.is_equivalent_to(
        placed["layer"]["kernel"].sharding, 2
    )


def test_other_devices():
    """Factors of a kernel on one device are there; those of an unplaced one are free."""
    device = jax.devices()[3]
    config = LoHaConfig(r=2, target_modules=["layer"])
    tree = {"layer": {"kernel": jax.device_put(jnp.ones((4, 4)), device)}}
    factors = factors_of(loha_jax.inject(tree, config, key=KEY))
    assert {a.device for a in jax.tree.leaves(factors)} == {device}
    assert factors.hada_w1_a.committed
    free = factors_of(loha_jax.inject({"layer": {"kernel": jnp.ones((4, 4))}}, config, key=KEY))
    assert not any(a.committed for a in jax.tree.leaves(free))


def test_inject_inside_jit_with_explicit_axes():
    kernel = place(jnp.ones((8, 12)), P("fsdp", "tensor"), AxisType.Explicit)
    config = LoHaConfig(r=2, target_modules=["layer"], init_weights=False)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        tree = jax.jit(
            lambda kernel: loha_jax.inject({"layer": {"kernel": kernel}}, config, key=KEY)
        )(kernel)
    plain = loha_jax.inject({"layer": {"kernel": jnp.ones((8, 12))}}, config, key=KEY)
    check(factors_of(tree), factors_of(plain), P("tensor", None), P(None, "fsdp"), P())


def test_inject_inside_jit_beside_a_base_from_outside():
    config = LoHaConfig(r=2, target_modules=["layer"], init_weights=False)
    plain = loha_jax.inject({"layer": {"kernel": jnp.ones((8, 12))}}, config, key=KEY)
    for kernel, place_of_w1_a in (
        (place(jnp.ones((8, 12)), P("fsdp", "tensor")), NamedSharding(mesh(), P("tensor", None))),
        (
            jax.device_put(jnp.ones((8, 12)), jax.devices()[3]),
            jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        ),
    ):
        base = {"layer": {"kernel": kernel}}
        factors = jax.jit(
            lambda key, base=base: factors_of(loha_jax.inject(base, config, key=key))
        )(KEY)
        assert factors.hada_w1_a.sharding.is_equivalent_to(place_of_w1_a, 2)
        np.testing.assert_array_equal(factors.hada_w1_a, factors_of(plain).hada_w1_a)
