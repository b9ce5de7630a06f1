"""Our layers beside LyCORIS' own `LohaModule`.

Forward passes and gradients in training form, with its options.

LyCORIS' merge is no reference: it scales twice (4.1.3).
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from lycoris.modules.loha import LohaModule

import loha_jax
from loha_jax import LycorisConfig

LAYERS = {
    "linear": (lambda: torch.nn.Linear(5, 7, bias=False), (4, 5), "io"),
    "conv1d": (lambda: torch.nn.Conv1d(4, 6, 3, bias=False), (2, 4, 7), "kio"),
    "conv2d": (lambda: torch.nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 5, 6), "kkio"),
    "grouped": (lambda: torch.nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5), "kkio"),
    "conv3d": (lambda: torch.nn.Conv3d(2, 3, (2, 3, 2), bias=False), (1, 2, 4, 5, 4), "kkkio"),
}
OPTIONS = {
    "plain": {},
    "stable": {"rs_lora": True},
    "scalar": {"use_scalar": True},
    "decomposed": {"weight_decompose": True},
    "decomposed per in feature": {"weight_decompose": True, "wd_on_out": False},
    "all": {"rs_lora": True, "use_scalar": True, "weight_decompose": True},
}


def apply(layer, x, kernel):
    if x.ndim == 2:
        return x @ jnp.asarray(kernel)
    space = "DHW"[-(x.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        (1,) * len(space),
        "VALID",
        dimension_numbers=("NC" + space, space + "IO", "NC" + space),
        feature_group_count=getattr(layer, "groups", 1),
    )


@pytest.mark.parametrize(
    ("layer", "cores", "option"),
    [
        pytest.param(layer, cores, option, id=f"{layer}, {'cores' if cores else 'flat'}, {option}")
        for layer, cores, option in itertools.product(LAYERS, (False, True), OPTIONS)
        if option == "all"
        or (layer in ("linear", "conv2d") and not cores)
        or (cores, option) == (True, "plain")
        if not (cores and layer == "linear")
    ],
)
def test_values_and_gradients_are_those_of_lycoris(layer, cores, option, x64):
    make, x_shape, layout = LAYERS[layer]
    options = OPTIONS[option]
    torch.manual_seed(0)
    module = make().double()
    theirs = LohaModule(
        "q", module, lora_dim=3, alpha=2, use_tucker=cores, bypass_mode=False, **options
    ).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name != "dora_scale":
                parameter.copy_(torch.rand_like(parameter) + 0.2)
            else:
                parameter.mul_(1.3)
    weight = module.weight.detach().numpy()
    kernel = jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2)))
    config = LycorisConfig(
        r=3, alpha=2, target_modules=["q"], use_effective_conv2d=cores, **options
    )
    params = loha_jax.inject(
        {"q": {"kernel": kernel}}, config, key=jax.random.key(0), layouts={"q": layout}
    )
    (factors,) = params["q"]["kernel"].adapters.values()
    given = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    assert given.keys() == factors.trained.keys()
    if options.get("weight_decompose"):  # both start at the norms of W
        np.testing.assert_allclose(
            given["dora_scale"], 1.3 * factors.dora_scale, rtol=1e-6
        )  # theirs was float32
    arrays = {
        name: jnp.asarray(given[name]).reshape(own.shape) for name, own in factors.trained.items()
    }
    leaf = params["q"]["kernel"]
    leaf = dataclasses.replace(leaf, adapters={"default": dataclasses.replace(factors, **arrays)})

    x = torch.rand(x_shape, requires_grad=True, dtype=torch.float64)
    theirs.train()
    theirs.apply_to()
    want = module(x)
    cotangent = torch.rand_like(want)
    want.backward(cotangent)

    def forward(leaf, x):
        return apply(module, x, leaf)

    run = loha_jax.adapt(forward, strategy="factored")
    step = jax.jit(lambda leaf, x, g: (run(leaf, x), jax.vjp(run, leaf, x)[1](g)))
    arguments = (leaf, jnp.asarray(x.detach().numpy()), jnp.asarray(cotangent.numpy()))
    got, (d_leaf, dx) = step.lower(*arguments).compile({"xla_backend_optimization_level": 0})(
        *arguments
    )
    assert_close(got, want.detach())
    assert_close(dx, x.grad)
    for name, parameter in theirs.named_parameters():
        assert_close(
            d_leaf.adapters["default"].trained[name].reshape(parameter.shape), parameter.grad
        )


def assert_close(got, want):
    want = want.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * max(np.abs(want).max(), 1e-3))


@pytest.mark.parametrize("limit", [0.5, 2.0, 1e3])
def test_max_norm_is_that_of_lycoris(limit):
    torch.manual_seed(1)
    module = torch.nn.Linear(5, 7, bias=False)
    theirs = LohaModule("q", module, lora_dim=3, alpha=2, use_scalar=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.rand_like(parameter))
    config = LycorisConfig(r=3, alpha=2, target_modules=["q"], use_scalar=True)
    params = loha_jax.inject({"q": {"kernel": jnp.zeros((5, 7))}}, config, key=jax.random.key(0))
    leaf = params["q"]["kernel"]
    (factors,) = leaf.adapters.values()
    arrays = {
        name: jnp.asarray(value.detach().numpy()) for name, value in theirs.named_parameters()
    }
    leaf = dataclasses.replace(leaf, adapters={"default": dataclasses.replace(factors, **arrays)})
    theirs.apply_max_norm(limit)
    (limited,) = loha_jax.apply_max_norm({"q": leaf}, limit)["q"].adapters.values()
    np.testing.assert_allclose(limited.scalar, theirs.scalar.item(), rtol=1e-5)
