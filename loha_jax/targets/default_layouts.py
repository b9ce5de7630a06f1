"""The default layout of a kernel: from names, biases and neighbours, never only from a shape."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from loha_jax.lowrank.layout import Layout
from loha_jax.targets.convolution_names import (
    NAMED_CONVOLUTION,
    NAMED_TRANSPOSED,
    NAMED_UPSAMPLING,
    is_torch_oriented,
    own_name,
)
from loha_jax.targets.module_names import module_name
from loha_jax.targets.transposed_doubt import (
    bias_shape,
    has_norm_behind,
    is_vector,
    may_be_transposed,
)

_Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

_TABLE_LEAF = re.compile(r"(.*_)?embeddings?")
_LOOKUP = re.compile(
    r"(?i)(.*_)?(embeds?|embeddings?|emb)|embed_(tokens|positions|in)|wte|wpe|shared|"
    r"relative_attention_bias"
)
_STACK = re.compile(r"layers|blocks|h|resblocks|.*([Ss]can|[Vv]map).*")

# Possible kernels of three or more axes: (layout, axes of the module's bias, description).
_JAX = {
    3: (
        ("sio", "so", "a Dense stacked on axis 0: layers of a scan, experts"),
        ("iso", "os", "a Dense stacked on axis 1 by a scan"),
        ("ioo", "oo", "DenseGeneral, an attention's query"),
        ("iio", "o", "DenseGeneral, an attention's output"),
        ("kio", "o", "Conv1d"),
        ("oio", "", "einsum"),
    ),
    4: (
        ("kkio", "o", "Conv2d"),
        ("ssio", "sso", "a Dense stacked twice: scanned experts"),
        ("siso", "sos", "experts, scanned on axis 2"),
        ("sioo", "soo", "a scanned DenseGeneral"),
        ("siio", "so", "the same for an attention's output"),
        ("isoo", "oso", "a DenseGeneral scanned on axis 1"),
        ("isio", "os", "the same for an attention's output"),
        ("skio", "so", "a stacked Conv1d"),
        ("soio", "", "a fused einsum"),
    ),
    5: (
        ("kkkio", "o", "Conv3d"),
        ("skkio", "so", "a stacked Conv2d"),
        ("sskio", "sso", "a Conv1d stacked twice"),
        ("ssioo", "ssoo", "a DenseGeneral stacked twice"),
        ("ssiio", "sso", "the same for an attention's output"),
        ("sssio", "ssso", "a Dense stacked three times"),
        ("ssoio", "", "a scanned fused einsum"),
    ),
}
_TORCH = {
    3: (("oik", "o", "Conv1d"), ("soi", "so", "a stack of Linear: layers, experts")),
    4: (
        ("oikk", "o", "Conv2d"),
        ("ssoi", "sso", "a Linear stacked twice: layers of experts"),
        ("soik", "so", "a stacked Conv1d"),
    ),
    5: (
        ("oikkk", "o", "Conv3d"),
        ("soikk", "so", "a stacked Conv2d"),
        ("sssoi", "ssso", "a Linear stacked three times"),
    ),
}


class UnknownConvolutionError(ValueError):
    """The layout of a kernel is ambiguous that is a convolution's, transposed or not."""


def is_named_convolution(path: Sequence[str]) -> bool:
    """Return whether the module of a leaf is named like a convolution, transposed or not."""
    return (
        is_transposed_convolution(path) or NAMED_CONVOLUTION.fullmatch(own_name(path)) is not None
    )


def is_table_leaf(path: Sequence[str]) -> bool:
    """Return whether a leaf is called as the table of an embedding in JAX.

    Example:
        >>> is_table_leaf(("embed", "embedding")), is_table_leaf(("embedder", "input_embedding"))
        (True, True)
    """
    return _TABLE_LEAF.fullmatch(path[-1]) is not None


def is_named_lookup(path: Sequence[str]) -> bool:
    """Return whether the module of a `weight` is named like an embedding of torch.

    Such names are `embed_tokens` and `wte`.

    Example:
        >>> is_named_lookup(("model", "embed_tokens", "weight")), is_named_lookup(("wte", "kernel"))
        (True, False)
    """
    return path[-1] == "weight" and _LOOKUP.fullmatch(own_name(path)) is not None


