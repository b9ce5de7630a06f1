import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loha_jax
from loha_jax import Layout
from loha_jax.targets.default_layouts import default_layout


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
    ("word", "ndim", "inner"),
    [("sio", 2, "io"), ("ssio", 3, "sio"), ("s1 s0 i o", 3, "s0io"), ("io", 2, "io")],
)
def test_a_scan_strips_leading_stack_axes(word, ndim, inner):
    assert Layout(word).strip(ndim) == Layout(inner)


@pytest.mark.parametrize(("word", "ndim"), [("io", 1), ("iso", 2), ("sio", 1), ("io", 3)])
def test_only_leading_stack_axes_can_go(word, ndim):
    with pytest.raises(ValueError, match="Only leading stack axes"):
        Layout(word).strip(ndim)


def attention(query, out, bias=None):
    shapes = {("attn", n, "kernel"): query for n in ("query", "key", "value")} | {
        ("attn", "out", "kernel"): out
    }
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
        # names
        ({}, ("q", "weight"), "oi"),
        ({}, ("gru", "weight_ih"), "oi"),
        ({}, ("mha", "in_proj_weight"), "oi"),
        ({}, ("q", "w"), "io"),
        ({}, ("embed", "embedding"), "oi"),
        ({}, ("embed", "embeddings"), "oi"),
        (
            {("Conv_0", "kernel"): (3, 3, 6, 6), ("Dense_0", "bias"): (2,)},
            ("Conv_0", "kernel"),
            "kkio",
        ),
        ({("Conv_0", "kernel"): (3, 6, 6)}, ("Conv_0", "kernel"), "kio"),
        (
            {("net", "initial_conv", "w"): (3, 3, 6, 6), ("net", "batch_norm", "scale"): (6,)},
            ("net", "initial_conv", "w"),
            "kkio",
        ),
        ({("conv1", "weight"): (6, 6, 3, 3)}, ("conv1", "weight"), "oikk"),
        # neighbours
        (
            {("Conv_0", "kernel"): (3, 3, 3, 6, 6), ("norm", "scale"): (6,)},
            ("Conv_0", "kernel"),
            "kkkio",
        ),
        (
            {("layers", "Conv_0", "kernel"): (3, 3, 6, 6), ("layers", "norm", "scale"): (6,)},
            ("layers", "Conv_0", "kernel"),
            "kkio",
        ),
        (
            {("down", "0", "weight"): (8, 6, 3, 3), ("down", "1", "weight"): (8,)},
            ("down", "0", "weight"),
            "oikk",
        ),
        (  # a square one of 1x1, as in RegNet and ShuffleNet
            {("f", "a", "0", "weight"): (6, 6, 1, 1), ("f", "a", "1", "weight"): (6,)},
            ("f", "a", "0", "weight"),
            "oikk",
        ),
        (  # a square one like others of its name, as in EfficientNetV2
            {
                ("block", "0", "0", "weight"): (6, 6, 3, 3),
                ("block", "0", "1", "weight"): (6,),
                ("block", "1", "0", "weight"): (8, 6, 3, 3),
                ("block", "1", "1", "weight"): (8,),
            },
            ("block", "0", "0", "weight"),
            "oikk",
        ),
        # torch's square, depthwise and 1x1 convolutions, as real models name them
        ({("decode_head", "linear_fuse", "weight"): (8, 16, 1, 1)}, None, "oikk"),  # SegFormer
        ({("layers", "4", "weight"): (8, 8, 3, 3)}, None, "oikk"),  # AutoencoderTiny
        ({("2", "weight"): (8, 8, 3, 3), ("0", "weight"): (8,)}, None, "oikk"),  # pre-activation
        ({("0", "weight"): (8, 8, 3, 3), ("1", "weight"): (8,)}, None, "oikk"),  # DeepLab
        ({("0", "weight"): (8, 1, 5, 5), ("1", "weight"): (8,)}, None, "oikk"),  # MobileNet
        ({("2", "weight"): (8, 4, 4, 4), ("3", "weight"): (8,)}, None, "oikk"),  # DCGAN's critic
        ({("conv", "weight"): (8, 8, 2), ("norm", "bias"): (8,)}, None, "oik"),  # Wav2Vec2
        ({("conv1d", "weight"): (8, 1, 4), ("conv1d", "bias"): (8,)}, None, "oik"),  # Mamba
        ({("sr", "weight"): (8, 8, 4, 4), ("sr", "bias"): (8,)}, None, "oikk"),  # SegFormer
        (
            {("patch_embed2", "proj", w): s for w, s in (("weight", (8, 8, 2, 2)), ("bias", (8,)))},
            None,
            "oikk",
        ),
        (
            {("up", "0", "weight"): (32, 8, 3, 3), ("up", "0", "bias"): (32,)},
            None,
            "oikk",
        ),  # Swin2SR
        ({("ups", "conv", "weight"): (8, 8, 3, 3), ("ups", "conv", "bias"): (8,)}, None, "oikk"),
        ({("up", "weight"): (8, 8, 1, 1), ("up", "bias"): (8,)}, None, "oikk"),
        ({("Conv_0", "kernel"): (2, 2, 8, 8), ("Conv_0", "bias"): (8,)}, None, "kkio"),
        ({("d", "conv2_d_1", "w"): (2, 2, 8, 8), ("d", "conv2_d_1", "b"): (8,)}, None, "kkio"),
        (  # a square kernel with a bias goes by the nearest that show it
            {
                ("a", "in", "q", "kernel"): (9, 3),
                ("a", "in", "q", "bias"): (9,),
                ("a", "out", "o", "kernel"): (3, 3),
                ("a", "out", "o", "bias"): (3,),
                ("head", "kernel"): (3, 5),
                ("head", "bias"): (5,),
            },
            ("a", "out", "o", "kernel"),
            "oi",
        ),
        # biases
        ({("x", "kernel"): (4, 6, 8), ("x", "bias"): (4, 8)}, ("x", "kernel"), "sio"),
        ({("x", "kernel"): (4, 6, 8), ("x", "bias"): (8, 6)}, ("x", "kernel"), "iso"),
        ({("x", "kernel"): (4, 6, 8), ("x", "bias"): (6, 8)}, ("x", "kernel"), "ioo"),
        ({("x", "kernel"): (2, 4, 6, 8), ("x", "bias"): (2, 4, 8)}, ("x", "kernel"), "ssio"),
        ({("x", "kernel"): (2, 3, 8, 4), ("x", "bias"): (2, 8, 4)}, ("x", "kernel"), "sioo"),
        ({("x", "weight"): (8, 6, 3), ("x", "bias"): (8, 1)}, ("x", "weight"), "oik"),
        ({("x", "weight"): (8, 6, 3, 3), ("x", "bias"): (8,)}, ("x", "weight"), "oikk"),
        ({("x", "weight"): (4, 8, 6), ("x", "bias"): (4, 8)}, ("x", "weight"), "soi"),
        ({("conv", "w"): (3, 3, 6, 8), ("conv", "b"): (8, 1, 1)}, ("conv", "w"), "kkio"),
        (
            {("deconv", "w"): (3, 3, 8, 6), ("deconv", "b"): (8,)},
            ("deconv", "w"),
            "kkoi",
        ),
        ({("up", "weight"): (8, 6, 2, 2), ("up", "bias"): (6,)}, ("up", "weight"), "iokk"),
        ({("m", "1", "weight"): (8, 6, 4), ("m", "1", "bias"): (6,)}, ("m", "1", "weight"), "iok"),
        ({("conv2", "weight"): (8, 6, 4, 4), ("bn2", "weight"): (8,)}, ("conv2", "weight"), "oikk"),
        (
            {("conv_1d", "weight"): (8, 1, 4), ("conv_1d", "bias"): (8,)},
            ("conv_1d", "weight"),
            "oik",
        ),
    ],
)
def test_default_layouts(shapes, path, word):
    path = path or next(iter(shapes))
    shapes = shapes or {path: (3, 4)}
    assert default_layout(shapes[path], path, shapes) == Layout(word)


