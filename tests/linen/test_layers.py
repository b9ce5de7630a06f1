import dataclasses
import functools
import operator
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.errors import InvalidRngError, ScopeParamNotFoundError, ScopeParamShapeError
from flax.linen import partitioning
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import stats

import loha_jax
from loha_jax import linen
from loha_jax.linen import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEinsum, LoHaEmbed

KEY = jax.random.key(0)
R, ALPHA = 3, 5.0


# --- equal to the Flax layer with W + ΔW, by a formula written out by hand --------------------------------------------


def flat(p, scale):
    """[..., out, in·spatial]"""
    return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * scale


def with_cores(p, scale, spatial):
    one, two = (
        jnp.einsum(f"ij{spatial},ip,jq->pq{spatial}", p[f"hada_t{n}"], p[f"hada_w{n}_a"], p[f"hada_w{n}_b"])
        for n in (1, 2)
    )
    return one * two * scale


def transposed(p, shape, scale):
    return jnp.swapaxes(flat(p, scale), -1, -2).reshape(shape)


def as_stored(p, shape, scale):
    return flat(p, scale).reshape(shape)


def conv2d(p, shape, scale):
    kh, kw, i, o = shape
    return flat(p, scale).reshape(o, i, kh, kw).transpose(2, 3, 1, 0)


def conv1d(p, shape, scale):
    k, i, o = shape
    return flat(p, scale).reshape(o, i, k).transpose(2, 1, 0)


def conv3d(p, shape, scale):
    *k, i, o = shape
    return flat(p, scale).reshape(o, i, *k).transpose(2, 3, 4, 1, 0)


def conv2d_cores(p, shape, scale):
    return with_cores(p, scale, "hw").transpose(2, 3, 1, 0)


def conv1d_cores(p, shape, scale):
    return with_cores(p, scale, "kz")[..., 0].transpose(2, 1, 0)


@dataclasses.dataclass
class Case:
    loha: Any
    fields: dict
    shape: tuple
    fold: Any
    method: Any = None
    kernel: str = "kernel"

    def layer(self, **more):
        return self.loha(**self.fields, **{"r": R, "alpha": ALPHA, **more})

    @property
    def flax(self):
        return next(c for c in self.loha.__mro__ if c.__module__ == "flax.linen.linear")

    def plain(self, **more):
        own = {f.name for f in dataclasses.fields(self.flax)}
        return self.flax(**{k: v for k, v in self.fields.items() if k in own}, **more)

    def inputs(self, dtype=None):
        if self.kernel == "embedding" and self.method is None:
            return jax.random.randint(jax.random.key(5), self.shape, 0, 7)
        return jax.random.normal(jax.random.key(5), self.shape, dtype)