def is_transposed_convolution(path: Sequence[str]) -> bool:
    """Return whether the module of a leaf is named like a transposed convolution.

    Such names are `ConvTranspose_0` and `conv2_d_transpose`.
    """
    return len(path) > 1 and NAMED_TRANSPOSED.fullmatch(own_name(path)) is not None


def is_torchs_transposed(path: Sequence[str], layout: Layout) -> bool:
    """Return whether a kernel is torch's of a transposed convolution, by its name and its axes.

    Example:
        >>> is_torchs_transposed(("up", "weight"), Layout("iokk"))
        True
    """
    first = layout.axes("i") < layout.axes("o")
    return is_torch_oriented(path[-1]) and bool(layout.axes("k")) and first


def default_layout(
    shape: Sequence[int],
    path: Sequence[str],
    shape_at: _Shapes,
    torch_shape: Sequence[int] | None = None,
) -> Layout:
    """Return the layout of a kernel that nothing else settles.

    - Two axes: `oi` for leaves called `weight` (torch, Equinox), for embeddings, and where the
      module's bias is as long as the first axis (GPT-2 in Flax); `io` for others.
    - Flax' attention: by the shapes of its four kernels.
    - More axes: the one possibility that fits the shape of the module's bias.
    - A convolution: by the name of its module (`Conv_0`, Flax' own, `conv1`, `downsample_conv`), if
      a bias or scale of one axis in the same module or next to it shows that it is not stacked; of
      torch's also by taps of 1x1, by odd ones of a square kernel, or by the norm behind it.
    - The one possibility that fits the shape which a file has for the module of that name.

    Args:
        shape: the kernel's shape.
        path: its tree path as strings, e.g. ("attn", "query", "kernel").
        shape_at: shapes of all leaves by path.
        torch_shape: of the weight or its update in a file: `[out, in, *spatial]`, or `[out, in *
            prod(spatial)]`.

    Raises:
        UnknownConvolutionError: it is a convolution's, and may be a transposed one's; see
            `may_be_transposed`.
        ValueError: several layouts are possible. The message names them and how to choose one.

    Example:
        >>> norm = {("BatchNorm_0", "scale"): (8,)}
        >>> default_layout((3, 3, 6, 8), ("Conv_0", "kernel"), norm).word
        'kkio'
        >>> default_layout((8, 6), ("q", "weight"), {}).word
        'oi'
        >>> default_layout((3, 3, 6, 8), ("mix", "kernel"), {}, torch_shape=(8, 54)).word
        'kkio'
    """
    shape, path = tuple(shape), tuple(path)
    torch = is_torch_oriented(path[-1])
    if len(shape) == 2:
        if _may_be_gpt2s(shape, path, shape_at):
            raise _ambiguous(shape, path, "'io', 'oi' (one of them is of GPT-2's Conv1D)")
        table = is_table_leaf(path)
        return Layout("oi" if torch or table or is_output_first(shape, path, shape_at) else "io")
    if attention := _attention_layout(shape, path, shape_at):
        return attention
    if is_transposed_convolution(path):
        return _transposed_layout(shape, path, shape_at, torch)
    candidates = (_TORCH if torch else _JAX).get(len(shape), ())
    spatial = "k" * (len(shape) - 2)
    convolution = f"oi{spatial}" if torch else f"{spatial}io"
    bias = bias_shape(path, shape_at)
    shown: list[str] = []
    if bias is not None:
        shown = [word for word, letters, _ in candidates if _fits(word, letters, shape, bias)]
        if torch and candidates and not shown and _fits(f"io{spatial}", "o", shape, bias):
            return Layout(f"io{spatial}")  # torch's transposed convolution
        sure = convolution not in shown or not may_be_transposed(shape, path, shape_at)
        if sure and len(shown) == 1:
            return Layout(shown[0])
        if sure and convolution in shown and NAMED_CONVOLUTION.fullmatch(own_name(path)):
            return Layout(convolution)
    else:
        sure = bool(candidates) and not may_be_transposed(shape, path, shape_at)
        if sure and _is_convolution(shape, path, shape_at, torch):
            return Layout(convolution)
    found = [
        word
        for word, _, _ in candidates
        if torch_shape and _fits_torch(Layout(word), shape, torch_shape)
    ]
    as_stored = torch and torch_shape is not None and tuple(torch_shape) == shape
    if len(found) == 1 and (sure or found[0] != convolution or as_stored):
        return Layout(found[0])  # torch's whole weight is read alike, transposed or not
    named = [f"{w!r} ({what})" for w, _, what in candidates if not shown or w in shown]
    if candidates and (torch or not sure):
        other = f"'io{spatial}' (" if torch else f"'{spatial}oi' (with transpose_kernel, "
        named.append(f"{other}a transposed convolution)")
    error = _ambiguous(shape, path, ", ".join(named))
    raise UnknownConvolutionError(str(error)) if shown == [convolution] else error


