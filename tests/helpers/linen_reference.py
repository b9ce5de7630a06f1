"""Shared by the tests in tests/linen: models, trees and references."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_arrays import normal_array

from loha_jax.linen import LoHaConv, LoHaDense, LoHaDenseGeneral, LoHaEinsum, LoHaEmbed

KEY = jax.random.key(0)


R, ALPHA = 3, 5.0


# --- equal to the Flax layer with W + ΔW, by a formula written out by hand ---


def flat(p, scale):
    """[..., out, in·spatial]"""
    return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * scale


def with_cores(p, scale, spatial):
    one, two = (
        jnp.einsum(
            f"ij{spatial},ip,jq->pq{spatial}", p[f"hada_t{n}"], p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
        )
        for n in (1, 2)
    )
    return one * two * scale


def transposed(p, shape, scale):
    return jnp.swapaxes(flat(p, scale), -1, -2).reshape(shape)


def as_stored(p, shape, scale):
    return flat(p, scale).reshape(shape)


def conv2d(p, shape, scale):
    kh, kw, i, o = shape
    return flat(p, scale).reshape(o, i, kh, kw).transpose(2, 3, 1, 0)


def conv1d(p, shape, scale):
    k, i, o = shape
    return flat(p, scale).reshape(o, i, k).transpose(2, 1, 0)


def conv3d(p, shape, scale):
    *k, i, o = shape
    return flat(p, scale).reshape(o, i, *k).transpose(2, 3, 4, 1, 0)


def conv2d_cores(p, shape, scale):
    return with_cores(p, scale, "hw").transpose(2, 3, 1, 0)


def conv1d_cores(p, shape, scale):
    return with_cores(p, scale, "kz")[..., 0].transpose(2, 1, 0)


@dataclasses.dataclass
class Case:
    loha: Any
    fields: dict
    shape: tuple
    fold: Any
    method: Any = None
    kernel: str = "kernel"

    def layer(self, **more):
        return self.loha(**self.fields, **{"r": R, "alpha": ALPHA, **more})

    @property
    def flax(self):
        return next(c for c in self.loha.__mro__ if c.__module__ == "flax.linen.linear")

    def plain(self, **more):
        own = {f.name for f in dataclasses.fields(self.flax)}
        return self.flax(**{k: v for k, v in self.fields.items() if k in own}, **more)

    def inputs(self, dtype=None):
        if self.kernel == "embedding" and self.method is None:
            return jax.random.randint(jax.random.key(5), self.shape, 0, 7)
        return normal_array(5, self.shape, dtype)


MASK = (np.arange(3 * 3 * 4 * 6).reshape(3, 3, 4, 6) % 3 > 0).astype(np.float32)


SAME_BUT_SLOW = {"dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)}


CASES = {
    "dense": Case(LoHaDense, {"features": 5}, (2, 4), transposed),
    "dense_vector": Case(LoHaDense, {"features": 5}, (4,), transposed),
    "dense_many_axes": Case(
        LoHaDense, {"features": 5, "use_bias": False}, (2, 3, 6, 4), transposed
    ),
    "dense_options": Case(
        LoHaDense,
        {"features": 5, "precision": "highest", "bias_init": nn.initializers.ones, **SAME_BUT_SLOW},
        (2, 4),
        transposed,
    ),
    "general_query": Case(LoHaDenseGeneral, {"features": (2, 5)}, (3, 4), transposed),
    "general_out": Case(LoHaDenseGeneral, {"features": 5, "axis": (-2, -1)}, (3, 2, 4), transposed),
    "general_middle": Case(
        LoHaDenseGeneral, {"features": (2, 3), "axis": (3, 1)}, (3, 2, 4, 5), transposed
    ),
    "general_batch": Case(
        LoHaDenseGeneral,
        {"features": (2, 3), "axis": -1, "batch_dims": (0, 1)},
        (3, 2, 6, 4),
        transposed,
    ),
    "conv1d": Case(
        LoHaConv, {"features": 6, "kernel_size": 3, "padding": "CAUSAL"}, (2, 8, 4), conv1d
    ),
    "conv1d_cores": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3,), "use_effective_conv2d": True},
        (2, 8, 4),
        conv1d_cores,
    ),
    "conv2d": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 2), "strides": 2, "padding": [(1, 0), (2, 1)]},
        (2, 8, 7, 4),
        conv2d,
    ),
    "conv2d_cores": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 2), "kernel_dilation": 2, "use_effective_conv2d": True},
        (2, 8, 7, 4),
        conv2d_cores,
    ),
    "conv2d_of_size_1_is_flat": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (1, 1), "use_effective_conv2d": True},
        (2, 3, 3, 4),
        conv2d,
    ),
    "conv2d_circular": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 3), "padding": "CIRCULAR"},
        (2, 5, 5, 4),
        conv2d,
    ),
    "conv2d_reflect": Case(
        LoHaConv, {"features": 6, "kernel_size": (3, 3), "padding": "REFLECT"}, (5, 5, 4), conv2d
    ),
    "conv2d_groups": Case(
        LoHaConv,
        {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2},
        (2, 5, 5, 4),
        conv2d,
    ),
    "conv2d_groups_cores": Case(
        LoHaConv,
        {
            "features": 6,
            "kernel_size": (3, 3),
            "feature_group_count": 2,
            "use_effective_conv2d": True,
        },
        (2, 5, 5, 4),
        conv2d_cores,
    ),
    "conv2d_mask": Case(
        LoHaConv, {"features": 6, "kernel_size": (3, 3), "mask": MASK}, (2, 5, 5, 4), conv2d
    ),
    "conv2d_transposed_input": Case(
        LoHaConv,
        {
            "features": 6,
            "kernel_size": (3, 3),
            "input_dilation": 2,
            "padding": ((1, 2), (0, 1)),
            "use_bias": False,
        },
        (1, 2, 5, 5, 4),
        conv2d,
    ),
    "conv3d": Case(LoHaConv, {"features": 6, "kernel_size": (2, 3, 2)}, (1, 3, 4, 3, 4), conv3d),
    "einsum_query": Case(
        LoHaEinsum, {"shape": (4, 2, 5), "einsum_str": "btd, dnh->btnh"}, (2, 3, 4), transposed
    ),
    "einsum_out": Case(
        LoHaEinsum, {"shape": (2, 5, 4), "einsum_str": "btnh,nhd->btd"}, (2, 3, 2, 5), transposed
    ),
    "einsum_out_first": Case(
        LoHaEinsum, {"shape": (2, 5, 4), "einsum_str": "btd,nhd->btnh"}, (2, 3, 4), as_stored
    ),
    "einsum_experts": Case(
        LoHaEinsum, {"shape": (3, 4, 5), "einsum_str": "ebi,eio->ebo"}, (3, 2, 4), transposed
    ),
    "einsum_ellipsis": Case(
        LoHaEinsum,
        {"shape": (4, 5), "einsum_str": "...i,io->...o", "use_bias": False},
        (2, 3, 4),
        transposed,
    ),
    "embed": Case(
        LoHaEmbed, {"num_embeddings": 7, "features": 4}, (2, 3), as_stored, kernel="embedding"
    ),
    "embed_of_one": Case(
        LoHaEmbed, {"num_embeddings": 1, "features": 4}, (2, 3), as_stored, kernel="embedding"
    ),
    "embed_attend": Case(
        LoHaEmbed, {"num_embeddings": 7, "features": 4}, (2, 4), as_stored, "attend", "embedding"
    ),
}


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def randomised(shapes, seed=1):
    """Normal numbers in the place of every array or shape."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)


