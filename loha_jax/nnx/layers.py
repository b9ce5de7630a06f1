"""LoHa for Flax NNX: `inject` for a whole model, and layers for authors.

    loha_jax.nnx.inject(model, config, rngs=rngs)                    # in place; the model is called as before
    optimizer = nnx.Optimizer(model, tx, wrt=loha_jax.nnx.LoHaParam)
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, loha_jax.nnx.LoHaParam))(model)

Calls are computed on the factors, as by `loha_jax.adapt`. The functions from tree to tree (`loha_jax.merge`, `unload`,
`set_adapter`, …) and `interop.save_peft` and `load_peft` take such a model too; those that change a tree change a model
in place and return it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

from loha_jax.nnx.adapted_classes import adapted_class
from loha_jax.nnx.model_tree import adapt_layer
from loha_jax.nnx.variables import AdaptedCopy, AdaptedKernel, InactiveLoHaParam, LoHaParam, adapted_nodes
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.module_names import Names
from loha_jax.tree.inject import inject as inject_tree
from loha_jax.tree.named_tree import Layouts

M = TypeVar("M", bound=nnx.Module)

__all__ = [
    "AdaptedCopy",
    "AdaptedKernel",
    "InactiveLoHaParam",
    "LoHaConv",
    "LoHaEinsum",
    "LoHaEmbed",
    "LoHaLinear",
    "LoHaLinearGeneral",
    "LoHaParam",
    "inject",
    "set_dropout",
]


def inject(
    model: M,
    config: LoHaConfig,
    *,
    rngs: nnx.Rngs,
    adapter_name: str = "default",
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
) -> M:
    """Adds a LoHa adapter to an NNX model, in place.

    Each targeted kernel is replaced, in the attribute where it was, by an `AdaptedKernel`: the model's own variable as
    `base` and a `LoHaParam` per factor. The modules that hold one are called as before, and compute on the factors.
    Adding another adapter makes it the active one.

    Args:
        model: any `nnx.Module`; its layers may be stacked by `nnx.vmap`, and may be the model's own einsum modules.
        config: what to adapt and how. With dropout in it, the model gets random streams (`set_dropout`); `model.eval()`
            and `model.train()` switch them off and on.
        rngs: the stream `params` (or `default`) draws the factors, `dropout` seeds dropout.
        adapter_name, names, model_type: as for `loha_jax.inject`. A module's name is its path: "layers.0.up".
        layouts: as for `loha_jax.inject`, for kernels whose layout neither their layer (`nnx.Linear`,
            `nnx.LinearGeneral`, `nnx.Conv`, `nnx.Einsum`, any module with an `einsum_str`) nor their shape says.

    Returns:
        The model.

    Raises:
        ValueError: as `loha_jax.inject`, or a variable sits in a tuple; nothing is changed then.
        TypeError: `model` is no module, or `rngs` no `nnx.Rngs`.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> config = LoHaConfig(r=2, target_modules=["layers.0", "layers.2"])
        >>> inject(model, config, rngs=nnx.Rngs(2))(jnp.ones((3, 4))).shape
        (3, 2)
        >>> nnx.state(model, LoHaParam)["layers"][0]["kernel"]["adapters"]["default"]["hada_w1_a"].shape
        (8, 2)
    """
    _check("inject", model, rngs)
    inject_tree(
        model,
        config,
        key=rngs.params(),
        adapter_name=adapter_name,
        names=names,
        layouts=layouts,
        model_type=model_type,
    )
    return set_dropout(model, rngs)


def set_dropout(model: M, rngs: nnx.Rngs) -> M:
    """Gives each kernel of an adapted model whose config drops out a random stream, and puts it into training mode.

    `inject` does it by itself; an adapter that `interop.load_peft` read has none until this is called.

    Args:
        model: an adapted model; changed in place.
        rngs: its stream `dropout` (or `default`) seeds the new streams.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, or `rngs` no `nnx.Rngs`.

    Example:
        >>> from flax import nnx
        >>> model = LoHaLinear(4, 4, rngs=nnx.Rngs(0))
        >>> set_dropout(model, nnx.Rngs(1)).kernel.rngs is None  # its config has no dropout
        True
    """
    _check("set_dropout", model, rngs)
    for node in adapted_nodes(model).values():
        if isinstance(node, AdaptedKernel) and node.drops:
            stack = node.layout.sizes("s", node.base.get_value().shape)
            stream = rngs.dropout
            node.rngs = nnx.RngStream(jax.random.split(stream(), stack) if stack else stream(), tag="dropout")
            node.deterministic = False
    return model


def _check(function: str, model: Any, rngs: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"loha_jax.nnx.{function} takes an nnx.Module, got {type(model).__name__}. For a tree of parameters there "
            f"is loha_jax.{'inject' if function == 'inject' else 'dropout'}."
        )
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs should be an nnx.Rngs, e.g. nnx.Rngs(0), got {type(rngs).__name__}")


def _adapt(layer: nnx.Module, kernel: str, rngs: nnx.Rngs, r: int, alpha: float, loha: dict[str, Any]) -> None:
    adapt_layer(layer, kernel, LoHaConfig(r=r, alpha=alpha, **loha), key=rngs.params())
    set_dropout(layer, rngs)


class LoHaLinear(adapted_class(nnx.Linear, owner=True)):
    """`nnx.Linear` with a LoHa adapter on its kernel.

    Args:
        in_features, out_features: as for `nnx.Linear`, as are further keyword arguments, initial values included.
        r, alpha: rank of the factors; the update is scaled by alpha/r.
        rank_dropout, module_dropout, init_weights: as in `LoHaConfig`.
        rngs: streams for the parameters and for dropout.

    The kernel is `self.kernel.base`, frozen; the factors are `LoHaParam`s. In a model, `interop.save_peft(folder,
    model)` gives the layer its path as its name. `loha_jax.merge(model)` makes it an `nnx.Linear`.

    Example:
        >>> from flax import nnx
        >>> layer = LoHaLinear(4, 8, r=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 4))).shape, len(jax.tree.leaves(nnx.state(layer, LoHaParam)))
        ((3, 8), 4)
    """

    __reduce__ = object.__reduce__

    def __init__(self, in_features, out_features, *, r: int = 8, alpha: float = 8, rngs: nnx.Rngs, **kwargs: Any):
        loha = _split_options(kwargs)
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        _adapt(self, "kernel", rngs, r, alpha, loha)


class LoHaLinearGeneral(adapted_class(nnx.LinearGeneral, owner=True)):
    """`nnx.LinearGeneral` with a LoHa adapter on its kernel; batch axes hold one adapter per index.

    Args:
        in_features, out_features: as for `nnx.LinearGeneral`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Example:
        >>> from flax import nnx
        >>> LoHaLinearGeneral(4, (2, 3), r=2, rngs=nnx.Rngs(0))(jnp.ones((5, 4))).shape
        (5, 2, 3)
    """

    __reduce__ = object.__reduce__

    def __init__(self, in_features, out_features, *, r: int = 8, alpha: float = 8, rngs: nnx.Rngs, **kwargs: Any):
        loha = _split_options(kwargs)
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        _adapt(self, "kernel", rngs, r, alpha, loha)


class LoHaConv(adapted_class(nnx.Conv, owner=True)):
    """`nnx.Conv` with a LoHa adapter on its kernel.

    Args:
        in_features, out_features, kernel_size: as for `nnx.Conv`, as are further keyword arguments.
        use_effective_conv2d: a kernel larger than 1 gets the CP form, with cores.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Example:
        >>> from flax import nnx
        >>> layer = LoHaConv(4, 8, (3, 3), r=2, use_effective_conv2d=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 5, 5, 4))).shape
        (1, 5, 5, 8)
    """

    __reduce__ = object.__reduce__

    def __init__(
        self, in_features, out_features, kernel_size, *args, r: int = 8, alpha: float = 8, rngs: nnx.Rngs, **kwargs: Any
    ):
        loha = _split_options(kwargs, "use_effective_conv2d")
        super().__init__(in_features, out_features, kernel_size, *args, rngs=rngs, **kwargs)
        _adapt(self, "kernel", rngs, r, alpha, loha)


class LoHaEinsum(adapted_class(nnx.Einsum, owner=True)):
    """`nnx.Einsum` with a LoHa adapter on its kernel, whose layout is read off the equation.

    Args:
        einsum_str, kernel_shape, bias_shape: as for `nnx.Einsum`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Raises:
        ValueError: the kernel has no contracted letter or none of its own.

    Example:
        >>> from flax import nnx
        >>> LoHaEinsum("btd,ndh->btnh", (2, 4, 3), r=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 4))).shape
        (1, 5, 2, 3)
    """

    __reduce__ = object.__reduce__

    def __init__(self, einsum_str, kernel_shape, *args, r: int = 8, alpha: float = 8, rngs: nnx.Rngs, **kwargs: Any):
        loha = _split_options(kwargs)
        super().__init__(einsum_str, kernel_shape, *args, rngs=rngs, **kwargs)
        _adapt(self, "kernel", rngs, r, alpha, loha)


class LoHaEmbed(adapted_class(nnx.Embed, owner=True)):
    """`nnx.Embed` with a LoHa adapter on its table: lookups form only the rows they read, `attend` is factored.

    The table's adapter has out = `num_embeddings` and in = `features`, as of an output head that is tied to it.

    Args:
        num_embeddings, features: as for `nnx.Embed`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Example:
        >>> from flax import nnx
        >>> LoHaEmbed(11, 4, r=2, rngs=nnx.Rngs(0))(jnp.array([3, 7])).shape
        (2, 4)
    """

    __reduce__ = object.__reduce__

    def __init__(self, num_embeddings, features, *, r: int = 8, alpha: float = 8, rngs: nnx.Rngs, **kwargs: Any):
        loha = _split_options(kwargs)
        super().__init__(num_embeddings, features, rngs=rngs, **kwargs)
        _adapt(self, "embedding", rngs, r, alpha, loha)


def _split_options(kwargs: dict[str, Any], *more: str) -> dict[str, Any]:
    """Takes the adapter's own options out of a layer's keyword arguments."""
    return {
        name: kwargs.pop(name) for name in ("rank_dropout", "module_dropout", "init_weights", *more) if name in kwargs
    }