def is_output_first(shape: Sequence[int], path: Sequence[str], shape_at: _Shapes) -> bool:
    """Return whether biases show that a kernel of two axes is `[out, in]`, as GPT-2's in Flax.

    A square kernel is taken as the others beside its module are (`attn.c_proj` as `attn.c_attn`),
    or else, if it has a bias, as the nearest ones in the tree.

    Example:
        >>> shapes = {("attn", "c_attn", "kernel"): (12, 4), ("attn", "c_attn", "bias"): (12,)}
        >>> is_output_first((4, 4), ("attn", "c_proj", "kernel"), shapes)
        True
    """
    return _bias_axis(shape, path, shape_at) == 0


def is_input_first(shape: Sequence[int], path: Sequence[str], shape_at: _Shapes) -> bool:
    """Return whether biases show that a kernel of two axes is `[in, out]`, as GPT-2's in torch.

    Example:
        >>> shapes = {("c_attn", "weight"): (4, 12), ("c_attn", "bias"): (12,)}
        >>> is_input_first((4, 12), ("c_attn", "weight"), shapes)
        True
    """
    return _bias_axis(shape, path, shape_at) == 1


def _may_be_gpt2s(shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes) -> bool:
    """Return whether a square kernel is called like GPT-2's, with nothing to show its order.

    GPT-2's layers have biases, and their order is turned: `io` in torch, `oi` in Flax.
    """
    named = own_name(path) in ("c_proj", "q_attn") and bias_shape(path, shape_at) is not None
    return named and shape[0] == shape[1] and _bias_axis(shape, path, shape_at) is None


def _bias_axis(shape: Sequence[int], path: Sequence[str], shape_at: _Shapes) -> int | None:
    """Return which axis of a kernel of two axes is as long as its bias; None where it is not known.

    For a square kernel it is the axis of all others beside its module, or of the nearest.
    """
    path, bias = tuple(path), bias_shape(tuple(path), shape_at)
    if shape[0] != shape[1]:
        return next((axis for axis in (0, 1) if bias == (shape[axis],)), None)
    others = [
        (other, found)
        for other, found in shape_at.items()
        if other[-1] == path[-1] and len(found) == 2 and found[0] != found[1]
    ]
    beside = [(other, found) for other, found in others if other[:-2] == path[:-2]]
    above = range(len(path) - 2, -1, -1) if bias is not None else ()
    for near in (beside, *([o for o in others if o[0][:n] == path[:n]] for n in above)):
        shown = {_bias_axis(found, other, shape_at) for other, found in near} - {None}
        if shown:
            return shown.pop() if len(shown) == 1 else None
    return None


def _ambiguous(shape: tuple[int, ...], path: tuple[str, ...], candidates: str) -> ValueError:
    return ValueError(
        f"The kernel {'.'.join(path)} of shape {shape} could be several things: "
        f"{candidates or 'any order of s (stack), i (in), o (out) and k (spatial)'}. Settle it "
        f"with layouts={{r'{re.escape(module_name(path))}': '...'}}, or let the model say it with "
        "layouts=loha_jax.infer_layouts(fn, params, *args)."
    )


