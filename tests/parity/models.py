"""Small models in PyTorch with their twins in JAX, and random configs for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from hypothesis import strategies as st
from jax import lax
from peft_samples import flax_leaf, flax_value


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution over one or two axes; sizes per axis are tuples."""

    into: int
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Convolutions and a norm, or a chain of linear layers; and a head.

    The convolutions are `stem`, `blocks.0.conv`, …, the chain is `layers.0.q`, `layers.0.mlp`, …
    """

    width: int
    convs: tuple[Conv, ...]

    @property
    def linears(self) -> list[str]:
        chain = [f"layers.{n}.{part}" for n in range(3) for part in ("q", "mlp")]
        return ([] if self.convs else chain) + ["middle", "head"]

    @property
    def conv_names(self) -> list[str]:
        return ["stem", "blocks.0.conv", "blocks.1.conv"][: len(self.convs)]

    def torch_model(self, seed: int) -> Net:
        torch.manual_seed(seed)
        return Net(self).to(torch.float64).eval()

    def inputs(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a regression."""
        random = np.random.default_rng(seed)
        space = (7,) * len(self.convs[0].kernel) if self.convs else ()
        x = random.standard_normal((4, self.convs[0].into if self.convs else self.width, *space))
        return x, random.standard_normal((4, 2))


class Net(torch.nn.Module):
    """A `Spec` in PyTorch."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        if spec.convs:
            kind = torch.nn.Conv1d if len(spec.convs[0].kernel) == 1 else torch.nn.Conv2d
            norm = torch.nn.BatchNorm1d if len(spec.convs[0].kernel) == 1 else torch.nn.BatchNorm2d
            made = [
                kind(c.into, c.out, c.kernel, c.stride, c.padding, c.dilation, c.groups)  # type: ignore[arg-type]
                for c in spec.convs
            ]
            self.stem = made[0]
            self.blocks = torch.nn.ModuleList(
                torch.nn.ModuleDict({"conv": conv}) for conv in made[1:]
            )
            self.norm = norm(spec.convs[-1].out)
            torch.nn.init.normal_(self.norm.running_mean)
            width = spec.convs[-1].out
        else:
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict(
                    {
                        "q": torch.nn.Linear(spec.width, 6),
                        "mlp": torch.nn.Linear(6, spec.width, bias=False),
                    }
                )
                for _ in range(3)
            )
            width = spec.width
        self.middle = torch.nn.Linear(width, 5)
        self.head = torch.nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.convs:
            for conv in (self.stem, *(block["conv"] for block in self.blocks)):
                x = torch.tanh(conv(x))
            x = self.norm(x).flatten(2).mean(2)
        else:
            for layer in self.layers:
                x = torch.tanh(layer["mlp"](layer["q"](x)))
        return self.head(torch.tanh(self.middle(x)))


def jax_params(module: torch.nn.Module) -> Any:
    """The parameters and buffers of a torch module with Flax's names and axes."""
    flat = {}
    for key, value in module.state_dict().items():
        *path, leaf = key.split(".")
        array = value.numpy()
        flat[(*path, flax_leaf(path, leaf, array))] = jnp.asarray(flax_value(path, leaf, array))
    return unflatten_dict(flat)


