"""A small Transformer-like model on meshes, and what its compiled steps send between devices."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import loha_jax

WIDTH, HIDDEN, BATCH, LENGTH, R = 32, 64, 16, 8, 3

COLLECTIVE = re.compile(
    r"= (?P<shapes>.+?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)"
    r"(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A mesh and how a layer's kernels and the batch are split over it.

    The kernels are `[in, out]`, the batch is `[batch, length, width]`.
    """

    mesh: dict[str, int]
    up: P
    down: P
    batch: P
    kind: AxisType = AxisType.Auto

    def make_mesh(self):
        return jax.make_mesh(
            tuple(self.mesh.values()), tuple(self.mesh), axis_types=(self.kind,) * len(self.mesh)
        )


SETTINGS = {
    "data": Setting({"data": 8}, P(), P(), P("data")),
    "fsdp": Setting({"fsdp": 8}, P("fsdp"), P("fsdp"), P("fsdp")),
    "fsdp over out": Setting({"fsdp": 8}, P(None, "fsdp"), P(None, "fsdp"), P("fsdp")),
    "tensor": Setting({"tensor": 8}, P(None, "tensor"), P("tensor", None), P()),
    "data and tensor": Setting({"data": 4, "tensor": 2}, P(None, "tensor"), P("tensor"), P("data")),
    "fsdp and tensor": Setting(
        {"fsdp": 4, "tensor": 2}, P("fsdp", "tensor"), P("tensor", "fsdp"), P("fsdp")
    ),
    "data, fsdp and tensor": Setting(
        {"data": 2, "fsdp": 2, "tensor": 2},
        P("fsdp", "tensor"),
        P("tensor", "fsdp"),
        P(("data", "fsdp")),
    ),
    "sequence": Setting(
        {"data": 4, "tensor": 2}, P(None, "tensor"), P("tensor"), P("data", "tensor")
    ),
}


def init(key):
    keys = jax.random.split(key, 4)
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return {
        f"layer{n}": {
            name: {"kernel": jax.random.normal(keys[2 * n + m], shape) / math.sqrt(shape[0])}
            for m, (name, shape) in enumerate(shapes.items())
        }
        for n in range(2)
    }


def model(params, x):
    """Two residual layers.

    On explicit axes the second product says how its result is split, as it has to.
    """
    explicit = jax.typeof(x).sharding.spec if any(jax.typeof(x).sharding.spec) else None
    for n in range(2):
        layer = params[f"layer{n}"]
        h = jax.nn.gelu(jnp.einsum("bsd,df->bsf", x, layer["up"]["kernel"]))
        x = x + jnp.einsum("bsf,fd->bsd", h, layer["down"]["kernel"], out_sharding=explicit)
    return x


def place(params, setting, mesh):
    specs = {"up": setting.up, "down": setting.down}
    return {
        layer: {
            n: {"kernel": jax.device_put(w["kernel"], NamedSharding(mesh, specs[n]))}
            for n, w in kernels.items()
        }
        for layer, kernels in params.items()
    }


def adapter(**fields):
    return loha_jax.LoHaConfig(r=R, target_modules=["up", "down"], init_weights=False, **fields)


def collectives(compiled):
    """How often each collective occurs, by kind and number of elements that it gives a device."""
    found = collections.Counter()
    for match in COLLECTIVE.finditer(compiled.as_text()):
        for shape in re.findall(r"\w+\[([\d,]*)\]", match["shapes"]):
            found[match["kind"], math.prod(map(int, filter(None, shape.split(","))))] += 1
    return found
