"""`fit` on a mesh of eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ON_A_MESH = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import loha_jax
from loha_jax.train import fit
from training_runs import KEY, Compilations, adapted, data, loss_fn, losses

params, compilations = adapted(layers=2, rank_dropout=0.2), Compilations()
alone = fit(loss_fn, params, optax.adam(1e-2), data(8, rows=32), key=KEY, accumulate=2)


def on(mesh, kernel, batches, **options):
    counts = []
    kernel = jax.device_put(
        params["layers"]["up"]["kernel"].kernel, kernel and NamedSharding(mesh, kernel)
    )
    config = params["layers"]["up"]["kernel"].adapters["default"].config
    base = {
        "layers": {"up": {"kernel": kernel}},
        "out": params["out"],
        "shift": {"bias": np.zeros(4, np.float32)},
    }
    tree = loha_jax.inject(
        base, config, key=jax.random.split(KEY, 3)[2], layouts={r"layers\\.up": "sio"}
    )
    options |= {
        "key": KEY,
        "accumulate": 2,
        "on_metrics": lambda *_: counts.append(compilations.count),
    }
    result = fit(loss_fn, tree, optax.adam(1e-2), batches, **options)
    np.testing.assert_allclose(losses(result), losses(alone), rtol=1e-5)
    assert counts[0] == counts[-1], counts
    f, mu = (
        tree["layers"]["up"]["kernel"].adapters["default"]
        for tree in (result.params, result.opt_state[0].mu)
    )
    assert mu.hada_w1_b.sharding == f.hada_w1_b.sharding
    return f


for types in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    rows = NamedSharding(mesh, P("data"))
    assert on(mesh, None, data(8, rows=32), sharding=rows).hada_w1_a.sharding.spec == P()
    on(mesh, None, jax.device_put(data(8, rows=32), rows))
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
factors = on(
    mesh, P(None, "data", "model"), data(8, rows=32), sharding=NamedSharding(mesh, P("data"))
)
assert factors.hada_w1_a.sharding.spec == P(None, "model", None), factors.hada_w1_a.sharding
assert factors.hada_w1_b.sharding.spec == P(None, None, "data"), factors.hada_w1_b.sharding
"""


@pytest.mark.slow
def test_on_a_mesh():
    """On a mesh it is the same run and every array stays where it was."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(Path(__file__).parents[1] / "helpers"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
