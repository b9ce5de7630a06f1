"""`explain`: which form each use of a kernel takes, and what is dense and why."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from pullbacks import (
    adapted,
    check,
    normal,
)

import loha_jax


def test_strategies_by_module_name_and_unknown_ones():
    base = {"a": {"kernel": normal(4, 6)}, "b": {"kernel": normal(6, 4)}}
    params = adapted(base, None, ["a", "b"])

    def fn(p, x):
        return x @ p["a"]["kernel"] @ p["b"]["kernel"]

    uses = loha_jax.explain(fn, params, normal(5, 4), strategy={"a": "fused", "b": "factored"}).uses
    assert {use.module: use.strategy for use in uses} == {"a": "fused", "b": "factored"}
    check(partial(fn), params, normal(5, 4))
    with pytest.raises(
        ValueError, match="strategy is one of auto, factored, fused, dense, pallas, got 'quick'"
    ):
        loha_jax.adapt(fn, strategy="quick")


def test_shapes_alone_can_be_explained():
    params = jax.eval_shape(lambda: adapted({"m": {"kernel": jnp.ones((64, 64))}}, None, ["m"]))
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    (use,) = loha_jax.explain(lambda p, x: x @ p["m"]["kernel"], params, x).uses
    assert (use.strategy, use.rows, use.flops) == ("factored", 128, 2 * 2 * 128 * 64 * 64)


def test_a_report_names_what_is_dense_and_why():
    params = adapted(
        {"m": {"kernel": normal(4, 6)}, "idle": {"kernel": normal(4, 4)}}, None, ["m", "idle"]
    )
    explanation = loha_jax.explain(
        lambda p, x: jnp.sort(jnp.asarray(p["m"]["kernel"])), params, normal(5, 4)
    )
    assert explanation.unused == ("idle",)
    (use,) = explanation.dense
    assert (use.module, use.primitive, use.note) == ("m", "sort", "no rule for this primitive")
    assert re.search(r"m\s+sort\s+4x6\s+-\s+dense", str(explanation))
    assert "never read: idle" in str(explanation)
