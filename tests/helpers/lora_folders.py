"""Shared by the tests in tests/interop/exchange: models, trees and references."""

import numpy as np

PREFIX = "base_model.model."


def dense(module, shape):
    """ΔW by the definition, in float64."""
    t = {part: tensor.astype(np.float64) for part, tensor in module.tensors.items()}
    if "hada_t1" in t:
        halves = [
            np.einsum("ij...,jr,ip->pr...", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"])
            for n in "12"
        ]
    else:
        halves = [t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in "12"]
    return (halves[0] * halves[1]).reshape(shape) * module.alpha / module.r
