"""LoHa in numpy for the tests of Flax NNX.

ΔW by PEFT's formulas, folded by hand, added to a plain model's kernels.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

R, ALPHA = 2, 3
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def place(model, path):
    """The module that holds what a path leads to, and how the names of its siblings begin."""
    *_, (owner, rest) = [
        (node, path[n:])
        for path in (path.split("/"),)
        for n, node in enumerate(at(model, "/".join(path[:n])) for n in range(len(path)))
        if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.List)
    ]
    return owner, "_".join(rest) + "_lora"


def factors(model, path, adapter="default"):
    """The variables of an adapter beside a kernel, by PEFT's names."""
    owner, prefix = place(model, path)
    prefix += "_" if adapter == "default" else f"_{adapter}_"
    return {n: getattr(owner, prefix + n) for n in FACTORS if hasattr(owner, prefix + n)}


def numpy_delta(model, path, r=R, alpha=ALPHA, adapter="default"):
    """ΔW in torch's shape, `[*stack, out, in, *spatial]`, from the factors by PEFT's formulas."""
    tensors = factors(model, path, adapter).items()
    t = {n: np.asarray(v.get_value(), np.float64) for n, v in tensors}
    if "hada_t1" in t:
        one, two = (
            np.einsum(
                "...ijkl,...jr,...ip->...prkl",
                t[f"hada_t{n}"],
                t[f"hada_w{n}_b"],
                t[f"hada_w{n}_a"],
            )
            for n in (1, 2)
        )
    else:
        one, two = (t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in (1, 2))
    return one * two * (alpha / r)


def dense(delta, shape):
    """`io`, `ioo`, `iio`, and with one stack axis in front `sio` and so on."""
    return np.swapaxes(delta, -1, -2).reshape(shape)


def table(delta, shape):
    return delta


def conv(delta, shape):
    """`k…io`: the last axes of torch's `[out, in, *spatial]` in front."""
    *spatial, in_, out = shape
    return np.moveaxis(delta.reshape(out, in_, *spatial), (1, 0), (-2, -1))


def transposed_conv(delta, shape):
    *spatial, out, in_ = shape
    return np.moveaxis(delta.reshape(out, in_, *spatial), (0, 1), (-2, -1))


def ndh(delta, shape):
    """`oio`: the kernel of btd,ndh->btnh."""
    n, d, h = shape
    return delta.reshape(n, h, d).transpose(0, 2, 1)


def fused(delta, shape):
    """`soio`: the kernel of bsd,ckdh->cbskh."""
    c, k, d, h = shape
    return delta.reshape(c, k, h, d).transpose(0, 1, 3, 2)


def at(model, path):
    for part in path.split("/") if path else ():
        index = int(part) if part.isdigit() else part
        model = (
            model[index]
            if isinstance(model, dict | list) or part.isdigit()
            else getattr(model, part)
        )
    return model


def targets(paths):
    return [path.rpartition("/")[0].replace("/", ".") for path in paths]


def with_sums(model, adapted, folds, **settings):
    """The plain model with W + ΔW in the places of the adapted kernels."""
    for path, fold in folds.items():
        variable = at(model, path)
        weight = np.asarray(variable.get_value())
        np.testing.assert_array_equal(weight, at(adapted, path).get_value())
        delta = numpy_delta(adapted, path, **settings)
        variable.set_value(jnp.asarray(weight + fold(delta, weight.shape)))
    return model