MASK = (np.arange(3 * 3 * 4 * 6).reshape(3, 3, 4, 6) % 3 > 0).astype(np.float32)
SAME_BUT_SLOW = {"dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)}
CASES = {
    "dense": Case(LoHaDense, {"features": 5}, (2, 4), transposed),
    "dense_vector": Case(LoHaDense, {"features": 5}, (4,), transposed),
    "dense_many_axes": Case(LoHaDense, {"features": 5, "use_bias": False}, (2, 3, 6, 4), transposed),
    "dense_options": Case(
        LoHaDense,
        {"features": 5, "precision": "highest", "bias_init": nn.initializers.ones, **SAME_BUT_SLOW},
        (2, 4),
        transposed,
    ),
    "general_query": Case(LoHaDenseGeneral, {"features": (2, 5)}, (3, 4), transposed),
    "general_out": Case(LoHaDenseGeneral, {"features": 5, "axis": (-2, -1)}, (3, 2, 4), transposed),
    "general_middle": Case(LoHaDenseGeneral, {"features": (2, 3), "axis": (3, 1)}, (3, 2, 4, 5), transposed),
    "general_batch": Case(
        LoHaDenseGeneral, {"features": (2, 3), "axis": -1, "batch_dims": (0, 1)}, (3, 2, 6, 4), transposed
    ),
    "conv1d": Case(LoHaConv, {"features": 6, "kernel_size": 3, "padding": "CAUSAL"}, (2, 8, 4), conv1d),
    "conv1d_cores": Case(
        LoHaConv, {"features": 6, "kernel_size": (3,), "use_effective_conv2d": True}, (2, 8, 4), conv1d_cores
    ),
    "conv2d": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 2), "strides": 2, "padding": [(1, 0), (2, 1)]},
        (2, 8, 7, 4),
        conv2d,
    ),
    "conv2d_cores": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 2), "kernel_dilation": 2, "use_effective_conv2d": True},
        (2, 8, 7, 4),
        conv2d_cores,
    ),
    "conv2d_of_size_1_is_flat": Case(
        LoHaConv, {"features": 6, "kernel_size": (1, 1), "use_effective_conv2d": True}, (2, 3, 3, 4), conv2d
    ),
    "conv2d_circular": Case(
        LoHaConv, {"features": 6, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 5, 5, 4), conv2d
    ),
    "conv2d_reflect": Case(LoHaConv, {"features": 6, "kernel_size": (3, 3), "padding": "REFLECT"}, (5, 5, 4), conv2d),
    "conv2d_groups": Case(
        LoHaConv, {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2}, (2, 5, 5, 4), conv2d
    ),
    "conv2d_groups_cores": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2, "use_effective_conv2d": True},
        (2, 5, 5, 4),
        conv2d_cores,
    ),
    "conv2d_mask": Case(LoHaConv, {"features": 6, "kernel_size": (3, 3), "mask": MASK}, (2, 5, 5, 4), conv2d),
    "conv2d_transposed_input": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 3), "input_dilation": 2, "padding": ((1, 2), (0, 1)), "use_bias": False},
        (1, 2, 5, 5, 4),
        conv2d,
    ),
    "conv3d": Case(LoHaConv, {"features": 6, "kernel_size": (2, 3, 2)}, (1, 3, 4, 3, 4), conv3d),
    "einsum_query": Case(LoHaEinsum, {"shape": (4, 2, 5), "einsum_str": "btd, dnh->btnh"}, (2, 3, 4), transposed),
    "einsum_out": Case(LoHaEinsum, {"shape": (2, 5, 4), "einsum_str": "btnh,nhd->btd"}, (2, 3, 2, 5), transposed),
    "einsum_out_first": Case(LoHaEinsum, {"shape": (2, 5, 4), "einsum_str": "btd,nhd->btnh"}, (2, 3, 4), as_stored),
    "einsum_experts": Case(LoHaEinsum, {"shape": (3, 4, 5), "einsum_str": "ebi,eio->ebo"}, (3, 2, 4), transposed),
    "einsum_ellipsis": Case(
        LoHaEinsum, {"shape": (4, 5), "einsum_str": "...i,io->...o", "use_bias": False}, (2, 3, 4), transposed
    ),
    "embed": Case(LoHaEmbed, {"num_embeddings": 7, "features": 4}, (2, 3), as_stored, kernel="embedding"),
    "embed_of_one": Case(LoHaEmbed, {"num_embeddings": 1, "features": 4}, (2, 3), as_stored, kernel="embedding"),
    "embed_attend": Case(LoHaEmbed, {"num_embeddings": 7, "features": 4}, (2, 4), as_stored, "attend", "embedding"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def randomised(shapes, seed=1):
    """Normal numbers in the place of every array or shape."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)


def shapes_of(case, layer):
    return jax.eval_shape(lambda: layer.init(KEY, case.inputs(layer.param_dtype), method=case.method)["params"])


def merged(case, params, scale=ALPHA / R):
    """The parameters of the Flax layer, with ΔW in the kernel."""
    plain = {name: value for name, value in params.items() if not name.startswith("hada")}
    kernel = params[case.kernel]
    return {**plain, case.kernel: kernel + case.fold(params, kernel.shape, scale)}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "auto") for name in CASES), *((n, s) for n in ("dense", "conv2d_cores") for s in ("fused", "dense"))],
)
def test_results_and_gradients_are_those_of_the_flax_layer_with_the_update_in_its_kernel(name, strategy):
    case = CASES[name]
    layer, plain = (make(param_dtype=jnp.float64) for make in (case.layer, case.plain))
    layer = layer.clone(strategy=strategy)
    params, x = randomised(shapes_of(case, layer)), case.inputs(jnp.float64)

    def adapted(params, x):
        return layer.apply({"params": params}, x, method=case.method)

    def dense(params, x):
        return plain.apply({"params": merged(case, params)}, x, method=case.method)

    weights = randomised(jax.eval_shape(dense, params, x), 2)
    by = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)

    def run(fn):
        def loss(params, x):
            y = fn(params, x)
            return (jnp.tanh(y) * weights).sum(), y

        return jax.jit(jax.grad(loss, argnums=by, has_aux=True))(params, x)

    (got, y), (want, y_want) = run(adapted), run(dense)
    close(y, y_want)
    assert not np.any(got[0].pop(case.kernel))  # frozen
    assert np.any(want[0].pop(case.kernel))
    jax.tree.map(close, got, want)


@each_case
def test_kernel_and_bias_start_as_flax_starts_them_and_the_output_too(case):
    layer, plain, x = case.layer(), case.plain(), case.inputs()
    # As users compile: unoptimised (tests/conftest.py), the same operations round differently in different programs.
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    y, variables = jit(lambda: layer.init_with_output(KEY, x, method=case.method))()
    y_want, want = jit(lambda: plain.init_with_output(KEY, x, method=case.method))()
    got = variables["params"]
    assert {name for name in got if not name.startswith("hada")} == set(want["params"])
    for name, value in want["params"].items():
        np.testing.assert_array_equal(got[name], value)
    np.testing.assert_allclose(y, y_want, rtol=1e-6, atol=1e-6)
    assert isinstance(layer, case.flax)


@each_case
def test_shapes_are_those_that_inject_gives(case):
    layer = case.layer()
    shapes = shapes_of(case, layer)
    base = {"q": {n: s for n, s in shapes.items() if not n.startswith("hada")}}
    config = loha_jax.LoHaConfig(
        r=R, target_modules=["q"], use_effective_conv2d=case.fields.get("use_effective_conv2d", False)
    )
    adapted = linen.to_adapted(
        {"params": randomised(shapes)},
        layer.init,
        KEY,
        case.inputs(),
        method=case.method,
    )
    layout = adapted["params"][case.kernel].layout
    leaf = loha_jax.inject(base, config, key=KEY, layouts={"q": layout})["q"][case.kernel]
    want = {name: t.shape for name, t in leaf.adapters["default"].tensors.items()}
    assert {name: s.shape for name, s in shapes.items() if name.startswith("hada")} == want


@pytest.mark.parametrize("init_weights", [True, False, "lycoris"])
def test_factors_follow_the_law_that_init_weights_names(init_weights):
    params = LoHaDense(300, r=40, init_weights=init_weights).init(KEY, jnp.ones((1, 200)))["params"]
    zero = {True: "hada_w2_b", False: None, "lycoris": "hada_w2_a"}[init_weights]
    values = [np.ravel(params[name]) for name in sorted(params) if name.startswith("hada")]
    assert all(
        abs(np.corrcoef(a[:8000], b[:8000])[0, 1]) < 0.05
        for a in values
        for b in values
        if a is not b and a.any() and b.any()
    )
    for name, w in params.items():
        if not name.startswith("hada"):
            continue
        w = np.ravel(w)
        if name == zero:
            assert not w.any()
        elif init_weights == "lycoris":
            assert stats.kstest(w, stats.norm(scale={"a": 0.1, "b": 1.0}[name[-1]]).cdf).pvalue > 1e-3
        else:
            bound = 1 / np.sqrt({"a": 40, "b": 200}[name[-1]])
            assert stats.kstest(w, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_lower_precision_follows_flax_and_the_factors_stay_float32():
    layer = LoHaDense(5, r=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, init_weights=False)
    x = jax.random.normal(KEY, (4, 3))
    y, variables = layer.init_with_output(KEY, x)
    params = variables["params"]
    assert y.dtype == params["kernel"].dtype == jnp.bfloat16
    assert params["hada_w1_a"].dtype == jnp.float32
    delta = transposed(params, (3, 5), 8 / 2)
    want = x.astype(jnp.bfloat16).astype(jnp.float32) @ (params["kernel"].astype(jnp.float32) + delta)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=2**-7 * np.abs(want).max())


# --- no array of the kernel's shape -----------------------------------------------------------------------------------


def made(compiled, *shape):
    """Operations of a program whose result has this shape."""
    found = re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* (\w[\w-]*)\(", compiled.as_text())
    return [operation for operation in found if operation not in ("parameter", "get-tuple-element", "bitcast")]


def compiled_step(layer, x, method=None):
    """Value and gradients of the factors and of a floating x; a layer without factors gives those of x alone."""
    params = jax.eval_shape(lambda: layer.init(KEY, jnp.zeros(x.shape, x.dtype), method=method)["params"])
    factors = {n: s for n, s in params.items() if n.startswith("hada")}
    rest = {n: s for n, s in params.items() if n not in factors}

    def loss(factors, rest, x):
        return layer.apply({"params": {**rest, **factors}}, x, method=method).sum()

    by = (0, 2) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    return jax.jit(jax.value_and_grad(loss, argnums=by)).lower(factors, rest, x).compile()


ROWS, TOKENS = jax.ShapeDtypeStruct((64, 1024), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 256), jnp.float32)


@pytest.mark.parametrize(
    ("case", "x", "shapes"),
    [
        (Case(LoHaDense, {"features": 2048}, (), None), ROWS, [(1024, 2048)]),
        (Case(LoHaDenseGeneral, {"features": (8, 256)}, (), None), ROWS, [(1024, 2048), (1024, 8, 256)]),
        (
            Case(LoHaEinsum, {"shape": (1024, 8, 256), "einsum_str": "bd,dnh->bnh"}, (), None),
            ROWS,
            [(1024, 2048), (1024, 8, 256)],
        ),
        (Case(LoHaEmbed, {"num_embeddings": 2048, "features": 1024}, (), None, "attend"), ROWS, [(2048, 1024)]),
        (Case(LoHaEmbed, {"num_embeddings": 2048, "features": 1024}, (), None), TOKENS, [(2048, 1024)]),
        *(
            (
                Case(LoHaConv, {"features": 256, "kernel_size": (3, 3), "use_effective_conv2d": cores}, (), None),
                IMAGE,
                [(3, 3, 256, 256), (256, 256, 3, 3), (256, 2304)],
            )
            for cores in (False, True)
        ),
    ],
    ids=["dense", "general", "einsum", "attend", "lookup", "conv", "conv_cores"],
)
def test_no_array_of_the_kernels_shape_is_made_that_flax_does_not_make(case, x, shapes):
    step, frozen = (compiled_step(layer, x, case.method) for layer in (case.layer(), case.plain()))
    for shape in shapes:
        for order in (shape, shape[::-1]):
            assert len(made(step, *order)) <= len(made(frozen, *order))


def test_the_search_finds_an_array_of_the_kernels_shape():
    assert made(compiled_step(LoHaDense(2048, r=4, strategy="dense"), ROWS), 1024, 2048)


# --- Flax's transforms ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Used with and without adapters."""

    dense: Any = LoHaDense
    fields: Any = dataclasses.field(default_factory=lambda: {"r": 2, "init_weights": False})

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.tanh(self.dense(x.shape[-1], name="q", **self.fields)(x)), None


def scanned(axis=0, block=Block, **fields):
    return nn.scan(
        block,
        variable_axes={"params": axis},
        split_rngs={"params": True, "dropout": True},
        length=4,
        metadata_params={nn.meta.PARTITION_NAME: "layers"},
    )(**fields, name="layers")


class Scanned(nn.Module):
    axis: int = 0
    block: Any = Block
    fields: Any = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        return scanned(self.axis, self.block, **self.fields)(x, None)[0]


def plain_params(params):
    """W + ΔW by hand in every Dense of a tree."""
    if "hada_w1_a" not in params:
        return {k: plain_params(v) if isinstance(v, dict) else v for k, v in params.items()}
    rest = {k: v for k, v in params.items() if not k.startswith("hada")}
    return {
        **rest,
        "kernel": params["kernel"] + transposed(params, params["kernel"].shape, 8 / params["hada_w1_a"].shape[-1]),
    }


@pytest.mark.parametrize("block", [Block, nn.remat(Block), nn.jit(Block)], ids=["plain", "remat", "jit"])
def test_scan_with_remat_and_jit(block):
    x, model = jax.random.normal(KEY, (3, 6)), Scanned(block=block)
    params = model.init(KEY, x)["params"]
    q = params["layers"]["q"]
    assert q["kernel"].shape == (4, 6, 6)
    assert q["hada_w1_a"].shape == (4, 6, 2)
    assert len({float(w.sum()) for w in q["hada_w1_a"]}) == 4  # each layer drew its own
    twin = Scanned(block=block, fields={"dense": nn.Dense, "fields": {}})
    for name, value in twin.init(KEY, x)["params"]["layers"]["q"].items():
        np.testing.assert_array_equal(q[name], value)

    def dense(params):
        return twin.apply({"params": plain_params(params)}, x)

    np.testing.assert_allclose(model.apply({"params": params}, x), dense(params), rtol=1e-5, atol=1e-5)
    got = jax.jit(jax.grad(lambda p: model.apply({"params": p}, x).sum()))(params)
    want = jax.grad(lambda p: dense(p).sum())(params)
    for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "bias"):
        np.testing.assert_allclose(got["layers"]["q"][name], want["layers"]["q"][name], rtol=1e-4, atol=1e-4)


