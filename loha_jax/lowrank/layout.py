"""`Layout`: a word that describes each axis of a JAX kernel, and how PEFT's tensors fold into it.

PEFT stores everything in torch's orientation: a linear weight is `[out, in]`, a convolution's
`[out, in, *spatial]`. A JAX kernel can have its axes in any order and number. Only this module
knows how the two correspond.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_TOKEN = re.compile(r"([siok])(\d*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The kinds of a kernel's axes, one letter per axis.

    `s` stack (layers of a scan, experts: one independent adapter per index), `i` in, `o` out, `k`
    spatial. Several axes of one kind flatten in the order of the word, or, where letters carry an
    index, in the order of the indices.

    Args:
        word: e.g. "io" (Dense), "oi" (torch, Equinox), "ioo" (DenseGeneral query), "iio" (attention
            output), "kkio" (Conv), "sio" (Dense stacked by a scan), "soio" (fused key/value
            einsum), "i1 i0 o".

    Raises:
        ValueError: a letter is unknown, `i` or `o` is missing, or only some of one kind carry an
            index.

    Example:
        >>> Layout("ioo").fold(jnp.zeros((12, 5)), (5, 3, 4)).shape
        (5, 3, 4)
    """

    word: str

    def __post_init__(self) -> None:
        word = self.word.replace(" ", "")
        tokens = _TOKEN.findall(word)
        if "".join(a + b for a, b in tokens) != word or not tokens:
            raise ValueError(
                f"{self.word!r} is not a layout: write one letter per axis out of s (stack), i "
                "(in), o (out) and k (spatial), each with an index if need be, e.g. 'io', 'kkio', "
                "'sio' or 'i1 i0 o'"
            )
        kinds = [a for a, _ in tokens]
        for kind, name in (("i", "in"), ("o", "out")):
            if kind not in kinds:
                raise ValueError(f"The layout {self.word!r} has no {name} axis ({kind!r})")
        for kind in "siok":
            indices = [b for a, b in tokens if a == kind]
            if any(indices) and sorted(indices) != sorted(map(str, range(len(indices)))):
                raise ValueError(
                    f"The layout {self.word!r} must number all of its {kind!r} axes, from 0"
                )
        object.__setattr__(
            self, "word", " ".join(a + b for a, b in tokens) if re.search(r"\d", word) else word
        )

    def __str__(self) -> str:
        return self.word

    @functools.cached_property
    def _tokens(self) -> list[tuple[str, str]]:
        return _TOKEN.findall(self.word)

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self._tokens)

    def axes(self, kind: str) -> tuple[int, ...]:
        """Return the axes of one kind ('s', 'i', 'o' or 'k'), in flattening order."""
        found = [
            (int(index) if index else n, n)
            for n, (k, index) in enumerate(self._tokens)
            if k == kind
        ]
        return tuple(n for _, n in sorted(found))

    @property
    def order(self) -> tuple[int, ...]:
        """The kernel's axes in torch's order: stack, out, in, spatial."""
        return self.axes("s") + self.axes("o") + self.axes("i") + self.axes("k")

    def sizes(self, kind: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the axes of one kind, in flattening order."""
        return tuple(shape[axis] for axis in self.axes(kind))

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return `(*stack, out, in, *spatial)` of a kernel of this `shape`.

        Raises:
            ValueError: the kernel has another number of axes.
        """
        if len(shape) != self.ndim:
            raise ValueError(
                f"The layout {self.word!r} describes {self.ndim} axes, the kernel has shape "
                f"{tuple(shape)}"
            )
        return (
            *self.sizes("s", shape),
            math.prod(self.sizes("o", shape)),
            math.prod(self.sizes("i", shape)),
            *self.sizes("k", shape),
        )

    def contradicts(self, other: Layout, shape: Sequence[int]) -> bool:
        """Return whether a kernel of this `shape` cannot be of both layouts.

        One has an input axis where the other has an output axis, or they flatten the same axes in
        another order. One module of several (a stack), and a convolution as the matrix that its
        patches are multiplied with, are two ways to see one kernel.

        Example:
            >>> [Layout("ioo").contradicts(Layout(w), (4, 2, 3)) for w in ("iio", "i o1 o0", "iso")]
            [True, True, False]
        """

        def axes(layout: Layout, kind: str) -> list[int]:
            return [axis for axis in layout.axes(kind) if shape[axis] > 1]

        def inputs(layout: Layout) -> set[int]:
            return {*axes(layout, "i"), *axes(layout, "k")}

        crossed = inputs(self) & {*axes(other, "o")} | inputs(other) & {*axes(self, "o")}
        pairs = ((axes(self, kind), axes(other, kind)) for kind in "iok")
        return bool(crossed) or any(a != b and sorted(a) == sorted(b) for a, b in pairs)

    def fold(self, delta: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Fold a torch-shaped array `[*stack, out, in, *spatial]` into a kernel of this `shape`."""
        permuted = delta.reshape([shape[axis] for axis in self.order])  # axes in torch's order
        inverse = sorted(range(self.ndim), key=self.order.__getitem__)
        return jnp.transpose(permuted, inverse)

    def unfold(self, kernel: jax.Array | np.ndarray) -> jax.Array:
        """Return a kernel as `[*stack, out, in, *spatial]`, the inverse of `fold`."""
        return jnp.transpose(kernel, self.order).reshape(self.torch_shape(kernel.shape))

    def with_stack(self, places: Sequence[int]) -> Layout:
        """Return the layout with new stack axes, which get these places in the kernel.

        Example:
            >>> Layout("ioo").with_stack([1]).word
            'isoo'
        """
        tokens = list(self._tokens)
        if any(index for kind, index in tokens if kind == "s"):  # the new ones come first
            tokens = [(k, str(int(n) + len(places)) if k == "s" else n) for k, n in tokens]
            new = [("s", str(n)) for n in range(len(places))]
        else:
            new = [("s", "")] * len(places)
        for place, token in sorted(zip(places, new, strict=True)):
            tokens.insert(place, token)
        return Layout(" ".join(map("".join, tokens)))

    def in_front(self, axes: Sequence[int]) -> Layout:
        """Return the layout with some of its axes in front, where `strip` takes them away.

        Example:
            >>> Layout("isoo").in_front([1]).word
            'sioo'
        """
        rest = [axis for axis in range(self.ndim) if axis not in axes]
        return Layout(" ".join("".join(self._tokens[axis]) for axis in (*axes, *rest)))

    def strip(self, ndim: int) -> Layout:
        """Return the layout inside a scan or vmap, which takes leading stack axes away.

        Args:
            ndim: number of axes that are left.

        Raises:
            ValueError: the axes that are missing are not stack axes.
        """
        missing = self.ndim - ndim
        if missing == 0:
            return self
        if (
            missing < 0
            or any(axis >= len(self.axes("s")) for axis in range(missing))
            or not set(range(missing)) <= set(self.axes("s"))
        ):
            raise ValueError(
                f"A kernel with the layout {self.word!r} has {ndim} axes here. Only leading stack "
                "axes ('s') can be taken away by a scan or vmap over an adapted tree; scan over "
                "another axis inside the function given to `loha_jax.adapt`."
            )
        kept = self._tokens[missing:]
        stack = sorted(int(index) for kind, index in kept if kind == "s" and index)
        return Layout(
            "".join(k + (str(stack.index(int(n))) if k == "s" and n else n) for k, n in kept)
        )


def einsum_layout(equation: str) -> str | None:
    """Return the layout of an einsum's second operand, or None where LoHa cannot adapt the product.

    Letters that it shares only with the first operand are in axes, only with the result out axes,
    with both stack axes. A letter that it has twice, or that neither of the others has, fits no
    layout.

    Example:
        >>> einsum_layout("btd,ndh->btnh"), einsum_layout("btd,dq->bt")
        ('oio', None)
    """
    found = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", equation.replace(" ", ""))
    if not found:
        return None
    given, letters, result = found.groups()
    kinds = {(True, True): "s", (True, False): "i", (False, True): "o", (False, False): "?"}
    word = "".join(kinds[letter in given, letter in result] for letter in letters)
    return (
        word
        if "?" not in word and {"i", "o"} <= set(word) and len(set(letters)) == len(letters)
        else None
    )
