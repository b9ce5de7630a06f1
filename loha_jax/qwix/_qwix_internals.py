"""All that is used of qwix besides its public names, in one place.

qwix has no public way to ask which module is running, which parameter an operand is, or what a
quantised parameter looks like. These names are those of qwix 0.1.8.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import TYPE_CHECKING

import qwix
from flax import linen as nn
from flax import nnx
from typing_extensions import TypeIs

from loha_jax.runtime.promotion import also_enter

if TYPE_CHECKING:
    from qwix._src.providers.ptq import WithAux

TESTED_VERSION = "0.1.8"
"""The release of qwix that the tests run with."""


def _changed(name: str) -> ImportError:
    version = importlib.metadata.version("qwix")
    return ImportError(
        f"loha_jax.qwix reads {name} of qwix, which qwix {version} does not have. It is "
        f"tested with qwix {TESTED_VERSION}: `pip install qwix=={TESTED_VERSION}`."
    )


try:
    from qwix._src.interception import interception_manager as _interception
    from qwix._src.providers import ptq as _ptq
    from qwix._src.utils import flax_util as _flax
except ImportError as error:
    raise _changed(str(error)) from error
for _owner, _name in (
    (_interception, "disable_interception"),
    (_interception, "enable_interception"),
    (_flax, "get_current_module"),
    (_flax, "get_current_module_path"),
    (_flax, "unbox"),
    (_ptq, "WithAux"),
    (qwix.PtqProvider, "_get_current_rule_and_op_id"),
):
    if not hasattr(_owner, _name):
        raise _changed(f"{_owner!r}.{_name}")


def is_quantised(x: object) -> TypeIs[WithAux[qwix.QArray]]:
    """Return whether x is a quantised parameter."""
    return isinstance(x, _ptq.WithAux)


def current_module() -> nn.Module | nnx.Module:
    """Return the module that is running."""
    return _flax.get_current_module()


def current_path() -> tuple[str, ...]:
    """Return the path of the module that is running, from the root of the model."""
    return tuple(map(str, _flax.get_current_module_path()))


def unboxed(x: object) -> object:
    """Return an array, or a quantised one, without boxes and variables."""
    return _flax.unbox(x)


@contextlib.contextmanager
def _interception_off() -> Iterator[None]:
    """Let no provider intercept the products of this library itself.

    In the gradient of a scan, JAX traces the forward pass of an update again, while the model runs
    and no module of it: a provider would take it for a product of the model.
    """
    disabled = _interception.disable_interception()
    try:
        yield
    finally:
        _interception.enable_interception(disabled)


also_enter(_interception_off)