@pytest.mark.parametrize(
    ("shapes", "path"),
    [
        ({("x", "kernel"): (3, 4, 5)}, ("x", "kernel")),
        (attention((3, 8, 8), (3, 8, 8)), ("attn", "query", "kernel")),  # three Dense in a scan
        (attention((8, 8, 8), (8, 8, 8)), ("attn", "query", "kernel")),  # could be either
        ({("x", "kernel"): (2, 256, 8, 4)}, ("x", "kernel")),  # no convolution is 256 wide
        ({("x", "kernel"): (2, 3, 8, 8)}, ("x", "kernel")),  # scanned experts as well as a Conv2d
        ({("x", "kernel"): (3, 3, 3, 8, 8)}, ("x", "kernel")),
        ({("wi",): (2, 3, 8, 8), ("norm", "scale"): (8,)}, ("wi",)),
        # scanned blocks: Conv1d as well as Conv2d
        ({("ScanBlock_0", "Conv_0", "kernel"): (2, 3, 8, 8)}, ("ScanBlock_0", "Conv_0", "kernel")),
        ({("layers", "Conv_0", "kernel"): (2, 3, 8, 8)}, ("layers", "Conv_0", "kernel")),
        (
            {("a", "Conv_0", "kernel"): (2, 3, 8, 8), ("a", "LayerNorm_0", "scale"): (2, 8)},
            ("a", "Conv_0", "kernel"),
        ),
        ({("Conv_0", "kernel"): (2, 3, 8, 8)}, ("Conv_0", "kernel")),
        (
            {("a", "Conv_0", "kernel"): (2, 3, 8, 8), ("Dense_0", "bias"): (8,)},
            ("a", "Conv_0", "kernel"),
        ),
        (
            {("Conv_0", "kernel"): (2, 3, 3, 8, 8)},
            ("Conv_0", "kernel"),
        ),  # an ensemble by vmap, or Conv3d
        ({("experts", "weight"): (2, 3, 8, 8)}, ("experts", "weight")),
        ({("experts", "weight"): (3, 8, 8)}, ("experts", "weight")),
        ({("experts", "weight"): (2, 3, 8, 8), ("norm", "weight"): (8,)}, ("experts", "weight")),
        ({("x", "kernel"): (4, 4, 4), ("x", "bias"): (4, 4)}, ("x", "kernel")),
        (
            {("deconv", "kernel"): (3, 3, 4, 4), ("deconv", "bias"): (4,)},
            ("deconv", "kernel"),
        ),
        # torch's transposed convolutions, [in, out, ...], and norms of their inputs
        (
            {("up", "weight"): (8, 6, 2, 2), ("norm", "weight"): (8,), ("out", "weight"): (6,)},
            ("up", "weight"),
        ),
        ({("up", "1", "weight"): (8, 6, 2, 2), ("up", "0", "weight"): (8,)}, ("up", "1", "weight")),
        ({("up", "0", "weight"): (8, 6, 2, 2), ("up", "1", "weight"): (6,)}, ("up", "0", "weight")),
        ({("up", "0", "weight"): (6, 6, 2, 2), ("up", "1", "weight"): (6,)}, ("up", "0", "weight")),
        ({("upconv", "weight"): (8, 6, 2, 2), ("norm", "weight"): (8,)}, ("upconv", "weight")),
        ({("upconv", "weight"): (6, 6, 2, 2), ("upconv", "bias"): (6,)}, ("upconv", "weight")),
        # even taps, no bias, and norms of the second axis' length
        (
            {("d", "conv", "weight"): (8, 6, 2, 2), ("d", "norm", "weight"): (6,)},
            ("d", "conv", "weight"),
        ),
        ({("conv2", "weight"): (8, 6, 4, 4), ("bn2", "weight"): (6,)}, ("conv2", "weight")),
        ({("resize", "weight"): (6, 6, 4, 4), ("resize", "bias"): (6,)}, ("resize", "weight")),
        # as many inputs as outputs: nothing but names, even taps or others like it show the order
        ({("decoder", "0", "weight"): (8, 8, 2, 2), ("decoder", "0", "bias"): (8,)}, None),
        ({("m", "0", "weight"): (8, 8, 4), ("m", "0", "bias"): (8,)}, None),
        ({("m", "0", "weight"): (8, 8, 4, 4), ("m", "1", "weight"): (8,)}, None),
        ({("m", "0", "weight"): (8, 1, 4, 4), ("m", "1", "weight"): (8,)}, None),  # depthwise
        ({("up", "0", "weight"): (8, 1, 3, 3), ("up", "1", "weight"): (8,)}, None),
        ({("up", "0", "weight"): (8, 4, 4, 4), ("up", "1", "weight"): (8,)}, None),  # two groups
        (
            {("conv5_mask", "weight"): (8, 8, 2, 2), ("conv5_mask", "bias"): (8,)},
            None,
        ),  # Mask R-CNN
        ({("ups", "conv", "weight"): (8, 8, 4, 4), ("ups", "conv", "bias"): (8,)}, None),
        (
            {
                ("final", "0", "weight"): (8, 8, 3, 3),
                ("final", "0", "bias"): (8,),
                ("decoder", "0", "weight"): (16, 8, 3, 3),
                ("decoder", "0", "bias"): (8,),
            },
            None,
        ),
        ({("up", "kernel"): (2, 2, 8, 8), ("up", "bias"): (8,)}, None),  # transpose_kernel
        ({("upconv", "kernel"): (3, 3, 4, 8), ("norm", "scale"): (8,)}, None),
        ({("grow", "kernel"): (2, 2, 8, 8), ("grow", "bias"): (8,)}, None),
        (
            {("up_transposed_conv_transpose", "weight"): (3, 4, 3, 3)},
            ("up_transposed_conv_transpose", "weight"),
        ),
    ],
)
def test_ambiguous_kernels_are_errors(shapes, path):
    """Ambiguous kernels are errors that say how to settle them."""
    path = path or next(iter(shapes))
    with pytest.raises(ValueError, match=r"could be several things.*layouts=.*infer_layouts"):
        default_layout(shapes[path], path, shapes)