def test_vmap_over_parameters_and_over_inputs():
    x = jax.random.normal(KEY, (5, 3, 4))
    each = nn.vmap(LoHaDense, variable_axes={"params": 0}, split_rngs={"params": True})(2, r=2, init_weights=False)
    params = each.init(KEY, x)["params"]
    assert params["hada_w1_b"].shape == (5, 2, 4)
    want = jnp.einsum("nbi,nio->nbo", x, plain_params(params)["kernel"]) + params["bias"][:, None]
    np.testing.assert_allclose(each.apply({"params": params}, x), want, rtol=1e-5, atol=1e-5)
    layer = LoHaDense(2, r=2, init_weights=False)
    params = layer.init(KEY, x)["params"]
    got = jax.vmap(lambda x: layer.apply({"params": params}, x))(x)
    np.testing.assert_allclose(got, layer.apply({"params": params}, x), rtol=1e-6, atol=1e-6)


def test_share_scope_puts_the_parameters_beside_the_parents_which_start_as_ever():
    class Parent(nn.Module):
        dense: Any

        @nn.compact
        def __call__(self, x):
            inner = self.dense(4, name="inner")
            nn.share_scope(self, inner)
            return inner(x) * self.param("gain", nn.initializers.normal(), (4,))

    x, model = jnp.ones((2, 3)), Parent(functools.partial(LoHaDense, r=2))
    params = model.init(KEY, x)["params"]
    assert set(params) == {"kernel", "bias", "gain", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    for name, value in Parent(nn.Dense).init(KEY, x)["params"].items():
        np.testing.assert_array_equal(params[name], value)
    assert isinstance(linen.to_adapted(params, model.init, KEY, x)["kernel"], loha_jax.LoHaWeight)


class Tied(nn.Module):
    """Every layer, two of them in setup."""

    def setup(self):
        self.embed = LoHaEmbed(11, 8, r=2, init_weights=False)
        self.query = LoHaDenseGeneral((2, 4), r=2, init_weights=False)
        self.out = LoHaEinsum((2, 4, 8), "btnh,nhd->btd", r=3, alpha=4, init_weights=False)
        self.conv = LoHaConv(8, (3,), r=2, init_weights=False)
        self.norm = nn.LayerNorm()

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.out(self.query(self.norm(x)))
        return self.embed.attend(self.conv(x))


IDS = jnp.array([[1, 2, 3, 4], [5, 6, 10, 0]])


def test_shape_evaluation_lazy_init_tabulate_and_submodule_access():
    variables = Tied().init(KEY, IDS)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(Tied().init, KEY, IDS))
    lazy = Tied().lazy_init(KEY, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    jax.tree.map(np.testing.assert_array_equal, lazy, variables)
    table = Tied().tabulate(KEY, IDS, console_kwargs={"width": 200})
    assert "LoHaEinsum" in table
    assert "hada_w1_a" in table
    weight = Tied().apply(variables, method=lambda m: jnp.asarray(m.embed.embedding))
    embed = variables["params"]["embed"]
    np.testing.assert_allclose(weight, embed["embedding"] + as_stored(embed, (11, 8), 8 / 2), rtol=1e-5, atol=1e-6)


def test_a_train_state_trains_the_factors_alone():
    variables = Tied().init(KEY, IDS)
    mask = linen.trainable_mask(variables["params"])
    trained = {path for path, train in flatten_dict(mask).items() if train}
    assert trained == {path for path in flatten_dict(mask) if path[-1].startswith("hada")}
    tx = optax.transforms.selective_transform(optax.adam(1e-2), freeze_mask=jax.tree.map(operator.not_, mask))
    state = TrainState.create(apply_fn=Tied().apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, IDS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(IDS, 1, -1)).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    before, after = flatten_dict(variables["params"]), flatten_dict(state.params)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == trained


# --- partitioning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize(
    ("layer", "names", "shape", "expected"),
    [
        (LoHaDense(6, r=2), ("x", "y"), (1, 4), {"w1_a": ("y", None), "w2_b": (None, "x")}),
        (LoHaDense(6, r=2, fedpara=True), ("x", "y"), (1, 4), {"w2_a": ("y", None), "w1_b": (None, "x")}),
        (LoHaDenseGeneral((2, 3), r=2), ("e", "h", "d"), (1, 4), {"w1_a": ("h", None), "w1_b": (None, "e")}),
        (
            LoHaDenseGeneral(3, batch_dims=(0,), r=2),
            ("b", "i", "o"),
            (5, 2, 4),
            {"w1_a": ("b", "o", None), "w1_b": ("b", None, "i")},
        ),
        (LoHaConv(6, (3, 3), r=2), (None, None, "i", "o"), (1, 5, 5, 4), {"w1_a": ("o", None), "w1_b": (None, "i")}),
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
    assert jax.tree.leaves(linen.trainable_mask(variables)).count(True) == sum(n.startswith("hada") for n in params)
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
    mesh = jax.make_mesh((1, 1, 1), ("layers", "in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)(jax.jit(model.init)(KEY, x), x)
    np.testing.assert_allclose(got, model.apply(nn.meta.unbox(variables), x), rtol=1e-6)


def test_partitioning_with_too_few_names_is_an_error():
    layer = LoHaDense(6, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("x",)))
    with pytest.raises(ValueError, match=r"shape \(4, 6\), but its partitioning names \('x',\)"):
        layer.init(KEY, jnp.ones((1, 4)))


def test_logical_rules_map_the_names():
    layer = LoHaDense(6, r=2, kernel_init=nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp")))
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, jnp.ones((1, 4))))
    mesh_specs = partitioning.logical_to_mesh(specs, [("embed", None), ("mlp", "model")])
    assert mesh_specs["params"]["hada_w1_a"] == jax.sharding.PartitionSpec("model", None)


# --- dropout ----------------------------------------------------------------------------------------------------------


def update_of(layer, params, **kwargs):
    """ΔW of one call, read off an identity input."""
    params = {**params, "kernel": jnp.zeros_like(params["kernel"])}
    return np.asarray(layer.apply({"params": params}, jnp.eye(params["kernel"].shape[0]), **kwargs))


def test_rank_dropout_drops_outputs_and_module_dropout_all_of_them():
    layer = LoHaDense(400, r=2, rank_dropout=0.3, init_weights=False, use_bias=False)
    params = layer.init(KEY, jnp.ones((1, 5)), deterministic=True)["params"]
    whole = update_of(layer, params, deterministic=True)
    np.testing.assert_allclose(whole, transposed(params, (5, 400), 4.0), rtol=1e-5, atol=1e-5)
    dropped = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(3)})
    kept = dropped.any(0)
    assert stats.binomtest(int(kept.sum()), 400, 0.7).pvalue > 1e-3
    np.testing.assert_allclose(dropped[:, kept], whole[:, kept] * (400 / kept.sum()), rtol=1e-5, atol=1e-5)
    again = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(3)})
    other = update_of(layer, params, deterministic=False, rngs={"dropout": jax.random.key(4)})
    assert np.array_equal(again, dropped)
    assert not np.array_equal(other, dropped)

    layer = LoHaDense(4, r=2, module_dropout=0.3, init_weights=False, use_bias=False, deterministic=False)
    keys = jax.random.split(jax.random.key(0), 300)
    params = whole_params(4)
    call = jax.jit(
        lambda key: layer.apply({"params": {**params, "kernel": jnp.zeros((5, 4))}}, jnp.eye(5), rngs={"dropout": key})
    )
    updates = [np.asarray(call(key)) for key in keys]
    empty = sum(not u.any() for u in updates)
    assert stats.binomtest(empty, 300, 0.3).pvalue > 1e-3
    full = update_of(layer.clone(deterministic=True), params)
    assert all(not u.any() or np.allclose(u, full, rtol=1e-6) for u in updates)


