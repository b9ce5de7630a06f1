import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from flax.linen import partitioning
from linen_reference import CASES, KEY, Scanned, transposed
from scipy import stats

from loha_jax import linen
from loha_jax.linen import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEmbed

# --- partitioning ---


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize(
    ("layer", "names", "shape", "expected"),
    [
        (LoHaDense(6, r=2), ("x", "y"), (1, 4), {"w1_a": ("y", None), "w2_b": (None, "x")}),
        (
            LoHaDense(6, r=2, fedpara=True),
            ("x", "y"),
            (1, 4),
            {"w2_a": ("y", None), "w1_b": (None, "x")},
        ),
        (
            LoHaDenseGeneral((2, 3), r=2),
            ("e", "h", "d"),
            (1, 4),
            {"w1_a": ("h", None), "w1_b": (None, "e")},
        ),
        (
            LoHaDenseGeneral(3, batch_dims=(0,), r=2),
            ("b", "i", "o"),
            (5, 2, 4),
            {"w1_a": ("b", "o", None), "w1_b": ("b", None, "i")},
        ),
        (
            LoHaConv(6, (3, 3), r=2),
            (None, None, "i", "o"),
            (1, 5, 5, 4),
            {"w1_a": ("o", None), "w1_b": (None, "i")},
        ),
        (
            LoHaConv(6, (3,), r=2, use_effective_conv2d=True),
            ("k", "i", "o"),
            (1, 5, 4),
            {"w1_a": (None, "o"), "w1_b": (None, "i"), "t1": (None, None, "k", None)},
        ),
        (LoHaEmbed(6, 4, r=2), ("v", "d"), None, {"w1_a": ("v", None), "w1_b": (None, "d")}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_factors_carry_the_names_of_the_kernels_axes(wrap, layer, names, shape, expected):
    kernel = "embedding" if isinstance(layer, LoHaEmbed) else "kernel"
    boxed = wrap(nn.initializers.normal(), names)
    layer = layer.clone(**{f"{kernel}_init": boxed})
    x = jnp.zeros((2,), jnp.int32) if shape is None else jnp.ones(shape)
    variables = layer.init(KEY, x)
    params = variables["params"]
    if kernel in params:
        assert params[kernel].names == names
    assert {name: params[f"hada_{name}"].names for name in expected} == expected
    assert all(
        isinstance(params[n], nn.LogicallyPartitioned) == (wrap is nn.with_logical_partitioning)
        for n in params
        if n.startswith("hada")
    )
    assert all(len(p.names) == p.value.ndim for n, p in params.items() if n.startswith("hada"))
    assert jax.tree.leaves(linen.trainable_mask(variables)).count(True) == sum(
        n.startswith("hada") for n in params
    )
    plain = layer.apply(nn.meta.unbox(variables), x)
    np.testing.assert_array_equal(layer.apply(variables, x), plain)


def test_boxes_gain_the_scans_axis_and_run_on_a_mesh():
    fields = {"r": 2, "kernel_init": nn.with_partitioning(nn.initializers.normal(), ("in", "out"))}
    model, x = Scanned(fields={"fields": fields}), jnp.ones((2, 8))
    variables = model.init(KEY, x)
    q = variables["params"]["layers"]["q"]
    assert q["kernel"].names == ("layers", "in", "out")
    assert q["hada_w1_a"].names == ("layers", "out", None)
    spec = nn.get_partition_spec(variables)["params"]["layers"]["q"]["hada_w2_b"]
    assert spec == jax.sharding.PartitionSpec("layers", None, "in")
    mesh = jax.make_mesh(
        (1, 1, 1), ("layers", "in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)(jax.jit(model.init)(KEY, x), x)
    np.testing.assert_allclose(got, model.apply(nn.meta.unbox(variables), x), rtol=1e-6)


def test_partitioning_with_too_few_names_is_an_error():
    layer = LoHaDense(6, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("x",)))
    with pytest.raises(ValueError, match=r"shape \(4, 6\), but its partitioning names \('x',\)"):
        layer.init(KEY, jnp.ones((1, 4)))


def test_logical_rules_map_the_names():
    layer = LoHaDense(
        6, r=2, kernel_init=nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    )
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, jnp.ones((1, 4))))
    mesh_specs = partitioning.logical_to_mesh(specs, [("embed", None), ("mlp", "model")])
    assert mesh_specs["params"]["hada_w1_a"] == jax.sharding.PartitionSpec("model", None)


# --- dropout ---


def update_of(layer, params, **kwargs):
    """ΔW of one call, read off an identity input."""
    params = {**params, "kernel": jnp.zeros_like(params["kernel"])}
    return np.asarray(layer.apply({"params": params}, jnp.eye(params["kernel"].shape[0]), **kwargs))


def test_rank_and_module_dropout():
    """Rank dropout drops outputs and module dropout all of them."""
    layer = LoHaDense(400, r=2, rank_dropout=0.3, init_weights=False, use_bias=False)
    params = layer.init(KEY, jnp.ones((1, 5)), deterministic=True)["params"]
    whole = update_of(layer, params, deterministic=True)
    np.testing.assert_allclose(whole, transposed(params, (5, 400), 4.0), rtol=1e-5, atol=1e-5)
    dropped = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(3)})
    kept = dropped.any(0)
    assert stats.binomtest(int(kept.sum()), 400, 0.7).pvalue > 1e-3
    np.testing.assert_allclose(
        dropped[:, kept], whole[:, kept] * (400 / kept.sum()), rtol=1e-5, atol=1e-5
    )
    again = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(3)})
    other = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(4)})
    assert np.array_equal(again, dropped)
    assert not np.array_equal(other, dropped)

    layer = LoHaDense(
        4, r=2, module_dropout=0.3, init_weights=False, use_bias=False, deterministic=False
    )
    keys = jax.random.split(jax.random.key(0), 300)
    params = whole_params(4)
    call = jax.jit(
        lambda key: layer.apply(
            {"params": {**params, "kernel": jnp.zeros((5, 4))}}, jnp.eye(5), rngs={"dropout": key}
        )
    )
    updates = [np.asarray(call(key)) for key in keys]
    empty = sum(not u.any() for u in updates)
    assert stats.binomtest(empty, 300, 0.3).pvalue > 1e-3
    full = update_of(layer.clone(deterministic=True), params)
    assert all(not u.any() or np.allclose(u, full, rtol=1e-6) for u in updates)


