"""`inject` and `set_dropout`: adapters for a whole NNX model, in place."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx

from loha_jax.nnx.siblings import DropoutStream, adapted_in
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.inject import inject as inject_tree
from loha_jax.tree.leaves import LoHaWeight, SavedWeight

M = TypeVar("M", bound=nnx.Module)


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
    """Add a LoHa adapter to an NNX model, in place.

    Each targeted kernel stays where it is, and gets an `nnx.LoRAParam` (alias `LoHaParam`) per
    factor beside it: `kernel_lora_hada_w1_a`, … The modules are called as before, and compute on
    the factors. Code that reads `model.up.kernel` itself, outside of any call of the model, gets
    the base weight; `loha_jax.adapt(fn)(model, …)` gives it the adapted one. Adding another adapter
    makes it the active one.

    Args:
        model: any `nnx.Module`. Its layers may be stacked by `nnx.vmap` or a scan, on any axis, and
            may be the model's own einsum modules. The factors are stacked on the same axis as their
            kernel, counted from the first: scan over `in_axes=2`, not over `-2`.
        config: which modules to adapt, and how. With a dropout, the model gets random streams
            (`set_dropout`); `model.eval()` and `model.train()` switch them off and on.
        rngs: the stream `params` (or `default`) draws the factors, `dropout` seeds dropout.
        adapter_name, names, model_type: as for `loha_jax.inject`. A module's name is its path:
            "layers.0.up".
        layouts: as for `loha_jax.inject`, for kernels whose layout is determined neither by their
            layer (`nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv`, `nnx.Einsum`, any module with an
            `einsum_str`) nor by their shape.

    Returns:
        The model.

    Raises:
        ValueError: as `loha_jax.inject`, or there is no place beside a kernel: its module has an
            attribute of that name, or it is in a list that no module holds, or it is quantised and
            its provider of qwix has not adapted it. Nothing is changed then.
        TypeError: `model` is no module, or `rngs` no `nnx.Rngs`.

    Example:
        >>> import loha_jax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> up, down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        >>> model = nnx.Sequential(up, nnx.relu, down)
        >>> config = LoHaConfig(r=2, target_modules=["layers.0", "layers.2"])
        >>> inject(model, config, rngs=rngs)(jnp.ones((3, 4))).shape
        (3, 2)
        >>> nnx.state(model, nnx.LoRAParam)["layers"][0]["kernel_lora_hada_w1_a"].shape
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
    """Give each adapted kernel with a dropout a random stream, and put it into training mode.

    `inject` calls this. A model whose adapter was read by `interop.load_peft` has no stream until
    it is called.

    Args:
        model: an adapted model; changed in place.
        rngs: its stream `dropout` (or `default`) seeds the new streams.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, or `rngs` no `nnx.Rngs`.

    Example:
        >>> from flax import nnx
        >>> from loha_jax.nnx import LoHaLinear
        >>> model = LoHaLinear(4, 4, rngs=nnx.Rngs(0))
        >>> hasattr(set_dropout(model, nnx.Rngs(1)), "kernel_lora_rngs")  # there is no dropout
        False
    """
    _check("set_dropout", model, rngs)
    streams: dict[int, DropoutStream] = {}
    for _, node in nnx.iter_graph(model):
        for adapted in adapted_in(node):
            if adapted.settings.drops:
                if id(adapted.base) not in streams:
                    streams[id(adapted.base)] = _new_stream(adapted.leaf(), rngs)
                adapted.set_mode(streams[id(adapted.base)])
    return model


def _new_stream(leaf: LoHaWeight | SavedWeight, rngs: nnx.Rngs) -> DropoutStream:
    stack = leaf.layout.sizes("s", leaf.shape) if leaf.layout else ()
    key = rngs.dropout()
    stream = DropoutStream(jax.random.split(key, stack) if stack else key, tag="dropout")
    stream.deterministic = False
    return stream


def _check(function: str, model: object, rngs: object) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"loha_jax.nnx.{function} takes an nnx.Module, got {type(model).__name__}. For a tree "
            f"of parameters there is loha_jax.{'inject' if function == 'inject' else 'dropout'}."
        )
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs should be an nnx.Rngs, e.g. nnx.Rngs(0), got {type(rngs).__name__}")