def whole_params(features):
    return LoHaDense(features, r=2, init_weights=False, use_bias=False).init(KEY, jnp.ones((1, 5)))["params"]


def test_dropout_in_a_scan_draws_per_layer_and_an_own_rng_collection_is_used():
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
        LoHaDense(3, rank_dropout=0.5, deterministic=True).init(KEY, jnp.ones((1, 2)), deterministic=True)
    LoHaDense(3).init(KEY, jnp.ones((1, 2)), deterministic=False)  # nothing to drop, no rng needed


@pytest.mark.parametrize(
    "case", [CASES[n] for n in ("general_batch", "conv2d_cores", "einsum_query", "embed", "embed_attend")]
)
def test_every_layer_takes_deterministic(case):
    layer = case.layer(module_dropout=0.999, init_weights=False)
    x = case.inputs()
    params = layer.init(KEY, x, deterministic=True, method=case.method)["params"]
    base = {n: v for n, v in params.items() if not n.startswith("hada")}
    dropped = layer.apply({"params": params}, x, deterministic=False, rngs={"dropout": KEY}, method=case.method)
    want = case.plain().apply({"params": base}, x, method=case.method)
    np.testing.assert_allclose(dropped, want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(layer.apply({"params": params}, x, deterministic=True, method=case.method), want)


# --- FedPara ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@each_case
def test_fedpara_is_the_flax_layer_with_the_product_as_its_kernel(case):
    layer, x = case.layer(fedpara=True, alpha=None, param_dtype=jnp.float64), case.inputs(jnp.float64)
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
    """The mean of W² over 400 keys, each a nearly independent sample, within 5 standard errors of scale / fan_in."""
    layer = layer.clone(fedpara=True, variance_scale=scale)
    x = jnp.zeros((1,), jnp.int32) if shape is None else jnp.zeros(shape)
    abstract = jax.eval_shape(layer.init, KEY, x)

    @jax.jit
    def mean_square(key):
        params = layer.init(key, x)
        kernel = loha_jax.unload(linen.to_adapted(params, layer.init, KEY, x))["params"]
        (name,) = {"kernel", "embedding"} & set(kernel)
        return (kernel[name] ** 2).mean(), kernel[name].mean()

    squares, means = (np.asarray(v) for v in jax.lax.map(mean_square, jax.random.split(jax.random.key(7), 400)))
    assert abs(squares.mean() - scale / fan_in) < 5 * squares.std() / np.sqrt(len(squares))
    assert squares.std() / np.sqrt(len(squares)) < 0.05 * scale / fan_in  # the bound above says something
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
    with pytest.raises(ValueError, match=f"LoHaDense at the root: with fedpara=True .*Got {next(iter(fields))}="):
        LoHaDense(4, fedpara=True, **fields).init(KEY, jnp.ones((1, 2)))


def test_forward_mode():
    x = jax.random.normal(KEY, (2, 3))
    for fields in ({"init_weights": False}, {"fedpara": True}):
        layer = LoHaDense(4, r=2, forward_mode=True, **fields)
        params = layer.init(KEY, x)
        f = lambda p, layer=layer: layer.apply(p, x)  # noqa: E731
        tangent = randomised(params)
        if "kernel" in tangent["params"]:
            tangent["params"]["kernel"] *= 0
        out = jax.jvp(f, (params,), (tangent,))[1]
        gradient = jax.grad(lambda p, f=f, out=out: (f(p) * out).sum())(params)
        inner = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True))
        np.testing.assert_allclose(inner, (out**2).sum(), rtol=1e-4)


