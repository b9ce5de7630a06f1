"""LoHa in numpy for the tests of Flax NNX.

ΔW by PEFT's formulas, folded by hand, added to a plain model's kernels.
"""

import jax.numpy as jnp
import numpy as np

from loha_jax.nnx import AdaptedKernel

R, ALPHA = 2, 3
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def numpy_delta(node, r=R, alpha=ALPHA, adapter="default"):
    """ΔW in torch's shape, `[*stack, out, in, *spatial]`, from the factors by PEFT's formulas."""
    tensors = node.adapters[adapter].items()
    t = {n: np.asarray(v.get_value(), np.float64) for n, v in tensors if n.startswith("hada_")}
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
    for part in path.split("/"):
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
        node, variable = at(adapted, path), at(model, path)
        assert isinstance(node, AdaptedKernel)
        weight = np.asarray(variable.get_value())
        np.testing.assert_array_equal(weight, node.base.get_value())
        variable.set_value(jnp.asarray(weight + fold(numpy_delta(node, **settings), weight.shape)))
    return model