def _fits(word: str, letters: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    """Return whether a bias with these axes fits a kernel with this layout."""
    sizes = {
        kind: [n for n, letter in zip(shape, word, strict=True) if letter == kind] for kind in "so"
    }
    if not letters:
        return False
    expected = tuple(sizes[letter].pop(0) for letter in letters)
    ones = (1,) * word.count("k")  # Equinox, and Haiku over channels-first images: [out, 1, 1]
    return bias == expected or (bool(ones) and bias == expected + ones)


def _fits_torch(layout: Layout, shape: tuple[int, ...], torch_shape: Sequence[int]) -> bool:
    """Return whether a kernel with this layout is one torch module of this shape, flat or not."""
    if layout.axes("s"):
        return False
    out, *rest = layout.torch_shape(shape)
    # PEFT's Conv1d ends in 1.
    return tuple(torch_shape) in ((out, *rest), (out, *rest, 1), (out, math.prod(rest)))


def _is_convolution(
    shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes, torch: bool
) -> bool:
    """Return whether names and neighbours prove a kernel without a bias to be one convolution's."""
    if torch and len(shape) > 3 and set(shape[2:]) == {1}:
        return True
    parent = path[:-2]
    vectors = {p: s for p, s in shape_at.items() if is_vector(p, s)}
    beside = [s for p, s in vectors.items() if p[: len(parent)] == parent]
    unstacked = any(len(s) == 1 for s in beside)  # a scan would have stacked all below it
    below_scan = any(
        _STACK.fullmatch(part) and not following.isdigit()
        for part, following in itertools.pairwise(path[:-1])
    )
    stacked = below_scan or (bool(vectors) and all(len(s) > 1 for s in vectors.values()))
    own = own_name(path)
    if not NAMED_CONVOLUTION.fullmatch(own) or NAMED_UPSAMPLING.search(own):
        if not torch or len(shape) < 4:
            return False
        is_square = not stacked and _is_odd_square(shape)
        return is_square or has_norm_behind(shape, path, shape_at)
    if unstacked:
        return True
    if len(shape) == 3:  # stacked, it is a Dense that is called a convolution: one of 1x1
        return not stacked
    # torch numbers its layers; patches are embedded once
    return len(shape) == 4 and not stacked and (torch or "patch_embed" in own.lower())


def _is_odd_square(shape: tuple[int, ...]) -> bool:
    """Return whether torch's `[out, in, *taps]` is square or depthwise, with odd taps.

    It would be a stack of linear layers of fewer features than there are layers.
    """
    return shape[1] in (1, shape[0]) and all(size % 2 and size < shape[0] for size in shape[2:])


def _transposed_layout(
    shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes, torch: bool
) -> Layout:
    """Return the layout of a transposed convolution.

    Flax keeps [*spatial, in, out] or, with `transpose_kernel`, [*spatial, out, in]. Haiku always
    has the latter.
    """
    spatial = "k" * (len(shape) - 2)
    words = (f"oi{spatial}", f"io{spatial}") if torch else (f"{spatial}io", f"{spatial}oi")
    bias = bias_shape(path, shape_at)
    found = [word for word in words if bias is not None and _fits(word, "o", shape, bias)]
    if len(found) == 1:
        return Layout(found[0])
    raise _ambiguous(shape, path, " or ".join(map(repr, words)) + " (transposed convolutions)")


def _attention_layout(
    shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes
) -> Layout | None:
    """Return the layout of a kernel of Flax' MultiHeadDotProductAttention, or None.

    It is `ioo` or `iio`, and `sioo` or `siio` if a scan stacks it.
    """
    kinds = ("query", "key", "value", "out")
    if len(path) < 2 or path[-2] not in kinds or len(shape) not in (3, 4):
        return None
    parent, leaf = path[:-2], path[-1]
    query, out = shape_at.get((*parent, "query", leaf)), shape_at.get((*parent, "out", leaf))
    if query is None or out is None or not len(query) == len(out) == len(shape):
        return None

    def fits(stacked: bool) -> bool:
        n = int(stacked)
        if query[:n] != out[:n] or query[n + 1 :] != out[n:-1]:
            return False
        bias = shape_at.get((*parent, "query", "bias"))
        return bias is None or bias == query[:n] + query[n + 1 :]

    stacked = len(shape) == 4
    if not fits(stacked):
        return None
    if not stacked and shape_at.get((*parent, "query", "bias")) is None and len(set(query)) == 1:
        return None  # (n, n, n): three Dense layers stacked by a scan look the same
    return Layout(("s" if stacked else "") + ("iio" if path[-2] == "out" else "ioo"))