# --- loha_jax's trees, and PEFT ---------------------------------------------------------------------------------------


class PlainTied(nn.Module):
    """The same model of Flax's own layers."""

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.query = nn.DenseGeneral((2, 4))
        self.out = nn.Einsum((2, 4, 8), "btnh,nhd->btd")
        self.conv = nn.Conv(8, (3,))
        self.norm = nn.LayerNorm()

    __call__ = Tied.__call__


@pytest.mark.parametrize("whole", [True, False], ids=["variables", "params"])
def test_an_adapted_tree_serves_the_plain_model_and_comes_back(whole):
    variables = Tied().init(KEY, IDS)
    given = variables if whole else variables["params"]
    adapted = linen.to_adapted(given, Tied().init, KEY, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    tree = adapted if whole else {"params": adapted}
    want = Tied().apply(variables, IDS)
    np.testing.assert_allclose(PlainTied().apply(loha_jax.merge(tree), IDS), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loha_jax.adapt(PlainTied().apply)(tree, IDS), want, rtol=1e-4, atol=1e-4)
    assert set(loha_jax.infer_layouts(PlainTied().apply, tree, IDS).items()) == {
        ("conv", "kio"),
        ("embed", "oi"),
        ("out", "iio"),
        ("query", "ioo"),
    }
    config = tree["params"]["out"]["kernel"].adapters["default"].config
    assert (config.r, config.alpha) == (2, 8)
    assert (config.rank_pattern, config.alpha_pattern) == ({"^out": 3}, {"^out": 4})
    back = linen.from_adapted(adapted, Tied().init, KEY, IDS)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, back, given)


