"""Adapted leaves have all operators, methods and properties of `jax.Array`.

The results are those of the dense array.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig

CONFIG = LoHaConfig(r=2, target_modules=["q"], modules_to_save=["head"], init_weights=False)
OTHER = np.random.default_rng(1).uniform(0.5, 2, (3, 3)).astype(np.float32)


def tree():
    base = {name: {"kernel": normal_array(n, (3, 3))} for n, name in enumerate(("q", "head"))}
    params = loha_jax.inject(base, CONFIG, key=jax.random.key(2))
    return jax.tree.map(lambda x, m: x + 0.5 if m else x, params, loha_jax.trainable_mask(params))


def dense(leaf):
    """The array by its definition, in numpy."""
    if isinstance(leaf, loha_jax.SavedWeight):
        return jnp.asarray(np.asarray(leaf.copies["default"]))
    f = leaf.adapters["default"]
    delta = (
        (np.asarray(f.hada_w1_a) @ f.hada_w1_b)
        * (np.asarray(f.hada_w2_a) @ f.hada_w2_b)
        * f.scaling
    )
    exact = np.asarray(leaf.kernel, np.float64) + np.asarray(delta, np.float64).T
    np.testing.assert_allclose(leaf, exact, rtol=0, atol=1e-5)
    return jnp.asarray(np.asarray(leaf))


LEAVES = {
    "kernel": lambda: tree()["q"]["kernel"],
    "saved": lambda: tree()["head"]["kernel"],
}
ARGUMENTS = {  # of the methods that need some; those without are properties or take none
    "addressable_data": (0,),
    "argpartition": (1,),
    "astype": (jnp.bfloat16,),
    "choose": ([OTHER, OTHER],),
    "clip": (-0.1, 0.1),
    "compress": (np.array([True, False, True]), 0),
    "dot": (OTHER,),
    "repeat": (2,),
    "reshape": (9,),
    "round": (1,),
    "searchsorted": (0.1,),
    "swapaxes": (0, 1),
    "take": (np.array([0, 2]),),
    "to_device": (jax.devices()[0],),
    "view": (jnp.int32,),
}
CONCRETE = (
    "block_until_ready",
    "clone",
    "devices",
    "format",
    "is_deleted",
    "is_ready",
    "platform",
    "tobytes",
)
NAMES = [n for n in dir(jax.Array) if not n.startswith("_")] + [*CONCRETE, "tolist", "weak_type"]
# where they lie in memory differs, or is of all arrays of the leaf
ELSEWHERE = (
    "addressable_shards",
    "global_shards",
    "flat",
    "at",
    "copy_to_host_async",
    "block_until_ready",
)


def outcome(function, *arguments):
    """The result, or the type of the error."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error)


def same(got, want, what):
    if isinstance(want, jax.Array | np.ndarray | np.generic):
        assert isinstance(got, type(want)), what
        assert got.dtype == want.dtype, what
        assert np.array_equal(np.asarray(got), np.asarray(want), equal_nan=got.dtype.kind == "f"), (
            what
        )
    elif isinstance(want, tuple | list):
        assert (type(got), len(got)) == (type(want), len(want)), what
        for g, w in zip(got, want, strict=True):
            same(g, w, what)
    else:
        assert got == want, (what, got, want)


@pytest.fixture(params=LEAVES, scope="module")
def pair(request):
    leaf = LEAVES[request.param]()
    return leaf, dense(leaf)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_public_name_of_an_array(pair):
    def of(x, name):
        value = getattr(x, name)
        return (
            value(*ARGUMENTS.get(name, ()))
            if callable(value) and name not in ("at", "sharding")
            else value
        )

    leaf, array = pair
    for name in NAMES:
        if name not in ELSEWHERE:
            same(
                outcome(of, leaf, name),
                outcome(of, array, name),
                name,
            )
    same(leaf.at[0].set(0), array.at[0].set(0), "at")
    assert leaf.block_until_ready() is leaf
    assert leaf.copy_to_host_async() is None
    same(leaf.addressable_shards[0].data, array, "addressable_shards")


