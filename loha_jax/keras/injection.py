"""`inject`: adapters for a whole Keras model, in place."""

# Keras has no type information.
# pyright: reportMissingImports=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import TypeVar

import jax
import keras

from loha_jax.keras import model_tree
from loha_jax.targets.config import LoHaConfig
from loha_jax.targets.model_layouts import Layouts
from loha_jax.targets.module_names import Names
from loha_jax.tree.inject import inject as inject_tree

M = TypeVar("M")


def inject(
    model: M,
    config: LoHaConfig,
    *,
    key: jax.Array,
    adapter_name: str = "default",
    names: Names | None = None,
    layouts: Layouts | None = None,
    model_type: str | None = None,
) -> M:
    """Add a LoHa adapter to a built Keras model, in place.

    The factors are variables of the layers that they adapt: `kernel_lora_hada_w1_a`, …. All other
    variables are frozen, so `fit` trains the adapter alone. Compile the model after this: what was
    compiled before is forgotten. Adding another adapter makes it the active one.

    Args:
        model: a `keras.Model` on the JAX backend: functional, sequential or a subclass. Its layers
            may be nested, shared, and quantised to int8 or int4.
        config: which modules to adapt, and how. Dense, EinsumDense, Conv1D, Conv2D, Conv3D and
            Embedding can be adapted. Dropouts apply where Keras calls the model with
            `training=True`, as `fit` does.
        key: JAX PRNG key that the factors are drawn with.
        adapter_name, names, model_type: as for `loha_jax.inject`. A module's name is the path of
            its layer, without the model's name and with dots: "encoder.block_0.query".
        layouts: as for `loha_jax.inject`; the layers know theirs.

    Returns:
        The model.

    Raises:
        ValueError: as `loha_jax.inject`, or the model is not built or frozen as a whole, two layers
            have one path, or a targeted layer cannot be adapted. Nothing is changed then.
        TypeError: `model` is no `keras.Model`.

    As in PEFT, the moving statistics of BatchNormalization still change in training. Setting
    `trainable = False` on these layers stops that.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="up")])
        >>> config = LoHaConfig(r=2, target_modules=["up"])
        >>> model = inject(model, config, key=jax.random.key(0))
        >>> [variable.name for variable in model.trainable_variables][0]
        'kernel_lora_hada_w1_a'
        >>> model(jnp.ones((2, 4))).shape
        (2, 3)
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"loha_jax.keras.inject takes a keras.Model, got {type(model).__name__}. For a tree of "
            "parameters there is loha_jax.inject."
        )
    if not model.trainable:
        raise ValueError(
            f"The model {model.name} has trainable=False, so its adapter would not be trained. Set "
            "model.trainable = True first: inject freezes the base by itself."
        )
    model_tree.tree_of(model)  # the model is one that can be read, before anything else is said
    return inject_tree(
        model,
        config,
        key=key,
        adapter_name=adapter_name,
        names=names,
        layouts=layouts,
        model_type=model_type,
    )