@pytest.mark.parametrize("block", [Block, nn.jit(Block)], ids=["plain", "jit"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stacked_layers_come_and_go_whatever_the_axis(axis, block):
    model, x = Scanned(axis, block), jnp.ones((2, 4))  # 4 layers of width 4: shapes alone say nothing
    jax.jit(model.init)(KEY, x)  # its trace must not be taken for the description
    params = model.init(KEY, x)["params"]
    adapted = linen.to_adapted(params, jax.jit(model.init), KEY, x)
    leaf = adapted["layers"]["q"]["kernel"]
    assert leaf.layout.word == {0: "sio", 1: "iso", -1: "ios"}[axis]
    assert leaf.names == tuple(f"layers.{n}.q" for n in range(4))
    twin = Scanned(axis, Block, {"dense": nn.Dense, "fields": {}})
    want = model.apply({"params": params}, x)
    np.testing.assert_allclose(twin.apply({"params": loha_jax.merge(adapted)}, x), want, rtol=1e-5, atol=1e-5)
    back = linen.from_adapted(adapted, model.init, KEY, x)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_transforms_inside_of_transforms_and_stacks_of_their_own():
    """A stack axis of the layer (2), one of a vmap (3) between in (4) and out (5) axes, one of a scan (6) before."""
    fields = {"features": 5, "batch_dims": (0,), "r": 2, "init_weights": False}

    class Body(nn.Module):
        general: Any = LoHaDenseGeneral

        @nn.compact
        def __call__(self, x, _):
            several = nn.vmap(
                self.general, variable_axes={"params": 2}, split_rngs={"params": True}, in_axes=None, axis_size=3
            )
            own = {f.name for f in dataclasses.fields(self.general)}
            y = several(**{k: v for k, v in fields.items() if k in own}, name="q")(x)
            return x + nn.tanh(y).sum((0, 3))[..., None], None

    def model(general):
        return nn.scan(Body, variable_axes={"params": 1}, split_rngs={"params": True}, length=6)(general)

    x = jax.random.normal(KEY, (2, 7, 4))
    adapting = model(LoHaDenseGeneral)
    params = adapting.init(KEY, x, None)["params"]
    assert params["q"]["kernel"].shape == (2, 6, 4, 3, 5)
    assert params["q"]["hada_w1_a"].shape == (2, 6, 5, 3, 2)
    adapted = linen.to_adapted(params, adapting.init, KEY, x, None)
    leaf = adapted["q"]["kernel"]
    assert leaf.layout.word == "ssiso"
    assert len(set(leaf.names)) == 2 * 3 * 6
    want = adapting.apply({"params": params}, x, None)[0]
    got = model(nn.DenseGeneral).apply({"params": loha_jax.merge(adapted)}, x, None)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    back = linen.from_adapted(adapted, adapting.init, KEY, x, None)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_fedpara_layer_becomes_the_plain_kernel():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LoHaDense(3, r=2, init_weights=False, name="b")(LoHaDense(5, r=2, fedpara=True, name="a")(x))

    x = jax.random.normal(KEY, (2, 4))
    params = Net().init(KEY, x)["params"]
    adapted = linen.to_adapted(params, Net().init, KEY, x)
    assert sorted(adapted["a"]) == ["bias", "kernel"]
    assert loha_jax.adapter_names(adapted) == ("default",)
    plain = nn.Sequential([nn.Dense(5), nn.Dense(3)])
    merged = loha_jax.merge(adapted)
    got = plain.apply({"params": {"layers_0": merged["a"], "layers_1": merged["b"]}}, x)
    np.testing.assert_allclose(got, Net().apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a/kernel is the weight of a FedPara layer"):
        linen.from_adapted(adapted, Net().init, KEY, x)


def test_pretrained_parameters_of_the_plain_model_go_under_the_factors():
    pretrained = PlainTied().init(jax.random.key(8), IDS)
    params = unflatten_dict({**flatten_dict(Tied().init(KEY, IDS)), **flatten_dict(pretrained)})
    adapted = linen.to_adapted(params, Tied().init, KEY, IDS)
    jax.tree.map(np.testing.assert_array_equal, loha_jax.unload(adapted), pretrained)


# --- errors -----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    first: Any = dataclasses.field(default_factory=dict)
    second: Any = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        return LoHaDense(4, name="b", **self.second)(LoHaDense(4, name="a", **self.first)(x))


X = jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "LoHaDense at a: `r` should be a positive integer"),
        ({"alpha": float("nan")}, "LoHaDense at a: `alpha` should be a finite number"),
        ({"rank_dropout": 1.0}, "LoHaDense at a: `rank_dropout`"),
        ({"init_weights": "zeros"}, "LoHaDense at a: `init_weights`"),
        ({"strategy": "best"}, "The strategy is one of"),
    ],
)
def test_bad_fields_are_named_with_the_layer(fields, message):
    with pytest.raises(ValueError, match=message):
        Two(first=fields).init(KEY, X)