def test_scanned_experts_need_a_layout():
    """[layers, experts, in, out], square: silently a Conv2d of 2 x 3 taps otherwise."""
    random = np.random.default_rng(0)
    tree = {"layers": {"experts": {"kernel": random.normal(size=(2, 3, 4, 4)).astype(np.float32)}}}

    def fn(tree, x):  # [experts, rows, in]
        def layer(x, kernel):
            return jnp.einsum("erd,edf->erf", x, kernel), None

        return jax.lax.scan(layer, x, tree["layers"]["experts"]["kernel"])[0]

    for targets in (["experts"], "all-linear"):
        config = loha_jax.LoHaConfig(r=2, target_modules=targets, init_weights=False)
        with pytest.raises(
            ValueError, match=r"'kkio'.*'ssio'.*'isoo'.*layouts=loha_jax\.infer_layouts"
        ):
            loha_jax.inject(tree, config, key=jax.random.key(0))
        x = jnp.ones((3, 5, 4))
        layouts = loha_jax.infer_layouts(fn, tree, x)
        adapted = loha_jax.inject(tree, config, key=jax.random.key(0), layouts=layouts)
        leaf = adapted["layers"]["experts"]["kernel"]
        assert (leaf.layout.word, len(leaf.names)) == ("ssio", 6)
        factors = leaf.adapters["default"]
        delta = np.einsum("lear,lerb->leba", factors.hada_w1_a, factors.hada_w1_b)
        delta = delta * np.einsum("lear,lerb->leba", factors.hada_w2_a, factors.hada_w2_b) * 4
        expected = fn({"layers": {"experts": {"kernel": leaf.kernel + delta}}}, x)
        np.testing.assert_allclose(loha_jax.adapt(fn)(adapted, x), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(4, 2, 4), (4, 2, 6)])
def test_a_scan_over_axis_1_is_refused_until_the_model_says_so(shape):
    tree = {"layers": {"q": {"kernel": jnp.ones(shape)}}}
    config = loha_jax.LoHaConfig(r=2, target_modules=["q"])
    with pytest.raises(ValueError, match=r"'sio'.*'iso'"):
        loha_jax.inject(tree, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'sio'.*'iso'"):
        loha_jax.interop.save_merged("unused", tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"layers": {"pointwise_conv": {"kernel": (3, 6, 6)}}},
        {"pointwise_conv": {"kernel": (3, 6, 6)}, "norm": {"scale": (3, 6)}},
    ],
)
def test_stacked_dense_layers_called_convolutions(tree):
    """Stacked dense layers called convolutions are no convolution."""
    params = jax.tree.map(jnp.ones, tree, is_leaf=lambda node: isinstance(node, tuple))
    config = loha_jax.LoHaConfig(r=2, target_modules=["pointwise_conv"])
    with pytest.raises(ValueError, match=r"pointwise_conv.*'sio'.*'kio'"):
        loha_jax.inject(params, config, key=jax.random.key(0))
