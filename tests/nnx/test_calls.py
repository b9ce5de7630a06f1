import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import FOLDS, IDS, WIDTH, Block, Model, adapted, close, split
from nnx_reference import ALPHA, R, dense, factors, with_sums
from random_arrays import normal_array

import loha_jax
from loha_jax.nnx import LoHaParam


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


# ----------------------------------------------------------------------------- NNX's own functions


def jit_on_state(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def split_by_type(model, x):
    graphdef, trained, rest = nnx.split(model, LoHaParam, ...)
    assert len(jax.tree.leaves(trained)) == 4 * len(FOLDS)
    return nnx.merge(graphdef, trained, rest)(x)


def update_another(model, x):
    other = adapted(seed=2)
    assert jnp.abs(other(x) - model(x)).max() > 1e-3
    nnx.update(other, nnx.state(model, LoHaParam))
    return other(x)


def in_tree_mode(model, x):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        graphdef, state = nnx.split(model)
        close(nnx.merge(graphdef, state)(x), model(x))
        close(nnx.jit(lambda m, x: m(x))(model, x), model(x))
        return adapted()(x)


def scan_over_rows(model, x):
    return nnx.scan(lambda m, x: m(x[None])[0], in_axes=(None, 0), out_axes=0)(model, x)


FUNCTIONS = {
    "call": lambda m, x: m(x),
    "split and merge": lambda m, x: nnx.merge(*nnx.split(m))(x),
    "split by type": split_by_type,
    "state and update": update_another,
    "clone": lambda m, x: nnx.clone(m)(x),
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m))(x),
    "tree map": lambda m, x: jax.tree.map(lambda a: a, m)(x),
    "view": lambda m, x: nnx.view(m, deterministic=True, raise_if_not_found=False)(x),
    "nnx.jit": lambda m, x: nnx.jit(lambda m, x: m(x))(m, x),
    "cached_partial": lambda m, x: nnx.cached_partial(nnx.jit(lambda m, x: m(x)), m)(x),
    "jax.jit on the model": lambda m, x: jax.jit(lambda m, x: m(x))(m, x),
    "jax.jit on its state": jit_on_state,
    "remat": lambda m, x: nnx.remat(lambda m, x: m(x))(m, x),
    "vmap over rows": lambda m, x: nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(m, x),
    "jax.vmap over rows": lambda m, x: jax.vmap(lambda x: m(x[None])[0])(x),
    "scan over rows": scan_over_rows,
    "cond": lambda m, x: nnx.cond(x[0, 0] == 0, lambda m, x: m(x), lambda m, x: m(x) + 1, m, x),
    "tree mode": in_tree_mode,
    "adapt": lambda m, x: loha_jax.adapt(lambda m, x: m(x))(m, x),
    "adapt, fused": lambda m, x: loha_jax.adapt(lambda m, x: m(x), strategy="fused")(m, x),
}


@pytest.fixture(scope="module")
def reference():
    with jax.enable_x64(True):
        model = adapted()
        return np.asarray(with_sums(Model(nnx.Rngs(0)), model, FOLDS)(IDS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_goes_through_nnxs_functions(name, reference):
    model = adapted()
    close(FUNCTIONS[name](model, jnp.asarray(IDS)), reference)
    close(model(IDS), reference)


def test_a_call_leaves_the_model_the_same_pytree():
    """In Flax 0.12.3, what is deleted from a copy of a node is no leaf of the node itself."""
    model = adapted()
    before = [path for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    model(IDS)
    assert [path for path, _ in jax.tree_util.tree_leaves_with_path(model)] == before


def test_the_model_is_printed_and_tabulated(capsys):
    model = adapted()
    nnx.display(model)
    assert "kernel_lora_hada_w1_a=LoRAParam" in repr(model)
    assert "kernel_lora=LoHaWeight(None io, default: r=2 alpha=3)" in repr(model)
    assert "hada_w1_a" in repr(nnx.state(model, LoHaParam))
    out = model(IDS)
    text = nnx.tabulate(model, jnp.asarray(IDS), console_kwargs={"width": 200})
    assert "LoRAParam" in text
    assert "280" in text  # the factors' numbers
    close(model(IDS), out)


@pytest.mark.parametrize("scanned", ["inside", "outside"])
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_layers_stacked_by_vmap_and_scanned(scanned, remat):
    call = nnx.remat(lambda layer, x: layer(x)) if remat else lambda layer, x: layer(x)
    forward = nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(Block)(split(rngs, 3))

        def __call__(self, x):
            return forward(x, self.layers)

    run = (lambda m, x: m(x)) if scanned == "inside" else (lambda m, x: forward(x, m.layers))
    folds = {"layers/up/kernel": dense, "layers/down/kernel": dense}
    x = normal_array(0, (3, WIDTH), jnp.float64)
    model = adapted(Stacked, folds, target_modules=["up", "down"])
    assert model.layers.up.kernel_lora.template.names == (
        "layers.0.up",
        "layers.1.up",
        "layers.2.up",
    )
    plain = with_sums(Stacked(nnx.Rngs(0)), model, folds)
    close(run(model, x), run(plain, x))
    explained = loha_jax.explain(run, model, x)
    assert (explained.dense, explained.unused) == ((), ())
    loss = lambda m: (run(m, x) ** 2).sum()  # noqa: E731
    ours = nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(model)
    kernel = nnx.grad(loss)(plain)["layers"]["up"]["kernel"][...]
    f = {n: v.get_value() for n, v in factors(model, "layers/up/kernel").items()}
    expected = (kernel.swapaxes(1, 2) * (f["hada_w2_a"] @ f["hada_w2_b"]) * ALPHA / R) @ f[
        "hada_w1_b"
    ].swapaxes(1, 2)
    close(ours["layers"]["up"]["kernel_lora_hada_w1_a"][...], expected)
    nnx.vmap(lambda layer: layer(x))(model.layers)
    close(
        nnx.vmap(lambda layer: layer(x))(model.layers),
        nnx.vmap(lambda layer: layer(x))(plain.layers),
    )
