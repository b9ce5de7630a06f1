import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loha_jax import Layout
from loha_jax.default_layouts import default_layout


@pytest.mark.parametrize(
    ("word", "shape", "torch_shape", "equation"),
    [
        ("io", (3, 5), (5, 3), "io->oi"),
        ("oi", (5, 3), (5, 3), "oi->oi"),
        ("ioo", (6, 2, 4), (8, 6), "iab->abi"),
        ("iio", (2, 4, 6), (6, 8), "abo->oab"),
        ("i1i0o", (4, 2, 6), (6, 8), "bao->oab"),
        ("i1 i0 o", (4, 2, 6), (6, 8), "bao->oab"),
        ("sio", (7, 3, 5), (7, 5, 3), "sio->soi"),
        ("soio", (2, 4, 6, 3), (2, 12, 6), "saib->sabi"),
        ("kkio", (3, 2, 6, 4), (4, 6, 3, 2), "abio->oiab"),
        ("kio", (3, 6, 4), (4, 6, 3), "aio->oia"),
        ("kkkio", (3, 2, 1, 6, 4), (4, 6, 3, 2, 1), "abcio->oiabc"),
        ("s1 s0 i o", (2, 3, 4, 5), (3, 2, 5, 4), "abio->baoi"),
    ],
)
def test_fold_and_unfold_agree_with_an_einsum(word, shape, torch_shape, equation):
    layout = Layout(word)
    kernel = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    torch_weight = np.einsum(equation, kernel).reshape(torch_shape)
    assert layout.torch_shape(shape) == torch_shape
    np.testing.assert_array_equal(layout.unfold(jnp.asarray(kernel)), torch_weight)
    np.testing.assert_array_equal(layout.fold(jnp.asarray(torch_weight), shape), kernel)


@settings(max_examples=20)
@given(st.permutations(list("ssiookk")), st.data())
def test_fold_inverts_unfold_for_any_word(letters, data):
    layout = Layout("".join(letters))
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=7, max_size=7)))
    kernel = jnp.arange(math.prod(shape)).reshape(shape)
    assert (layout.fold(layout.unfold(kernel), shape) == kernel).all()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "not a layout"),
        ("ix", "not a layout"),
        ("ii", "no out axis"),
        ("so", "no in axis"),
        ("i1 i o", "must number all"),
        ("i0 i2 o", "from 0"),
    ],
)
def test_words_that_are_no_layout(word, message):
    with pytest.raises(ValueError, match=message):
        Layout(word)


def test_a_layout_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="describes 2 axes"):
        Layout("io").torch_shape((1, 2, 3))


@pytest.mark.parametrize(
    ("word", "ndim", "inner"), [("sio", 2, "io"), ("ssio", 3, "sio"), ("s1 s0 i o", 3, "s0io"), ("io", 2, "io")]
)
def test_a_scan_strips_leading_stack_axes(word, ndim, inner):
    assert Layout(word).strip(ndim) == Layout(inner)


@pytest.mark.parametrize(("word", "ndim"), [("io", 1), ("iso", 2), ("sio", 1), ("io", 3)])
def test_only_leading_stack_axes_can_go(word, ndim):
    with pytest.raises(ValueError, match="Only leading stack axes"):
        Layout(word).strip(ndim)


def attention(query, out, bias=None):
    shapes = {("attn", n, "kernel"): query for n in ("query", "key", "value")} | {("attn", "out", "kernel"): out}
    return shapes | ({("attn", "query", "bias"): bias} if bias else {})


@pytest.mark.parametrize(
    ("shapes", "path", "word"),
    [
        ({}, ("d", "kernel"), "io"),
        (attention((8, 2, 4), (2, 4, 8)), ("attn", "query", "kernel"), "ioo"),
        (attention((8, 2, 4), (2, 4, 8)), ("attn", "out", "kernel"), "iio"),
        (attention((3, 8, 2, 4), (3, 2, 4, 8)), ("attn", "value", "kernel"), "sioo"),
        (attention((3, 8, 2, 4), (3, 2, 4, 8)), ("attn", "out", "kernel"), "siio"),
        (attention((4, 4, 4), (4, 4, 4), (4, 4)), ("attn", "query", "kernel"), "ioo"),
        ({("c", "kernel"): (3, 3, 6, 4), ("c", "bias"): (4,)}, ("c", "kernel"), "kkio"),
        ({("c", "kernel"): (3, 3, 3, 6, 4), ("c", "bias"): (4,)}, ("c", "kernel"), "kkkio"),
    ],
)
def test_default_layouts(shapes, path, word):
    shapes = shapes or {path: (3, 4)}
    assert default_layout(shapes[path], path, shapes) == Layout(word)


@pytest.mark.parametrize(
    ("shapes", "path"),
    [
        ({("x", "kernel"): (3, 4, 5)}, ("x", "kernel")),
        (attention((3, 8, 8), (3, 8, 8)), ("attn", "query", "kernel")),  # three Dense in a scan
        (attention((8, 8, 8), (8, 8, 8)), ("attn", "query", "kernel")),  # could be either
        ({("x", "kernel"): (2, 256, 8, 4)}, ("x", "kernel")),  # no convolution is 256 wide
        ({("x", "kernel"): (2, 3, 8, 4), ("x", "bias"): (2, 8, 4)}, ("x", "kernel")),
    ],
)
def test_ambiguous_kernels_are_errors_that_say_how_to_settle_them(shapes, path):
    with pytest.raises(ValueError, match=r"could be several things.*layouts=.*infer_layouts"):
        default_layout(shapes[path], path, shapes)