def whole_params(features):
    return LoHaDense(features, r=2, init_weights=False, use_bias=False).init(KEY, jnp.ones((1, 5)))[
        "params"
    ]


def test_dropout_in_a_scan():
    """Dropout in a scan draws per layer and an own rng collection is used."""
    x = jnp.ones((1, 6))
    fields = {"r": 2, "init_weights": False, "rank_dropout": 0.5, "deterministic": False}
    model = Scanned(fields={"fields": fields})
    variables = model.init({"params": KEY, "dropout": KEY}, x)
    outputs = [model.apply(variables, x, rngs={"dropout": jax.random.key(n)}) for n in (0, 0, 1)]
    assert np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    layer = LoHaDense(6, r=2, module_dropout=0.5, deterministic=False, rng_collection="noise")
    variables = layer.init({"params": KEY, "noise": KEY}, x)
    layer.apply(variables, x, rngs={"noise": KEY})
    with pytest.raises(InvalidRngError, match="noise"):
        layer.apply(variables, x, rngs={"dropout": KEY})


def test_dropout_needs_to_be_told_whether_it_is_on():
    with pytest.raises(ValueError, match="deterministic"):
        LoHaDense(3, rank_dropout=0.5).init(KEY, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="deterministic"):
        LoHaDense(3, rank_dropout=0.5, deterministic=True).init(
            KEY, jnp.ones((1, 2)), deterministic=True
        )
    LoHaDense(3).init(KEY, jnp.ones((1, 2)), deterministic=False)  # nothing to drop, no rng needed


@pytest.mark.parametrize(
    "case",
    [CASES[n] for n in ("general_batch", "conv2d_cores", "einsum_query", "embed", "embed_attend")],
)
def test_every_layer_takes_deterministic(case):
    layer = case.layer(module_dropout=0.999, init_weights=False)
    x = case.inputs()
    params = layer.init(KEY, x, deterministic=True, method=case.method)["params"]
    base = {n: v for n, v in params.items() if not n.startswith("hada")}
    dropped = layer.apply(
        {"params": params}, x, deterministic=False, rngs={"dropout": KEY}, method=case.method
    )
    want = case.plain().apply({"params": base}, x, method=case.method)
    np.testing.assert_allclose(dropped, want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(
        layer.apply({"params": params}, x, deterministic=True, method=case.method), want
    )