def jax_forward(spec: Spec):
    """The twin of `Net.forward`, as a function of parameters and inputs."""

    def dense(params, x):
        y = x @ params["kernel"]
        return y + params["bias"] if "bias" in params else y

    def convolve(params, x, c: Conv):
        space = "HW"[-len(c.kernel) :]
        numbers = (f"NC{space}", f"{space}IO", f"NC{space}")
        y = lax.conv_general_dilated(
            x,
            jnp.asarray(params["kernel"]),
            c.stride,
            [(p, p) for p in c.padding],
            rhs_dilation=c.dilation,
            dimension_numbers=numbers,
            feature_group_count=c.groups,
        )
        return y + params["bias"].reshape(-1, *(1,) * len(c.kernel))

    def forward(params, x):
        if spec.convs:
            modules = [
                params["stem"],
                *(params["blocks"][str(n)]["conv"] for n in range(len(spec.convs) - 1)),
            ]
            for module, c in zip(modules, spec.convs, strict=True):
                x = jnp.tanh(convolve(module, x, c))
            norm = params["norm"]
            x = x.reshape(*x.shape[:2], -1)
            mean, var, scale, bias = (
                jnp.asarray(norm[n])[:, None] for n in ("mean", "var", "scale", "bias")
            )
            x = ((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias).mean(2)
        else:
            for n in range(3):
                layer = params["layers"][str(n)]
                x = jnp.tanh(dense(layer["mlp"], dense(layer["q"], x)))
        return dense(params["head"], jnp.tanh(dense(params["middle"], x)))

    return forward


def layouts(spec: Spec) -> dict[str, str]:
    """A 3-D kernel could be several things; these are Conv1d's."""
    return (
        dict.fromkeys(spec.conv_names, "kio")
        if spec.convs and len(spec.convs[0].kernel) == 1
        else {}
    )


@st.composite
def convs(draw, axes: int) -> tuple[Conv, ...]:
    """Convolutions that fit one after the other.

    Some grouped or depthwise, some of kernel 1 or (3, 1).
    """
    result: list[Conv] = []
    into = draw(st.sampled_from([2, 3, 4]))
    space = [7] * axes
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([n for n in (1, 1, 2, 3, 4) if into % n == 0]))
        out = groups * draw(st.integers(1, 3))
        kernel, stride, padding, dilation = [], [], [], []
        for axis in range(axes):
            kernel.append(draw(st.sampled_from([1, 2, 3])))
            dilation.append(draw(st.sampled_from([1, 1, 2])))
            padding.append(draw(st.integers(0, 2)))
            stride.append(draw(st.sampled_from([1, 1, 2])))
            reach = dilation[-1] * (kernel[-1] - 1) + 1
            if space[axis] + 2 * padding[-1] < reach:
                padding[-1] = reach
            space[axis] = (space[axis] + 2 * padding[-1] - reach) // stride[-1] + 1
        result.append(Conv(into, out, *map(tuple, (kernel, stride, padding, dilation)), groups))
        into = out
    return tuple(result)


specs = st.one_of(
    st.builds(Spec, width=st.integers(3, 7), convs=st.just(())),
    st.builds(Spec, width=st.just(0), convs=convs(1)),
    st.builds(Spec, width=st.just(0), convs=convs(2)),
)


@st.composite
def configs(draw, spec: Spec, second: bool = False) -> dict[str, Any]:
    """Keyword arguments of a LoHaConfig, PEFT's and ours.

    Those of a second adapter save no modules, and do not name them by "all-linear": PEFT would find
    the first one's copies of saved modules too.
    """
    names = [*spec.linears, *spec.conv_names]
    ends = sorted({name.rsplit(".", 1)[-1] for name in names} - {"head"})
    targets = draw(
        st.one_of(
            st.lists(st.sampled_from(ends), min_size=1, max_size=3, unique=True),
            st.lists(
                st.sampled_from([n for n in names if n != "head"]),
                min_size=1,
                max_size=3,
                unique=True,
            ),
            st.sampled_from([r".*\.[01]\..*", r"(stem|middle|.*q)", r".*conv|middle"]),
            st.just(["middle"] if second else "all-linear"),
        )
    )
    pattern_keys = st.sampled_from(
        ["q", "conv", "middle", r"layers\.1\.q", "^stem", r"blocks\.0\.conv", "mlp"]
    )
    ranks = draw(st.lists(st.tuples(pattern_keys, st.integers(1, 3)), max_size=2))
    alphas = draw(st.lists(st.tuples(pattern_keys, st.sampled_from([0.5, 2, 6])), max_size=2))
    r = draw(st.integers(1, 4))
    kwargs: dict[str, Any] = {
        "target_modules": targets,
        "r": r,
        "alpha": draw(st.sampled_from([1, 2.5, r, 3 * r])),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alphas),
        "use_effective_conv2d": draw(st.booleans()),
        "exclude_modules": draw(
            st.sampled_from([None, None, ["middle"], r"layers\.2\..*|blocks\.1.*"])
        ),
        "modules_to_save": None
        if second
        else draw(st.sampled_from([None, ["head"], ["norm"], ["head", "norm"]])),
        "init_weights": False,
    }
    if draw(st.integers(0, 3)) == 0:
        kwargs |= {
            "layers_to_transform": draw(st.sampled_from([0, 1, [0, 2]])),
            "layers_pattern": "layers",
        }
    return kwargs


def torch_output(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(x)).numpy()


def plain_key(name: str) -> str:
    """A parameter's key in PEFT's files."""
    return name.replace(".default", "").replace("modules_to_save.", "")


def plain_cp(t1, w1a, w1b, t2, w2a, w2b, scale):
    """PEFT's weight with cores, for torch's own autograd.

    The gradient of PEFT 0.21.2 is wrong there (test_hadamard.py).
    """
    one = torch.einsum("ijkl,jr,ip->prkl", t1, w1b, w1a)
    return one * torch.einsum("ijkl,jr,ip->prkl", t2, w2b, w2a) * scale
