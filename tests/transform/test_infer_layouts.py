import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import loha_jax
from loha_jax import infer_layouts
from loha_jax.tree.leaves import is_adapted

USES = {
    "dense": (lambda w, x: x @ w, (4, 6), (5, 4), "io"),
    "torch": (lambda w, x: x @ w.T, (6, 4), (5, 4), "oi"),
    "query": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (4, 2, 3), (2, 3, 4), "ioo"),
    "output": (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 4), (2, 5, 2, 3), "iio"),
    "gemma query": (lambda w, x: jnp.einsum("btd,ndh->btnh", x, w), (2, 4, 3), (2, 3, 4), "oio"),
    "experts": (lambda w, x: jnp.einsum("eti,eio->eto", x, w), (3, 4, 6), (3, 5, 4), "sio"),
    "ragged": (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (2, 4, 6), (5, 4), "sio"),
    "scan": (
        lambda w, x: jax.lax.scan(lambda c, v: (c @ v, None), x, w)[0],
        (3, 4, 4),
        (5, 4),
        "sio",
    ),
    "scan of one": (
        lambda w, x: jax.lax.scan(lambda c, v: (c @ v, None), x, w)[0],
        (1, 4, 4),
        (5, 4),
        "sio",
    ),
    "scanned query": (
        lambda w, x: jax.lax.scan(
            lambda c, v: (jnp.einsum("td,dhk->thk", c, v).sum(2) @ jnp.ones((2, 4)), None), x, w
        )[0],
        (3, 4, 2, 3),
        (5, 4),
        "sioo",
    ),
    "indexed": (lambda w, x: x @ w[0] + x @ w[1], (2, 4, 6), (5, 4), "sio"),
    "reshaped": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), (5, 4), "ioo"),
    "remat and jit": (
        lambda w, x: jax.checkpoint(jax.jit(lambda w, x: x @ w))(w, x),
        (4, 6),
        (5, 4),
        "io",
    ),
    "embedding": (lambda w, x: w[jnp.arange(3)], (7, 4), (1,), "oi"),
    "tied": (lambda w, x: w[jnp.arange(3)] @ w.T, (7, 4), (1,), "oi"),
    "one wide": (lambda w, x: x @ w, (4, 1), (5, 4), "io"),
    "one head": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (4, 1, 3), (2, 3, 4), "ioo"),
    "conv": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 3, 4, 6),
        (2, 5, 5, 4),
        "kkio",
    ),
    "torch conv": (
        lambda w, x: jax.lax.conv(x, w, (1, 1), "SAME"),
        (6, 4, 3, 3),
        (2, 4, 5, 5),
        "oikk",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_use(name):
    fn, shape, x_shape, layout = USES[name]
    params = {"m": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    assert infer_layouts(
        lambda p, x: fn(p["m"]["kernel"], x), params, jax.ShapeDtypeStruct(x_shape, jnp.float32)
    ) == {"m": layout}


def test_arrays_that_no_product_reads_are_left_out():
    params = {
        "m": {"kernel": jnp.ones((4, 6))},
        "pos": jnp.ones((5, 4)),
        "mixed": {"kernel": jnp.ones((4, 6))},
    }

    def fn(p, x):
        return (x + p["pos"]) @ p["m"]["kernel"] @ p["mixed"]["kernel"].reshape(6, 4)

    assert infer_layouts(fn, params, jnp.ones((5, 4))) == {"m": "io"}


def test_an_adapted_tree_gives_the_same_answer():
    config = loha_jax.LoHaConfig(target_modules=["m"], modules_to_save=["head"])
    base = {"m": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
    params = loha_jax.inject(base, config, key=jax.random.key(0))

    def fn(p, x):
        return x @ p["m"]["kernel"] @ p["head"]["kernel"]

    assert infer_layouts(fn, params, jnp.ones((5, 4))) == infer_layouts(fn, base, jnp.ones((5, 4)))


def test_flax_layers_of_every_kind():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="embed")(ids)
            x = nn.Conv(8, (3,), name="conv")(x)
            x = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x)
            x = nn.Einsum((8, 2, 3), "btd,dhk->bthk", name="einsum")(x)
            return nn.DenseGeneral(5, axis=(-2, -1), name="head")(x)

    ids = jnp.zeros((2, 4), jnp.int32)
    params = Net().init(jax.random.key(0), ids)
    assert infer_layouts(Net().apply, params, ids) == {
        "embed": "oi",
        "conv": "kio",
        "attn.query": "ioo",
        "attn.key": "ioo",
        "attn.value": "ioo",
        "attn.out": "iio",
        "einsum": "ioo",
        "head": "iio",
    }


def test_all_linear_leaves_out_what_is_looked_up():
    """A table of biases has two axes as well; PEFT's all-linear takes nn.Linear alone."""

    def fn(params, ids, x):
        return (
            x @ params["head"]["w"]
            + params["bias_table"][ids]
            + params["tied"]["embedding"][ids] @ jnp.ones((5, 4))
        )

    params = {
        "head": {"w": jnp.ones((3, 4))},
        "bias_table": jnp.ones((7, 4)),
        "tied": {"embedding": jnp.ones((7, 5))},
    }
    ids, x = jnp.zeros(2, jnp.int32), jnp.ones((2, 3))
    layouts = infer_layouts(fn, params, ids, x)
    assert layouts == {"head": "io", "bias_table": "oi", "tied": "oi"}
    config = loha_jax.LoHaConfig(r=2, target_modules="all-linear")
    adapted = loha_jax.inject(params, config, key=jax.random.key(0), layouts=layouts)
    assert jax.tree.map(is_adapted, adapted, is_leaf=is_adapted) == {
        "head": {"w": True},
        "bias_table": False,
        "tied": {"embedding": False},
    }
