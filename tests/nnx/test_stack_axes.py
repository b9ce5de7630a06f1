"""Layers stacked on any axis by `nnx.vmap` and scanned over it, beside the same layers in a list.

The reference runs plain layers one by one, with W + ΔW by PEFT's formula from the adapter's file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from nnx_models import close, split
from nnx_reference import F64
from random_arrays import normal_array

import loha_jax
from loha_jax import LoHaConfig, interop
from loha_jax.nnx import LoHaLinear, LoHaParam, inject
from loha_jax.qwix import LoHaProvider

LAYERS, WIDTH = 3, 6
ALPHAS = {"layers.0.up": 4.0, "layers.1.up": 5.0, "layers.2.up": 4.0}
KERNELS = {"up": (WIDTH, 10), "query": (10, 2, 5), "out": (2, 5, WIDTH)}


@pytest.fixture(autouse=True)
def float64(x64):
    """Every test computes in float64."""


class Layer(nnx.Module):
    """The kernels `io`, `ioo` and `iio`."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "use_bias": False, **F64}
        self.up = nnx.Linear(WIDTH, 10, **options)
        self.query = nnx.LinearGeneral(10, (2, 5), **options)
        self.out = nnx.LinearGeneral((2, 5), WIDTH, axis=(-2, -1), **options)

    def __call__(self, x):
        return x + jnp.tanh(self.out(jnp.tanh(self.query(jnp.tanh(self.up(x))))))


def state_axes(axis):
    return nnx.StateAxes({nnx.RngState: nnx.Carry, nnx.Param: axis, ...: 0})


def scan(axis, x, layers):
    run = lambda x, layer: layer(x)  # noqa: E731
    return nnx.scan(run, in_axes=(nnx.Carry, state_axes(axis)), out_axes=nnx.Carry)(x, layers)


class Stacked(nnx.Module):
    def __init__(self, axis, rngs, layer=Layer, options=None):
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        self.layers = nnx.vmap(layer, out_axes=axes, **(options or {}))(split(rngs, LAYERS))
        self.axis = axis

    def __call__(self, x):
        return scan(self.axis, x, self.layers)


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def numpy_update(tensors, name, alpha, r):
    """ΔW `[out, in]` of a module in an adapter's file."""
    t = [
        np.asarray(tensors[f"base_model.model.{name}.hada_{part}"], np.float64)
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    ]
    return (t[0] @ t[1]) * (t[2] @ t[3]) * alpha / r


def listed(model, kernels, alphas=None, r=2):
    """The layers of a stacked model in a list, with ΔW of its file added in numpy."""
    tensors = interop.to_peft_state_dict(model)
    plain = Listed(nnx.Rngs(0))
    for n, layer in enumerate(plain.layers):
        for name, shape in KERNELS.items():
            weight = np.moveaxis(np.asarray(kernels[name]), model.axis, 0)[n]
            assert weight.shape == shape
            module = f"layers.{n}.{name}"
            delta = numpy_update(tensors, module, (alphas or {}).get(module, 4.0), r)
            getattr(layer, name).kernel.set_value(jnp.asarray(weight + delta.T.reshape(shape)))
    return plain


def kernels_of(model):
    return {name: getattr(model.layers, name).kernel.get_value() for name in KERNELS}


def inputs():
    return normal_array(3, (4, WIDTH), jnp.float64)


AXES = [0, 1, 2, -1, -2]
PLACES = {-1: -1, -2: 2}  # a negative axis of a kernel of four axes, in the factors of `inject`


