"""Every way to use a kernel in a product, and its rule."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pullbacks import BOUNDS, adapted, assert_equals_merged_in_float64, check, normal

import loha_jax

einsum = jnp.einsum


def ragged(x, w, sizes):
    return jax.lax.ragged_dot(x, w, jnp.array(sizes))


def ragged_heads(x, w, sizes, order):
    """Contract two axes of each row, in the order that is given."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        ((order, order), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return jax.lax.ragged_dot_general(x, w, jnp.array(sizes), numbers)


USES = {
    "matmul": (lambda w, x: x @ w, (4, 6), "io", (5, 4), ()),
    "left operand": (lambda w, x: w @ x, (6, 4), "oi", (4, 5), ()),
    "vector": (lambda w, x: w @ x, (6, 4), "oi", (4,), ()),
    "batched rows": (lambda w, x: x @ w, (4, 6), "io", (2, 3, 4), ()),
    "leading contraction": (lambda w, x: einsum("ibt,io->bto", x, w), (4, 6), "io", (4, 2, 3), ()),
    "transposed": (lambda w, x: x @ w.T, (6, 4), "oi", (5, 4), ()),
    "out side contracted": (lambda w, x: x @ w.T, (6, 4), "io", (5, 4), ()),
    "query": (lambda w, x: einsum("btd,dhk->bthk", x, w), (4, 2, 3), "ioo", (2, 3, 4), ()),
    "attention output": (
        lambda w, x: einsum("bthk,hkd->btd", x, w),
        (2, 3, 4),
        "iio",
        (2, 5, 2, 3),
        (),
    ),
    "attention output, heads first": (
        lambda w, x: einsum("bhtk,hkd->btd", x, w),
        (2, 3, 4),
        "iio",
        (2, 2, 5, 3),
        (),
    ),
    "in axes in another order": (
        lambda w, x: einsum("bxy,yxo->bo", x, w),
        (3, 2, 4),
        "i1 i0 o",
        (5, 2, 3),
        (),
    ),
    "gemma query": (lambda w, x: einsum("btd,ndh->btnh", x, w), (2, 4, 3), "oio", (2, 3, 4), ()),
    "gemma fused kv": (
        lambda w, x: einsum("bsd,ckdh->cbskh", x, w),
        (2, 2, 4, 3),
        "soio",
        (2, 3, 4),
        (),
    ),
    "experts": (lambda w, x: einsum("eti,eio->eto", x, w), (3, 4, 6), "sio", (3, 5, 4), ()),
    "experts, one input": (lambda w, x: einsum("ti,eio->teo", x, w), (3, 4, 6), "sio", (5, 4), ()),
    "experts, summed": (lambda w, x: einsum("eti,eio->to", x, w), (3, 4, 6), "sio", (3, 5, 4), ()),
    "experts, all ways": (
        lambda w, x: einsum("abti,abcio->atoc", x, w),
        (2, 3, 2, 4, 6),
        "sssio",
        (2, 3, 5, 4),
        (),
    ),
    "two stack axes": (
        lambda w, x: einsum("abti,baio->abto", x, w),
        (3, 2, 4, 6),
        "ssio",
        (2, 3, 5, 4),
        (),
    ),
    "ragged": (lambda w, x: ragged(x, w, [2, 0, 5]), (3, 4, 6), "sio", (7, 4), ()),
    "ragged, rows of no expert": (lambda w, x: ragged(x, w, [2, 3]), (2, 4, 6), "sio", (7, 4), ()),
    "ragged, one expert": (lambda w, x: ragged(x, w, [7]), (1, 4, 6), "sio", (7, 4), ()),
    "ragged, some of the experts": (
        lambda w, x: ragged(x, w[1:], [4, 3]),
        (3, 4, 6),
        "sio",
        (7, 4),
        (),
    ),
    "ragged, out side contracted": (
        lambda w, x: ragged(x, w.swapaxes(1, 2), [2, 0, 5]),
        (3, 6, 4),
        "sio",
        (7, 4),
        (),
    ),
    "ragged, stack in the middle": (
        lambda w, x: ragged(x, w.swapaxes(0, 1), [2, 0, 5]),
        (4, 3, 6),
        "iso",
        (7, 4),
        (),
    ),
    "ragged, two stack axes": (
        lambda w, x: ragged(x, w.reshape(6, 4, 3), [1, 2, 0, 1, 2, 1]),
        (2, 3, 4, 3),
        "ssio",
        (7, 4),
        (),
    ),
    "ragged, two stack axes exchanged": (
        lambda w, x: ragged(x, w.swapaxes(0, 1).reshape(6, 4, 3), [1, 2, 0, 1, 2, 1]),
        (2, 3, 4, 3),
        "ssio",
        (7, 4),
        ("ragged_dot_general",),
    ),
    "ragged, two in axes": (
        lambda w, x: ragged_heads(x, w, [2, 5], (1, 2)),
        (2, 3, 2, 6),
        "siio",
        (7, 3, 2),
        (),
    ),
    "ragged, two in axes the other way round": (
        lambda w, x: ragged_heads(x, w, [2, 5], (2, 1)),
        (2, 3, 2, 6),
        "siio",
        (7, 3, 2),
        (),
    ),
    "ragged, two out axes": (
        lambda w, x: ragged_heads(x, w, [2, 5], (1,)),
        (2, 4, 3, 2),
        "sioo",
        (7, 4),
        (),
    ),
    "ragged, scanned over layers": (
        lambda w, x: jax.lax.scan(lambda x, w: (ragged(x, w, [2, 5]), None), x, w)[0],
        (3, 2, 4, 4),
        "ssio",
        (7, 4),
        (),
    ),
    "reshape joins out": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), "ioo", (5, 4), ()),
    "reshape splits out": (
        lambda w, x: einsum("td,dhk->thk", x, w.reshape(4, 2, 3)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "reshape splits in": (
        lambda w, x: einsum("thk,hkd->td", x, w.reshape(2, 2, 6)),
        (4, 6),
        "io",
        (5, 2, 2),
        (),
    ),
    "reshape joins stack": (
        lambda w, x: einsum("eti,eio->eto", x, w.reshape(6, 4, 3)),
        (2, 3, 4, 3),
        "ssio",
        (6, 5, 4),
        (),
    ),
    "reshape splits stack": (
        lambda w, x: einsum("abti,abio->abto", x, w.reshape(2, 3, 4, 3)),
        (6, 4, 3),
        "sio",
        (2, 3, 5, 4),
        (),
    ),
    "reshape mixes": (lambda w, x: x @ w.reshape(6, 4), (4, 6), "io", (5, 6), ("reshape",)),
    "slice of out": (lambda w, x: x @ w[:, 1:5:2], (4, 6), "io", (5, 4), ()),
    "slice of in": (lambda w, x: x @ w[2:], (6, 4), "io", (5, 4), ()),
    "slice of one out axis": (
        lambda w, x: einsum("td,dhk->thk", x, w[:, :, 1:]),
        (4, 2, 3),
        "ioo",
        (5, 4),
        (),
    ),
    "split in three": (
        lambda w, x: sum(x @ p for p in jnp.split(w, 3, axis=1)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "one of a stack": (lambda w, x: x @ w[1], (3, 4, 6), "sio", (5, 4), ()),
    "one of a stack, dynamic": (
        lambda w, x: x @ w[jnp.argmax(jnp.zeros(2)) + 1],
        (3, 4, 6),
        "sio",
        (5, 4),
        (),
    ),
    "dynamic slice": (
        lambda w, x: x @ jax.lax.dynamic_slice(w, (0, x.ndim), (4, 3)),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "new axes": (lambda w, x: (x[None] @ w[None])[0], (4, 6), "io", (5, 4), ()),
    "broadcast over a batch": (
        lambda w, x: einsum("bti,bio->bto", x, jnp.broadcast_to(w, (2, 4, 6))),
        (4, 6),
        "io",
        (2, 5, 4),
        (),
    ),
    "cast there and back": (
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32) * 0 + x @ w,
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "scaled": (lambda w, x: x @ (0.5 * w) + x @ (w / 3.0), (4, 6), "io", (5, 4), ()),
    "used twice": (lambda w, x: (x @ w) @ w.T, (4, 6), "io", (5, 4), ()),
    "product of two": (lambda w, x: x @ (w @ w.T), (4, 6), "io", (5, 4), ("dot_general",)),
    "embedding": (lambda w, x: w[jnp.arange(5) % 3], (7, 4), "oi", (1,), ()),
    "embedding of 2-D ids": (
        lambda w, x: jnp.take(w, jnp.arange(6).reshape(2, 3), axis=0),
        (7, 4),
        "oi",
        (1,),
        (),
    ),
    "columns of an embedding": (
        lambda w, x: jnp.take(w, jnp.arange(3), axis=1),
        (4, 7),
        "io",
        (1,),
        (),
    ),
    "tied embedding": (lambda w, x: jnp.tanh(w[jnp.arange(5) % 3]) @ w.T, (7, 4), "oi", (1,), ()),
    "sum of squares": (lambda w, x: (w**2).sum() + x @ w, (4, 6), "io", (5, 4), ("integer_pow",)),
    "stop_gradient elsewhere": (
        lambda w, x: x @ w + jax.lax.stop_gradient(x @ w),
        (4, 6),
        "io",
        (5, 4),
        (),
    ),
    "one row in": (lambda w, x: x @ w, (1, 6), "io", (5, 1), ()),
    "one column out": (lambda w, x: x @ w, (4, 1), "io", (5, 4), ()),
    "one head": (lambda w, x: einsum("bthk,hkd->btd", x, w), (1, 3, 4), "iio", (2, 5, 1, 3), ()),
    "stack of one": (lambda w, x: einsum("eti,eio->eto", x, w), (1, 4, 6), "sio", (1, 5, 4), ()),
}


@pytest.mark.parametrize("name", USES)
def test_use(name):
    fn, shape, layout, x_shape, dense = USES[name]
    params = adapted(
        {"m": {"kernel": normal(*shape)}}, {"m": layout}, ["m"] if "s" not in layout else r".*\bm"
    )
    check(
        lambda p, x: fn(jnp.asarray(p["m"]["kernel"]), x),
        params,
        normal(*x_shape, seed=1),
        dense=dense,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", ["factored", "fused"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_ragged_products_of_any_dtype(dtype, strategy):
    """In float64, with the gradient of the rows and two adapters."""
    base = {"m": {"kernel": normal(3, 4, 6, dtype=dtype)}}
    params = adapted(base, {"m": "sio"}, r".*\bm")
    other = loha_jax.LoHaConfig(r=2, alpha=1, target_modules=r".*\bm", init_weights=False)
    params = loha_jax.inject(params, other, key=jax.random.key(3), adapter_name="other")
    params = loha_jax.set_adapter(params, ["default", "other"])

    def fn(p, x):
        return ragged(x, jnp.asarray(p["m"]["kernel"]), [2, 0, 5])

    x = normal(7, 4, seed=1, dtype=dtype)
    assert_equals_merged_in_float64(fn, params, x, dtype, strategy)


def test_ragged_products_by_forward_mode():
    params, x = adapted({"m": {"kernel": normal(3, 4, 6)}}, {"m": "sio"}, r".*\bm"), normal(7, 4)
    apply = loha_jax.adapt(
        lambda p, x: ragged(x, jnp.asarray(p["m"]["kernel"]), [2, 0, 5]), forward_mode=True
    )
    got = jax.jvp(lambda x: apply(params, x), (x,), (jnp.ones_like(x),))
    kernel = loha_jax.merge(params)["m"]["kernel"]
    want = jax.jvp(lambda x: ragged(x, kernel, [2, 0, 5]), (x,), (jnp.ones_like(x),))
    for one, other in zip(got, want, strict=True):
        assert jnp.allclose(one, other, atol=1e-4)


def test_a_ragged_training_step_materialises_no_update():
    """No array of the factored step but the kernel has the kernel's shape."""
    params = adapted({"m": {"kernel": normal(3, 5, 6)}}, {"m": "sio"}, r".*\bm", r=2)
    trainable, frozen = loha_jax.partition(params)

    def makers(strategy):
        apply = loha_jax.adapt(
            lambda p, x: ragged(x, jnp.asarray(p["m"]["kernel"]), [2, 0, 5]), strategy=strategy
        )

        def loss(trainable, x):
            return apply(loha_jax.combine(trainable, frozen), x).sum()

        step = jax.make_jaxpr(jax.grad(loss, (0, 1)))(trainable, normal(7, 5))
        return re.findall(r":f32\[3,5,6\] = (\w+)", str(step))

    assert makers("factored") == ["stop_gradient"]
    assert len(makers("dense")) > 1


LETTERS = "abcdefgh"


@st.composite
def einsums(draw):
    """A product of x with a kernel of any layout, and the einsum that says so."""
    n_in, n_out, n_stack = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    kinds = draw(st.permutations("i" * n_in + "o" * n_out + "s" * n_stack))
    size = dict(
        zip(LETTERS, draw(st.lists(st.integers(1, 3), min_size=8, max_size=8)), strict=True)
    )
    kernel = LETTERS[: len(kinds)]
    shared, free = [], []
    swap = draw(st.booleans())
    for letter, kind in zip(kernel, kinds, strict=True):
        part = draw(st.sampled_from(["batch", "sum", "free"])) if kind == "s" else None
        contracted = kind == ("o" if swap else "i") or part == "sum"
        if contracted or part == "batch":
            shared.append(letter)
        if not contracted:
            free.append(letter)
    rows = list("yz"[: draw(st.integers(0, 2))])
    size |= {"y": 2, "z": 3}
    x = "".join(draw(st.permutations(shared + rows)))
    out = "".join(draw(st.permutations(free + rows)))
    equation = f"{x},{kernel}->{out}"
    return "".join(kinds), [size[c] for c in kernel], [size[c] for c in x], equation


# The bound on values and gradients against float64, relative to the largest entry; in bfloat16,
# where the base product, the sum and (fused) W + ΔW are rounded by up to 2^-9 each, to the largest
# entry of the same sums without cancellation.


@pytest.mark.slow
@settings(max_examples=60)
@given(
    einsums(),
    st.sampled_from(list(BOUNDS)),
    st.sampled_from(["factored", "fused", "fused in blocks"]),
)
def test_any_einsum_with_any_layout(case, dtype, strategy):
    layout, kernel_shape, x_shape, equation = case
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        if strategy == "fused in blocks":  # one after the other, of three elements each
            patch.setattr(loha_jax.transform.forms, "_BLOCK_ELEMENTS", 3)
            strategy = "fused"
        params = adapted(
            {"m": {"kernel": normal(*kernel_shape, dtype=dtype)}}, {"m": layout}, r".*\bm", r=2
        )
        x = normal(*x_shape, seed=1, dtype=dtype)

        def fn(p, x):
            return jnp.einsum(equation, x, jnp.asarray(p["m"]["kernel"]))

        assert_equals_merged_in_float64(fn, params, x, dtype, strategy)
