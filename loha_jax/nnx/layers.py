"""NNX layers with a LoHa adapter of their own, for authors of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from loha_jax.nnx.adapted_classes import adapted_class, base_class
from loha_jax.nnx.injection import set_dropout
from loha_jax.nnx.model_tree import layer_layout
from loha_jax.nnx.siblings import Siblings
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.field_checks import refuse_unknown_kernel
from loha_jax.tree.inject import inject


def _constructor(kernel: str = "kernel", *more_options: str) -> Callable[..., None]:
    """Return the constructor of a layer: that of the Flax layer, with the adapter's options."""
    names = ("rank_dropout", "module_dropout", "init_weights", *more_options)

    def __init__(
        self: nnx.Module,
        *args: object,
        r: int = 8,
        alpha: float = 8,
        rngs: nnx.Rngs,
        **kwargs: object,
    ) -> None:
        options: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        config = LoHaConfig(r=r, alpha=alpha, **options)
        instead = "`loha_jax.nnx.inject` on the model that has the pretrained weights"
        refuse_unknown_kernel(config.init_weights, type(self).__name__, instead)
        flax_layer: Any = base_class(self)
        flax_layer.__init__(self, *args, rngs=rngs, **kwargs)
        _adapt(self, kernel, config, rngs)

    return __init__


class LoHaLinear(adapted_class(nnx.Linear)):
    """`nnx.Linear` with a LoHa adapter on its kernel.

    Args:
        in_features, out_features: as for `nnx.Linear`, as are further keyword arguments. The
            initial values are those of `nnx.Linear` too.
        r, alpha: the rank of the factors; the update is scaled by alpha/r.
        rank_dropout, module_dropout, init_weights: as in `LoHaConfig`, but for "abba": it needs the
            weights of the kernel, which come later. Use `loha_jax.nnx.inject` on the whole model.
        rngs: streams for the parameters and for dropout.

    The kernel is `self.kernel`, frozen; the factors are `nnx.LoRAParam`s beside it. In a model, the
    layer's name for `interop.save_peft(folder, model)` is its path. `loha_jax.merge(model)` makes
    it an `nnx.Linear`.

    Example:
        >>> from flax import nnx
        >>> from loha_jax.nnx import LoHaParam
        >>> layer = LoHaLinear(4, 8, r=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 4))).shape, len(jax.tree.leaves(nnx.state(layer, LoHaParam)))
        ((3, 8), 4)
    """

    __init__ = _constructor()
    __reduce__ = object.__reduce__


class LoHaLinearGeneral(adapted_class(nnx.LinearGeneral)):
    """`nnx.LinearGeneral` with a LoHa adapter on its kernel; batch axes hold one adapter per index.

    Args:
        in_features, out_features: as for `nnx.LinearGeneral`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Example:
        >>> from flax import nnx
        >>> LoHaLinearGeneral(4, (2, 3), r=2, rngs=nnx.Rngs(0))(jnp.ones((5, 4))).shape
        (5, 2, 3)
    """

    __init__ = _constructor()
    __reduce__ = object.__reduce__


class LoHaConv(adapted_class(nnx.Conv)):
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

    __init__ = _constructor("kernel", "use_effective_conv2d")
    __reduce__ = object.__reduce__


class LoHaEinsum(adapted_class(nnx.Einsum)):
    """`nnx.Einsum` with a LoHa adapter on its kernel; the equation determines the kernel's layout.

    Args:
        einsum_str, kernel_shape, bias_shape: as for `nnx.Einsum`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Raises:
        ValueError: the kernel has no contracted letter, or none shared only with the result.

    Example:
        >>> from flax import nnx
        >>> LoHaEinsum("btd,ndh->btnh", (2, 4, 3), r=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 4))).shape
        (1, 5, 2, 3)
    """

    __init__ = _constructor()
    __reduce__ = object.__reduce__


class LoHaEmbed(adapted_class(nnx.Embed)):
    """`nnx.Embed` with a LoHa adapter on its table.

    Lookups materialise only the rows of ΔW that they read; `attend` is factored. The adapter has
    `num_embeddings` output and `features` input features, as that of an output head tied to the
    table.

    Args:
        num_embeddings, features: as for `nnx.Embed`, as are further keyword arguments.
        r, alpha, rank_dropout, module_dropout, init_weights, rngs: see `LoHaLinear`.

    Example:
        >>> from flax import nnx
        >>> LoHaEmbed(11, 4, r=2, rngs=nnx.Rngs(0))(jnp.array([3, 7])).shape
        (2, 4)
    """

    __init__ = _constructor("embedding")
    __reduce__ = object.__reduce__


def _adapt(layer: nnx.Module, kernel: str, config: LoHaConfig, rngs: nnx.Rngs) -> None:
    """Adapt the kernel of a layer, which does not know its name in a model yet."""
    variable: nnx.Variable = getattr(layer, kernel)
    array = variable.get_value()
    word = layer_layout(layer, kernel, array.shape) or ("oi" if kernel == "embedding" else None)
    if word is None:
        raise ValueError(
            f"The kernel of shape {array.shape} has no letter that "
            f"{getattr(layer, 'einsum_str', layer)!r} contracts, or none that only the kernel and "
            "the result have: there is nothing to factor."
        )
    everything = dataclasses.replace(config, target_modules=".*")
    leaf = inject({kernel: array}, everything, key=rngs.params(), layouts={".*": word})[kernel]
    factors = {n: dataclasses.replace(f, config=config) for n, f in leaf.adapters.items()}
    leaf = dataclasses.replace(leaf, adapters=factors, names=("",) * len(leaf.names))
    Siblings.of(leaf, variable).put(layer, (kernel,))
    set_dropout(layer, rngs)