@pytest.mark.parametrize("axis", AXES)
def test_inject(axis, tmp_path):
    """The model, its layers scanned from outside, its file and its gradients."""
    config = LoHaConfig(
        r=2, alpha=4, alpha_pattern=ALPHAS, target_modules=list(KERNELS), init_weights=False
    )
    model, x = inject(Stacked(axis, nnx.Rngs(0)), config, rngs=nnx.Rngs(1)), inputs()
    plain = listed(model, kernels_of(model), ALPHAS)
    close(model(x), plain(x))
    explained = loha_jax.explain(lambda m, x: m(x), model, x)
    assert (explained.dense, explained.unused) == ((), ())
    close(loha_jax.merge(nnx.clone(model))(x), plain(x))
    loss = lambda m: (m(x) ** 2).sum()  # noqa: E731
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(model)
    twin = Listed(nnx.Rngs(0))
    for n in range(LAYERS):
        for name, kernel in kernels_of(model).items():
            base = np.moveaxis(np.asarray(kernel), axis, 0)[n]
            getattr(twin.layers[n], name).kernel.set_value(jnp.asarray(base))
    interop.save_peft(tmp_path, model)
    twin = interop.load_peft(tmp_path, twin)
    twin_grads = nnx.grad(loss, argnums=nnx.DiffState(0, LoHaParam))(twin)
    for n in range(LAYERS):
        for name in KERNELS:
            ours, theirs = grads["layers"][name], twin_grads["layers"][n][name]
            for factor, array in theirs.items():
                place = axis if axis >= 0 or name == "up" else PLACES[axis]
                own = np.moveaxis(np.asarray(ours[factor].get_value()), place, 0)
                close(own[n], array.get_value())


@pytest.mark.parametrize("axis", AXES[:4])
def test_layers_scanned_from_outside(axis):
    """A scan takes one layer's kernel and one layer's factors."""
    config = LoHaConfig(r=2, alpha=4, target_modules=list(KERNELS), init_weights=False)
    model, x = inject(Stacked(axis, nnx.Rngs(0)), config, rngs=nnx.Rngs(1)), inputs()
    close(scan(axis, x, model.layers), listed(model, kernels_of(model))(x))