OPERATORS = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
]
OPERATORS += ["rshift", "eq", "ne", "lt", "le", "gt", "ge", "iadd", "imatmul"]


def test_every_operator(pair):
    leaf, array = pair
    for f in [*(getattr(operator, name) for name in OPERATORS), divmod]:
        for other in (2.0, OTHER, jnp.asarray(OTHER), None, "a"):
            same(outcome(f, leaf, other), outcome(f, array, other), (f, other))
            same(outcome(f, other, leaf), outcome(f, other, array), (f, other))
        same(outcome(f, leaf, leaf), outcome(f, array, array), f)
    for f in (
        operator.neg,
        operator.pos,
        abs,
        operator.invert,
        round,
        len,
        bool,
        float,
        int,
        complex,
        operator.index,
    ):
        same(outcome(f, leaf), outcome(f, array), f)
    same(list(leaf), list(array), "iteration")
    first, *_ = leaf
    same(first, array[0], "unpacking")
    same(leaf[1:, [0, 2]], array[1:, [0, 2]], "index")
    same(outcome(operator.contains, leaf, 9.5), outcome(operator.contains, array, 9.5), "in")
    with pytest.raises(TypeError, match=r"at\[idx\]"):
        leaf[0] = 1.0
    same(np.from_dlpack(leaf), np.from_dlpack(array), "dlpack")
    assert leaf.__array_namespace__() is jnp


def test_scalars_and_integers():
    """A trained copy may be a number, or hold integers."""
    saved = tree()["head"]["kernel"]
    number = loha_jax.SavedWeight(
        jnp.float32(0), {"default": jnp.float32(1.5)}, None, "scale", ("default",)
    )
    for f in (bool, float, int, complex, lambda x: f"{x:.2f}", lambda x: x.item()):
        same(f(number), f(jnp.float32(1.5)), f)
    with pytest.raises(TypeError, match="len"):
        len(number)
    ones = loha_jax.SavedWeight(
        jnp.zeros(3, int), {"default": jnp.array([1, 2, 4])}, None, "ids", ("default",)
    )
    for f in (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift):
        same(f(ones, 2), f(jnp.array([1, 2, 4]), 2), f)
        same(f(2, ones), f(2, jnp.array([1, 2, 4])), f)
    assert 2 in ones
    assert 3 not in ones
    same(~ones, ~jnp.array([1, 2, 4]), "invert")
    assert [10, 20, 30][number.__int__()] == 20
    with pytest.raises(TypeError, match="unhashable"):
        hash(saved)


def test_arrays_of_a_leaf_are_deleted_together():
    leaf = tree()["q"]["kernel"]
    assert not leaf.is_deleted()
    leaf.delete()
    assert leaf.is_deleted()
    assert leaf.kernel.is_deleted()


def test_jax_still_takes_it_for_a_tree():
    params, x = tree(), jnp.ones((2, 3))
    leaf, array = params["q"]["kernel"], dense(params["q"]["kernel"])
    want = x @ array
    same(jax.jit(lambda w: x @ w)(leaf), want, "jit")
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), leaf)
    got = jax.vmap(lambda w: loha_jax.adapt(lambda w: x @ w)(w))(stacked)
    np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-5)
    (moved,) = jax.tree.leaves(
        jax.device_put({"w": leaf}, jax.devices()[0]), is_leaf=loha_jax.tree.leaves.is_adapted
    )
    assert isinstance(moved, loha_jax.LoHaWeight)
    assert isinstance(jax.eval_shape(lambda w: w, leaf), loha_jax.LoHaWeight)
    out = loha_jax.adapt(lambda w: (w.sum(), [row.mean() for row in w], w == 0, w**2, -abs(w)))(
        leaf
    )
    want = (array.sum(), [row.mean() for row in array], array == 0, array**2, -abs(array))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), out, want)
