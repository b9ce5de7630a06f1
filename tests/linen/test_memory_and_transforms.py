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
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from linen_reference import IDS, KEY, Block, Case, Scanned, Tied, as_stored, plain_params

import loha_jax
from loha_jax import linen
from loha_jax.linen import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEinsum, LoHaEmbed


def made(compiled, *shape):
    """Operations of a program whose result has this shape."""
    found = re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* (\w[\w-]*)\(", compiled.as_text())
    return [
        operation
        for operation in found
        if operation not in ("parameter", "get-tuple-element", "bitcast")
    ]


def compiled_step(layer, x, method=None):
    """Value and gradients of the factors and of a floating x.

    A layer without factors gives those of x alone.
    """
    params = jax.eval_shape(
        lambda: layer.init(KEY, jnp.zeros(x.shape, x.dtype), method=method)["params"]
    )
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
        (
            Case(LoHaDenseGeneral, {"features": (8, 256)}, (), None),
            ROWS,
            [(1024, 2048), (1024, 8, 256)],
        ),
        (
            Case(LoHaEinsum, {"shape": (1024, 8, 256), "einsum_str": "bd,dnh->bnh"}, (), None),
            ROWS,
            [(1024, 2048), (1024, 8, 256)],
        ),
        (
            Case(LoHaEmbed, {"num_embeddings": 2048, "features": 1024}, (), None, "attend"),
            ROWS,
            [(2048, 1024)],
        ),
        (
            Case(LoHaEmbed, {"num_embeddings": 2048, "features": 1024}, (), None),
            TOKENS,
            [(2048, 1024)],
        ),
        *(
            (
                Case(
                    LoHaConv,
                    {"features": 256, "kernel_size": (3, 3), "use_effective_conv2d": cores},
                    (),
                    None,
                ),
                IMAGE,
                [(3, 3, 256, 256), (256, 256, 3, 3), (256, 2304)],
            )
            for cores in (False, True)
        ),
    ],
    ids=["dense", "general", "einsum", "attend", "lookup", "conv", "conv_cores"],
)
def test_no_array_of_the_kernels_shape(case, x, shapes):
    """No array of the kernel's shape is made that Flax does not make."""
    step, frozen = (compiled_step(layer, x, case.method) for layer in (case.layer(), case.plain()))
    for shape in shapes:
        for order in (shape, shape[::-1]):
            assert len(made(step, *order)) <= len(made(frozen, *order))


def test_the_search_finds_an_array_of_the_kernels_shape():
    assert made(compiled_step(LoHaDense(2048, r=4, strategy="dense"), ROWS), 1024, 2048)


@pytest.mark.parametrize(
    "block", [Block, nn.remat(Block), nn.jit(Block)], ids=["plain", "remat", "jit"]
)
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

    np.testing.assert_allclose(
        model.apply({"params": params}, x), dense(params), rtol=1e-5, atol=1e-5
    )
    got = jax.jit(jax.grad(lambda p: model.apply({"params": p}, x).sum()))(params)
    want = jax.grad(lambda p: dense(p).sum())(params)
    for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "bias"):
        np.testing.assert_allclose(
            got["layers"]["q"][name], want["layers"]["q"][name], rtol=1e-4, atol=1e-4
        )


def test_vmap_over_parameters_and_over_inputs():
    x = jax.random.normal(KEY, (5, 3, 4))
    each = nn.vmap(LoHaDense, variable_axes={"params": 0}, split_rngs={"params": True})(
        2, r=2, init_weights=False
    )
    params = each.init(KEY, x)["params"]
    assert params["hada_w1_b"].shape == (5, 2, 4)
    want = jnp.einsum("nbi,nio->nbo", x, plain_params(params)["kernel"]) + params["bias"][:, None]
    np.testing.assert_allclose(each.apply({"params": params}, x), want, rtol=1e-5, atol=1e-5)
    layer = LoHaDense(2, r=2, init_weights=False)
    params = layer.init(KEY, x)["params"]
    got = jax.vmap(lambda x: layer.apply({"params": params}, x))(x)
    np.testing.assert_allclose(got, layer.apply({"params": params}, x), rtol=1e-6, atol=1e-6)


def test_share_scope():
    """`share_scope` puts the parameters beside the parent's, which start as ever."""

    class Parent(nn.Module):
        dense: Any

        @nn.compact
        def __call__(self, x):
            inner = self.dense(4, name="inner")
            nn.share_scope(self, inner)
            return inner(x) * self.param("gain", nn.initializers.normal(), (4,))

    x, model = jnp.ones((2, 3)), Parent(functools.partial(LoHaDense, r=2))
    params = model.init(KEY, x)["params"]
    assert set(params) == {
        "kernel",
        "bias",
        "gain",
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
    }
    for name, value in Parent(nn.Dense).init(KEY, x)["params"].items():
        np.testing.assert_array_equal(params[name], value)
    assert isinstance(linen.to_adapted(params, model.init, KEY, x)["kernel"], loha_jax.LoHaWeight)


def test_shape_evaluation_lazy_init_tabulate_and_submodule_access():
    variables = Tied().init(KEY, IDS)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(Tied().init, KEY, IDS)
    )
    lazy = Tied().lazy_init(KEY, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    jax.tree.map(np.testing.assert_array_equal, lazy, variables)
    table = Tied().tabulate(KEY, IDS, console_kwargs={"width": 200})
    assert "LoHaEinsum" in table
    assert "hada_w1_a" in table
    weight = Tied().apply(variables, method=lambda m: jnp.asarray(m.embed.embedding))
    embed = variables["params"]["embed"]
    np.testing.assert_allclose(
        weight, embed["embedding"] + as_stored(embed, (11, 8), 8 / 2), rtol=1e-5, atol=1e-6
    )


def test_a_train_state_trains_the_factors_alone():
    variables = Tied().init(KEY, IDS)
    mask = linen.trainable_mask(variables["params"])
    trained = {path for path, train in flatten_dict(mask).items() if train}
    assert trained == {path for path in flatten_dict(mask) if path[-1].startswith("hada")}
    tx = optax.transforms.selective_transform(
        optax.adam(1e-2), freeze_mask=jax.tree.map(operator.not_, mask)
    )
    state = TrainState.create(apply_fn=Tied().apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, IDS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.roll(IDS, 1, -1)
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    before, after = flatten_dict(variables["params"]), flatten_dict(state.params)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == trained