@pytest.mark.parametrize(
    ("shape", "string", "message"),
    [
        ((4,), "bi,i->bi", "is no product that LoHa can adapt"),
        ((4, 3), "bi,ik->bi", "is no product that LoHa can adapt"),
        ((4, 4), "bi,ii->bi", "is no product that LoHa can adapt"),
    ],
)
def test_einsums_without_in_or_out_axes(shape, string, message):
    with pytest.raises(ValueError, match=message):
        LoHaEinsum(shape, string, use_bias=False, kernel_init=nn.initializers.ones).init(KEY, X)


def test_an_einsum_string_of_the_call_needs_a_layout():
    x = jax.random.normal(KEY, (2, 4))
    with pytest.raises(ValueError, match="LoHaEinsum at the root: the einsum string comes with the call"):
        LoHaEinsum((4, 5)).init(KEY, x, "bi,io->bo")
    with pytest.raises(ValueError, match="layout='sio' is for 3 axes, the kernel has"):
        LoHaEinsum((4, 5), layout="sio").init(KEY, x, "bi,io->bo")
    layer = LoHaEinsum((4, 4), layout="io", r=2, init_weights=False, use_bias=False)
    params = layer.init(KEY, x, "bi,io->bo")
    weight = plain_params(params["params"])["kernel"]
    np.testing.assert_allclose(layer.apply(params, x, "bi,io->bo"), x @ weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.apply(params, x, "bo,io->bi"), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_flax_still_checks_its_parameters():
    params = LoHaDense(4, r=2).init(KEY, X)["params"]
    with pytest.raises(ScopeParamShapeError, match="hada_w1_a"):
        LoHaDense(4, r=3).apply({"params": params}, X)
    with pytest.raises(ScopeParamNotFoundError, match='"hada_w2_b"'):
        LoHaDense(4, r=2).apply({"params": {k: v for k, v in params.items() if k != "hada_w2_b"}}, X)
    with pytest.raises(ScopeParamShapeError, match='"kernel"'):
        LoHaDense(4, r=2).apply({"params": params}, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="integer"):
        LoHaEmbed(4, 4).init(KEY, X)


def test_a_mask_of_a_model_without_factors_is_an_error():
    with pytest.raises(ValueError, match="hold no leaf called hada"):
        linen.trainable_mask(nn.Dense(4).init(KEY, X))


def test_params_that_do_not_fit_the_model_are_all_named():
    params = Two().init(KEY, X)["params"]
    broken = {"a": {**params["a"], "hada_w1_a": jnp.ones((4, 3))}, "b": dict(params["b"]), "c": params["a"]}
    del broken["b"]["hada_w2_b"]
    with pytest.raises(ValueError, match="nothing was converted") as error:
        linen.to_adapted(broken, Two().init, KEY, X)
    for part in (
        "a/hada_w1_a has shape (4, 3), in the model (4, 8)",
        "b/hada_w2_b is missing",
        "c/hada_w1_a: the model has no LoHa layer there",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"has no layer of loha_jax.linen"):
        linen.to_adapted(params, nn.Dense(4).init, KEY, X)
    with pytest.raises(ValueError, match="is not the init of a Linen model"):
        linen.to_adapted(params, lambda x: x, X)


@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout", "init_weights"])
def test_layers_that_differ_in_what_a_config_holds_once(field):
    value = False if field == "init_weights" else 0.5
    model = Two(first={"deterministic": True}, second={field: value, "deterministic": True})
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match=f"The layers differ in {field}, .* a: .*, b: {value}"):
        linen.to_adapted(params, model.init, KEY, X)