def with_provider(axis, **fields):
    """A stacked model with random factors of a provider."""
    x = inputs()
    provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0, **fields)
    model = qwix.apply_lora_to_model(Stacked(axis, nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    for n, (_, factor) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        factor.set_value(normal_array(n, factor.get_value().shape) * 0.5)
    return model, x


@pytest.mark.parametrize("axis", AXES)
def test_provider(axis, tmp_path):
    """Its factors are made by a scan over layers, and read outside of it."""
    model, x = with_provider(axis)
    plain = listed(model, kernels_of(model))
    close(model(x), plain(x), 1e-6)
    assert "layers.0.up … layers.2.up" in str(loha_jax.summary(model))
    interop.save_peft(tmp_path, model)
    interop.load_peft(tmp_path, model, adapter_name="other")
    close(model(x), plain(x), 1e-6)
    loha_jax.set_adapter(model, ["default", "other"])
    assert abs(model(x) - plain(x)).max() > 1e-3
    loha_jax.set_adapter(model, "default")
    close(model(x), plain(x), 1e-6)
    close(loha_jax.merge(model)(x), plain(x), 1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_provider_on_int8(axis):
    """Quantised layers: the file fits the dequantised base, and merging quantises each layer."""
    model, x = with_provider(axis, weight_qtype="int8")
    base = {
        name: qwix.dequantize(
            jax.tree.map(
                lambda v: v.get_value(),
                getattr(model.layers, name).kernel.array,
                is_leaf=lambda v: isinstance(v, nnx.Variable),
            )
        )
        for name in KERNELS
    }
    plain = listed(model, base)
    close(model(x), plain(x), 1e-5)
    scales = [getattr(model.layers, name).kernel.array.scale.get_value().shape for name in KERNELS]
    losses = loha_jax.requantising_losses(model)
    assert len(losses) == len(KERNELS)
    assert all(0 < loss < 0.02 for loss in losses.values())
    again = loha_jax.merge(nnx.clone(model), requantise=True)
    assert scales == [
        getattr(again.layers, name).kernel.array.scale.get_value().shape for name in KERNELS
    ]
    close(again(x), plain(x), 0.1 * float(abs(plain(x)).max()))
    close(loha_jax.merge(model)(x), plain(x), 1e-5)


def test_author_layers():
    """Layers that are created with an adapter, stacked on axis 1."""
    make = lambda rngs: LoHaLinear(  # noqa: E731
        WIDTH, WIDTH, r=2, alpha=4, use_bias=False, init_weights=False, rngs=rngs, **F64
    )
    model, x = Stacked(1, nnx.Rngs(0), make), inputs()
    assert model.layers.kernel_lora_hada_w1_a.get_value().shape == (WIDTH, LAYERS, 2)
    tensors, want = interop.to_peft_state_dict(model), x
    for n in range(LAYERS):
        weight = model.layers.kernel.get_value()[:, n]
        want = want @ (weight + numpy_update(tensors, f"{n}.layers", 4, 2).T)
    close(model(x), want)
    close(loha_jax.merge(model)(x), want)


def test_two_stacks():
    """Experts on axis 0, and layers on axis 1 of the stack of experts."""
    experts = lambda rngs: nnx.vmap(lambda r: nnx.Linear(4, 5, rngs=r, **F64))(split(rngs, 2))  # noqa: E731
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    make = nnx.vmap(experts, out_axes=axes)
    model = nnx.Dict(layers=make(split(nnx.Rngs(0), LAYERS)))
    config = LoHaConfig(r=2, alpha=4, target_modules=["layers"], init_weights=False)
    inject(model, config, rngs=nnx.Rngs(1))
    assert model.layers.kernel_lora.template.layout.word == "ssio"
    assert model.layers.kernel_lora_hada_w1_a.get_value().shape == (2, LAYERS, 5, 2)
    x = jnp.ones((1, 4))
    run = nnx.vmap(lambda layer: nnx.vmap(lambda expert: expert(x))(layer), in_axes=(axes,))
    tensors, out = interop.to_peft_state_dict(model), run(model.layers)
    for expert in range(2):
        for n in range(LAYERS):
            weight = model.layers.kernel.get_value()[expert, n]
            delta = numpy_update(tensors, f"{expert}.{n}.layers", 4, 2).T
            close(out[n, expert], x @ (weight + delta) + model.layers.bias.get_value()[expert, n])


def test_axes_that_could_be_several():
    """Equal sizes: an error, until the variable's metadata says which axis was added."""
    make = lambda rngs: LoHaLinear(3, 3, r=3, use_bias=False, rngs=rngs, **F64)  # noqa: E731
    model = Stacked(1, nnx.Rngs(0), make)
    with pytest.raises(ValueError, match=r"layouts 'ios', 'iso', 'sio'.*param_scan_axis"):
        loha_jax.summary(model)
    model.layers.kernel.set_metadata(param_scan_axis=1)
    assert "iso" in str(loha_jax.summary(model))
    plain = Stacked(1, nnx.Rngs(0), lambda rngs: nnx.Linear(3, 3, use_bias=False, rngs=rngs))
    with pytest.raises(ValueError, match="could be several things"):
        inject(plain, LoHaConfig(r=1, target_modules=["layers"]), rngs=nnx.Rngs(1))
    plain.layers.kernel.set_metadata(param_scan_axis=1)
    inject(plain, LoHaConfig(r=1, target_modules=["layers"]), rngs=nnx.Rngs(1))
    assert plain.layers.kernel_lora.template.layout.word == "iso"


class Heads(nnx.Module):
    """As many heads as layers."""

    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(WIDTH, (LAYERS, 2), use_bias=False, rngs=rngs, **F64)

    def __call__(self, x):
        return x + self.query(x).reshape(x.shape)


class Image(nnx.Module):
    """A kernel as wide as there are layers."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (LAYERS, LAYERS), use_bias=False, rngs=rngs, **F64)

    def __call__(self, x):
        return x + self.conv(x)


@pytest.mark.parametrize(("layer", "shape"), [(Heads, (4, WIDTH)), (Image, (2, 5, 5, 4))])
def test_negative_axes_that_could_be_others(layer, shape):
    """The factors of a scan over axis -2 fit a scan over another axis, too: an error, or said."""
    x = normal_array(3, shape, jnp.float64)
    model = Stacked(-2, nnx.Rngs(0), layer)
    provider = LoHaProvider(module_path=".*", rank=2, alpha=4.0)
    model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    for n, (_, factor) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        factor.set_value(normal_array(n, factor.get_value().shape) * 0.5)
    with pytest.raises(ValueError, match="param_scan_axis"):
        loha_jax.merge(nnx.clone(model))
    (owner,) = vars(model.layers).keys() & {"query", "conv"}
    getattr(model.layers, owner).kernel.set_metadata(param_scan_axis=-2)
    close(loha_jax.merge(nnx.clone(model))(x), model(x))


def test_factors_that_do_not_fit_their_kernel():
    """Factors on another axis than the kernel, as a scan over the kernel alone leaves them."""
    model = with_provider(1)[0]
    factor = model.layers.up.kernel_lora_hada_w1_a
    factor.set_value(factor.get_value()[:, :2])
    with pytest.raises(ValueError, match="fit no place"):
        loha_jax.summary(model)
