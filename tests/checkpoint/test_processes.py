import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_trees import KEY

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.checkpoint import Checkpoints

# --- while the next step runs ---


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    params = {"a": {"kernel": jnp.ones((2048, 2048))}}
    params = loha_jax.inject(
        params, LoHaConfig(r=16, target_modules=["a"], init_weights=False), key=KEY
    )
    trainable, frozen = loha_jax.partition(params)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
    expected = {}
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for n in range(5):
            expected[n] = jax.tree.map(lambda x: np.array(x, copy=True), trainable)
            checkpoints.save(n, loha_jax.combine(trainable, frozen), {"mu": trainable})
            trainable = step(trainable)
        for n in range(5):
            restored = checkpoints.restore(params, {"mu": loha_jax.partition(params)[0]}, step=n)
            for tree in (loha_jax.partition(restored.params)[0], restored.opt_state["mu"]):
                for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected[n]), strict=True):
                    np.testing.assert_array_equal(a, b)


# --- in new processes ---


def run(code, *arguments, devices=1):
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRAINING = """
import hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import loha_jax
from loha_jax.checkpoint import Checkpoints

assert "orbax" not in sys.modules

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (16, 32)) / 4},
    "down": {"kernel": jax.random.normal(jax.random.key(1), (32, 4)) / 6},
}
config = loha_jax.LoHaConfig(r=3, target_modules="all-linear", rank_dropout=0.25)
params = loha_jax.inject(params, config, key=jax.random.key(2))
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 20)))
trainable, frozen = loha_jax.partition(params)
state, key, at = tx.init(trainable), jax.random.key(3), 0
examples = np.random.default_rng(0).normal(size=(100, 8, 16)).astype(np.float32)
apply = loha_jax.adapt(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"])


@jax.jit
def step(trainable, state, key, x):
    def loss(trainable):
        return jnp.mean(
            (apply(loha_jax.dropout(loha_jax.combine(trainable, frozen), key), x) - 1) ** 2
        )

    value, gradients = jax.value_and_grad(loss)(trainable)
    updates, state = tx.update(gradients, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


losses = []
with Checkpoints(folder) as checkpoints:
    if (restored := checkpoints.restore(params, state)) is not None:
        trainable, state = loha_jax.partition(restored.params)[0], restored.opt_state
        key, at = restored.key, restored.data["at"]
        assert restored.step == first
    for n in range(first, last):
        key, used = jax.random.split(key)
        trainable, state, value = step(trainable, state, used, examples[at])
        at += 1
        losses.append(np.asarray(value).tobytes().hex())
    checkpoints.save(last, loha_jax.combine(trainable, frozen), state, key=key, data={"at": at})
leaves = jax.tree.leaves((trainable, state, jax.random.key_data(key)))
print(json.dumps([losses, [np.asarray(x).tobytes().hex() for x in leaves]]))
"""


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    losses, final = run(TRAINING, tmp_path / "straight", 0, 12)
    first, _ = run(TRAINING, tmp_path / "resumed", 0, 6)
    second, resumed = run(TRAINING, tmp_path / "resumed", 6, 12)
    assert len(set(losses)) == 12
    assert first + second == losses
    assert resumed == final


FULL_DISK = """
import json, resource, sys
import jax, jax.numpy as jnp
import loha_jax
from loha_jax.checkpoint import Checkpoints

config = loha_jax.LoHaConfig(r=8, target_modules=["a"])
params = loha_jax.inject({"a": jnp.ones((64, 64))}, config, key=jax.random.key(0))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
errors, steps = [], []
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, params)
    checkpoints.wait()
    for limit in (0, 100, 1000):  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            checkpoints.save(2, params)
            checkpoints.wait()
        except Exception as error:
            errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        steps.append([checkpoints.all_steps, checkpoints.restore(params, step=1).step])
    checkpoints.save(2, params)
    checkpoints.wait()
    steps.append([checkpoints.all_steps, checkpoints.restore(params).step])
print(json.dumps([errors, steps]))
"""


def test_a_full_disk(tmp_path):
    """A full disk is an error and the checkpoints before it stay."""
    errors, steps = run(FULL_DISK, tmp_path)
    assert len(errors) == 3
    assert all("too large" in error for error in errors), errors
    assert steps == [[[1], 1]] * 3 + [[[1, 2], 2]]


MESHES = """
import contextlib, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import loha_jax
from loha_jax.checkpoint import Checkpoints


def on(mesh, tree):
    def put(x):
        if mesh is None or x.ndim == 0:
            return x if mesh is None else jax.device_put(x, NamedSharding(mesh, P()))
        axes = [
            name if size % mesh.shape[name] == 0 else None
            for name, size in zip(mesh.axis_names, x.shape)
        ]
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    return jax.tree.map(put, tree)


devices = np.array(jax.devices())
meshes = [
    Mesh(devices.reshape(4, 2), ("fsdp", "tensor")),
    Mesh(devices.reshape(2, 4), ("fsdp", "tensor")),
    Mesh(devices, ("data",)),
    Mesh(devices[:2], ("fsdp",)),
    jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
    None,
]
params = {"q": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}, "bias": jnp.ones(8)}
config = loha_jax.LoHaConfig(r=4, target_modules=["q"], init_weights=False)
params = loha_jax.inject(params, config, key=jax.random.key(1))
tx = optax.adam(1e-2)
state = jax.tree.map(lambda x: x + 1, tx.init(loha_jax.partition(params)[0]))
fresh = jax.tree.map(lambda x: x * 0, loha_jax.partition(params)[0])
fresh = loha_jax.combine(fresh, loha_jax.partition(params)[1])


def context(mesh):
    return (
        jax.set_mesh(mesh) if mesh is not None and "a" in mesh.shape else contextlib.nullcontext()
    )


for n, source in enumerate(meshes):
    with context(source), Checkpoints(f"{sys.argv[1]}/{n}") as checkpoints:
        checkpoints.save(1, on(source, params), on(source, state))
    for target in (source, meshes[n - 1]):
        with context(target), Checkpoints(f"{sys.argv[1]}/{n}") as checkpoints:
            given, given_state = (
                on(target, fresh),
                on(target, tx.init(loha_jax.partition(fresh)[0])),
            )
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given_state
            )
            for wanted in (given_state, shapes) if target is not None else (given_state,):
                found = checkpoints.restore(given, wanted)
                for a, b, g in zip(
                    jax.tree.leaves((found.params, found.opt_state)),
                    jax.tree.leaves((params, state)),
                    jax.tree.leaves((given, given_state)),
                    strict=True,
                ):
                    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
                    assert a.sharding == g.sharding and a.committed == g.committed, (
                        a.sharding,
                        g.sharding,
                    )
                double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree))
                jax.block_until_ready(double((found.params, found.opt_state)))
print(json.dumps("done"))
"""


@pytest.mark.slow
def test_any_mesh_restores_what_any_mesh_saved(tmp_path):
    assert run(MESHES, tmp_path, devices=8) == "done"