def shapes_of(case, layer):
    return jax.eval_shape(
        lambda: layer.init(KEY, case.inputs(layer.param_dtype), method=case.method)["params"]
    )


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-10)


# --- Flax's transforms ---


class Block(nn.Module):
    """Used with and without adapters."""

    dense: Any = LoHaDense
    fields: Any = dataclasses.field(default_factory=lambda: {"r": 2, "init_weights": False})

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.tanh(self.dense(x.shape[-1], name="q", **self.fields)(x)), None


def scanned(axis=0, block=Block, **fields):
    return nn.scan(
        block,
        variable_axes={"params": axis},
        split_rngs={"params": True, "dropout": True},
        length=4,
        metadata_params={nn.meta.PARTITION_NAME: "layers"},
    )(**fields, name="layers")


class Scanned(nn.Module):
    axis: int = 0
    block: Any = Block
    fields: Any = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        return scanned(self.axis, self.block, **self.fields)(x, None)[0]


def plain_params(params):
    """W + ΔW by hand in every Dense of a tree."""
    if "hada_w1_a" not in params:
        return {k: plain_params(v) if isinstance(v, dict) else v for k, v in params.items()}
    rest = {k: v for k, v in params.items() if not k.startswith("hada")}
    return {
        **rest,
        "kernel": params["kernel"]
        + transposed(params, params["kernel"].shape, 8 / params["hada_w1_a"].shape[-1]),
    }


class Tied(nn.Module):
    """Every layer, two of them in setup."""

    def setup(self):
        self.embed = LoHaEmbed(11, 8, r=2, init_weights=False)
        self.query = LoHaDenseGeneral((2, 4), r=2, init_weights=False)
        self.out = LoHaEinsum((2, 4, 8), "btnh,nhd->btd", r=3, alpha=4, init_weights=False)
        self.conv = LoHaConv(8, (3,), r=2, init_weights=False)
        self.norm = nn.LayerNorm()

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.out(self.query(self.norm(x)))
        return self.embed.attend(self.conv(x))


IDS = jnp.array([[1, 2, 3, 4], [5, 6, 10, 0]])
