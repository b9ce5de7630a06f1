"""Whether a kernel may be a transposed convolution's, where a bias or norm fits a convolution's.

torch keeps a convolution as `[out, in / groups, *taps]` and a transposed one as `[in, out / groups,
*taps]`. Where there are as many inputs as outputs, no bias tells one from the other; names, taps
and other kernels do. The taps of a transposed convolution are a multiple of its stride, mostly 2 or
4, so that they overlap evenly; those of a convolution are odd, so that they have a centre.
"""

from __future__ import annotations

from collections.abc import Mapping

from loha_jax.targets.convolution_names import (
    IN_A_DECODER,
    NAMED_CONVOLUTION,
    NAMED_SMALLER,
    NAMED_TRANSPOSED,
    NAMED_UPSAMPLING,
    PLAIN_CONVOLUTION,
    is_torch_oriented,
    own_name,
    without_numbers,
)

_Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

_VECTORS = {"bias", "b", "scale", "offset", "mean", "var", "running_mean", "running_var"}


def may_be_transposed(shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes) -> bool:
    """Return whether a kernel that could be a convolution's could as well be a transposed one's.

    It could where both have as many inputs as outputs, and

    - its module is called as one that enlarges (`up`, `resize`); or
    - its taps are even, and its name is neither that of a plain convolution (`conv1`) nor of one
      that makes smaller (`downsample`); or
    - its taps are odd, and its dictionary has a kernel of such taps, called alike, that its bias or
      norm shows to be transposed.

    It could too where it has even taps and no bias, and vectors near it are as long as its second
    axis, not its first. A kernel of 1x1 is a convolution's. Those of JAX (`kernel`, `w`) are in
    doubt alike: Flax' own transposed ones have the same layout, and another with
    `transpose_kernel`.

    Example:
        >>> biases = {("0", "bias"): (8,), ("up", "bias"): (8,)}
        >>> [may_be_transposed((8, 8, 2, 2), (name, "weight"), biases) for name in ("0", "conv1")]
        [True, False]
        >>> [may_be_transposed((8, 8, 3, 3), (name, "weight"), biases) for name in ("0", "up")]
        [False, True]
    """
    torch = is_torch_oriented(path[-1])
    taps, (first, second) = (shape[2:], shape[:2]) if torch else (shape[:-2], shape[-2:])
    named = NAMED_UPSAMPLING.search(own_name(path)) is not None
    shown = bias_shape(path, shape_at) is not None
    if set(taps) == {1} or 0 in shape:
        return False
    odd = all(size % 2 for size in taps)
    if not torch:
        return (named and not shown) or (
            first == second and (named or not (odd or _is_plain(path)))
        )
    shown = shown or has_norm_behind(shape, path, shape_at)
    if shown and first % second:
        return False
    as_many = second in (1, first)  # depthwise ones too
    if named:
        return as_many or not odd or not shown
    if not as_many:
        return not (odd or shown) and _norms_inputs(shape, path, shape_at)
    if odd:
        return _has_transposed_alike(shape, path, shape_at)
    return not _is_plain(path)


def _is_plain(path: tuple[str, ...]) -> bool:
    """Return whether a module is called like a plain convolution, or as one that makes smaller."""
    if PLAIN_CONVOLUTION.fullmatch(own_name(path)):
        return not (is_torch_oriented(path[-1]) and any(map(IN_A_DECODER.search, path[:-1])))
    nearest = [part for part in path[:-1] if not part.isdigit()][-2:]
    return any(map(NAMED_SMALLER.search, nearest))


def _norms_inputs(shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes) -> bool:
    """Return whether vectors near a kernel are as long as its second axis, and none as its first.

    A norm behind a transposed convolution has the length of its second axis, the outputs.
    """
    near = {s for at, s in shape_at.items() if at[: len(path) - 2] == path[:-2] and len(s) == 1}
    return (shape[1],) in near and (shape[0],) not in near


def has_norm_behind(shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes) -> bool:
    """Return whether the next module of a Sequential normalises as many channels as the first axis.

    These are outputs then, as a convolution's. A transposed one has its inputs there, and a norm in
    front of it, or beside it without a number, may be of these.

    Example:
        >>> norm = {("down", "1", "weight"): (8,)}
        >>> has_norm_behind((8, 6, 3, 3), ("down", "0", "weight"), norm)
        True
    """
    return shape[:1] in _behind(path, shape_at)


def is_vector(path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a leaf is a bias, or a scale or statistic of a norm; one of a stack, too.

    Example:
        >>> is_vector(("norm", "weight"), (8,)), is_vector(("up", "weight"), (8, 6))
        (True, False)
    """
    return path[-1] in _VECTORS or (path[-1], len(shape)) == ("weight", 1)


def bias_shape(path: tuple[str, ...], shape_at: _Shapes) -> tuple[int, ...] | None:
    """Return the shape of the bias beside a kernel; None where there is none.

    Example:
        >>> bias_shape(("up", "weight"), {("up", "bias"): (8,)})
        (8,)
    """
    return shape_at.get((*path[:-1], "bias"), shape_at.get((*path[:-1], "b")))


def _behind(path: tuple[str, ...], shape_at: _Shapes) -> list[tuple[int, ...] | None]:
    *parents, index = path[:-1]
    if not index.isdigit():
        return []
    behind = (*parents, str(int(index) + 1))
    return [shape_at.get((*behind, leaf)) for leaf in ("weight", *_VECTORS)]


def _has_transposed_alike(shape: tuple[int, ...], path: tuple[str, ...], shape_at: _Shapes) -> bool:
    """Return whether a kernel of the same taps is shown to be transposed, and is called alike.

    Called alike are modules of one name but for numbers, and those without a telling name.
    """
    name, is_named = without_numbers(path), NAMED_CONVOLUTION.fullmatch(own_name(path))

    def tells(at: tuple[str, ...]) -> bool:
        return any(kind.search(own_name(at)) for kind in (NAMED_UPSAMPLING, NAMED_TRANSPOSED))

    return any(
        at[-1] == path[-1]
        and other[2:] == shape[2:]
        and other[0] != other[1]
        and other[1:2] in (bias_shape(at, shape_at), *_behind(at, shape_at))
        and (without_numbers(at) == name or (not is_named and not tells(at)))
        for at, other in shape_at.items()
    )
