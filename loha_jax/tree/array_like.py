"""All operators and methods of `jax.Array` for a pytree node in the place of an array."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np


def _operators(names: str) -> dict[str, Callable[..., Any]]:
    return {f"__{name}__": getattr(operator, f"__{name}__") for name in names.split()}


_BINARY = {
    **_operators("add sub mul truediv floordiv mod pow matmul xor lshift rshift and or"),
    "__divmod__": divmod,
}
_OTHERS = {
    **_operators("eq ne lt le gt ge neg pos abs invert index getitem contains"),
    **_operators("setitem"),  # which says what to do instead
    **{f"__{kind.__name__}__": kind for kind in (bool, int, float, complex, iter, round)},
}
_BY_NAME = ("__array_namespace__", "__dlpack__", "__dlpack_device__")

_OF_ARRAYS_ON_DEVICES = (
    *("clone", "devices", "format", "on_device_size_in_bytes", "platform", "tobytes", "tolist"),
    *("unsafe_buffer_pointer", "weak_type"),
)
"""Public names of concrete arrays that `dir(jax.Array)` lacks.

`aval` is left out: it would make JAX take the node for an array.
"""

_OF_THE_BASE = (
    *("sharding", "device", "devices", "committed", "format"),
    *("is_fully_addressable", "is_fully_replicated"),
)
"""Names that the frozen array answers: nothing is computed for them."""


class ArrayLike:
    """The interface of `jax.Array` for a pytree node.

    Shape and dtype are those of the frozen array. All other operators, methods and properties go
    through `__jax_array__` and give the results of the dense array, with two exceptions. `sharding`
    and `devices()` are those of the frozen array. `block_until_ready`, `is_ready`, `is_deleted`,
    `delete` and `copy_to_host_async` concern all arrays that the node holds.
    """

    __array_priority__ = 100  # as of jax.Array: numpy arrays on the left leave operations to it
    __hash__: Any = None  # arrays compare elementwise and have no hash

    if TYPE_CHECKING:  # the rest is put in below
        T: jax.Array
        mT: jax.Array
        at: Any
        real: jax.Array
        sharding: jax.sharding.Sharding
        astype: Callable[..., jax.Array]
        reshape: Callable[..., jax.Array]
        ravel: Callable[..., jax.Array]
        flatten: Callable[..., jax.Array]
        transpose: Callable[..., jax.Array]
        swapaxes: Callable[..., jax.Array]
        squeeze: Callable[..., jax.Array]
        sum: Callable[..., jax.Array]
        mean: Callable[..., jax.Array]
        max: Callable[..., jax.Array]
        min: Callable[..., jax.Array]
        dot: Callable[..., jax.Array]
        item: Callable[..., Any]
        tolist: Callable[[], Any]
        devices: Callable[[], Any]

        def __add__(self, other: Any, /) -> jax.Array: ...
        def __neg__(self) -> jax.Array: ...
        def __iter__(self) -> Iterator[jax.Array]: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
        __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __add__
        __matmul__ = __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __add__
        __pos__ = __abs__ = __neg__

    def __jax_array__(self) -> jax.Array:
        raise NotImplementedError

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.__jax_array__(), dtype)

    @property
    def _frozen(self) -> jax.Array:
        raise NotImplementedError

    def _arrays(self) -> list[Any]:
        """Return all arrays that the node holds."""
        return jax.tree.leaves(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self._frozen.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self._frozen.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._frozen.size

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as one array; the factors are not counted."""
        return self.size * self.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __format__(self, spec: str) -> str:
        return format(self.__jax_array__(), spec) if spec or not self.shape else repr(self)

    def block_until_ready(self):
        """Wait for all arrays of the node and return it."""
        jax.block_until_ready(self._arrays())
        return self

    def is_ready(self) -> bool:
        """Return whether all arrays of the node are computed."""
        return all(array.is_ready() for array in self._arrays())

    def is_deleted(self) -> bool:
        """Return whether an array of the node was deleted or donated."""
        return any(array.is_deleted() for array in self._arrays())

    def delete(self) -> None:
        """Delete all arrays of the node."""
        for array in self._arrays():
            array.delete()

    def copy_to_host_async(self) -> None:
        """Start to copy all arrays of the node to the host."""
        for array in self._arrays():
            array.copy_to_host_async()


def _dense(x: object) -> Any:
    return x.__jax_array__() if isinstance(x, ArrayLike) else x


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: function(self.__jax_array__(), *map(_dense, others))


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: function(_dense(other), self.__jax_array__())


def _attribute(name: str) -> property:
    def get(self: ArrayLike) -> Any:
        return getattr(self._frozen if name in _OF_THE_BASE else self.__jax_array__(), name)

    return property(
        get,
        doc=f"As of `jax.Array`: {'the frozen' if name in _OF_THE_BASE else 'the dense'} array's.",
    )


def _complete(cls: type[ArrayLike]) -> None:
    """Give the class each operator and public name of `jax.Array` that it does not define."""
    members: dict[str, Any] = {
        name: _operator(function) for name, function in (_BINARY | _OTHERS).items()
    }
    members |= {f"__r{name[2:]}": _reflected(function) for name, function in _BINARY.items()}
    public = [name for name in dir(jax.Array) if not name.startswith("_")]
    members |= {name: _attribute(name) for name in (*public, *_OF_ARRAYS_ON_DEVICES, *_BY_NAME)}
    for name, member in members.items():
        if name not in vars(cls):
            setattr(cls, name, member)
    cls.__eq__ = members["__eq__"]  # which every class has from `object`


_complete(ArrayLike)