def test_two_layers_of_one_name():
    model = Two()
    with pytest.raises(ValueError, match="Two layers have the module name 'q'"):
        linen.to_adapted(model.init(KEY, X), model.init, KEY, X, names=lambda name: "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: loha_jax.set_adapter(a, ()), "has the active adapters"),
        (lambda a: loha_jax.scale(a, {"default": 0.5}), "loha_jax.scale"),
        (lambda a: loha_jax.partition(a)[0], "a/kernel comes from one half of `partition`"),
        (lambda a: loha_jax.partition(a)[1], "b/kernel comes from one half of `partition`"),
        (loha_jax.merge, "a/kernel is a ArrayImpl"),
        (lambda a: {**a, "c": a["a"]}, "c/kernel is adapted, the model has no LoHa layer there"),
        (lambda a: linen.to_adapted(*other(r=2)), r"r=\[2\] \(the layer: \[8\]\)"),
        (lambda a: linen.to_adapted(*other(alpha=2)), r"alpha=\[2\] \(the layer: \[8\]\)"),
        (
            lambda a: loha_jax.inject(
                loha_jax.unload(a), loha_jax.LoHaConfig(target_modules=["a", "b"]), key=KEY, layouts={"a": "oi"}
            ),
            r"layout=oi \(the layer: io\)",
        ),
    ],
    ids=["none_active", "scaled", "trainable_half", "frozen_half", "merged", "elsewhere", "rank", "alpha", "layout"],
)
def test_trees_that_do_not_fit_the_model(change, message):
    adapted = linen.to_adapted(Two().init(KEY, X)["params"], Two().init, KEY, X)
    with pytest.raises(ValueError, match=message):
        linen.from_adapted(change(adapted), Two().init, KEY, X)


def other(**fields):
    model = Two(first=fields, second=fields)
    return model.init(KEY, X)["params"], model.init, KEY, X


def test_a_saved_module_comes_back_as_its_trained_copy():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(LoHaDense(4, name="a")(x))

    params = Net().init(KEY, X)["params"]
    base = loha_jax.unload(linen.to_adapted(params, Net().init, KEY, X))
    config = loha_jax.LoHaConfig(target_modules=["a"], modules_to_save=["head"])
    adapted = loha_jax.inject(base, config, key=KEY)
    back = linen.from_adapted(adapted, Net().init, KEY, X)
    np.testing.assert_array_equal(back["head"]["kernel"], params["head"]["kernel"])
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
