"""A small model, its batches and its loss, for tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import loha_jax
from loha_jax import LoHaConfig

KEY = jax.random.key(0)
TX = optax.sgd(1e-1)
WIDTH, CLASSES = 8, 4


def adapted(dtype=jnp.float32, layers=0, **options):
    """A linear classifier whose biases are trained in full.

    A scan over a stack of layers comes first, if there are `layers`.
    """
    keys = jax.random.split(KEY, 3)
    base = {
        "out": {"kernel": jax.random.normal(keys[0], (WIDTH, CLASSES), dtype)},
        "shift": {"bias": jnp.zeros(CLASSES, dtype)},
    }
    if layers:
        base["layers"] = {
            "up": {"kernel": jax.random.normal(keys[1], (layers, WIDTH, WIDTH), dtype)}
        }
    targets = ["up"] if layers else ["out"]
    config = LoHaConfig(
        r=2,
        alpha=4,
        target_modules=targets,
        modules_to_save=["shift"],
        init_weights=False,
        **options,
    )
    return loha_jax.inject(
        base, config, key=keys[2], layouts={r"layers\.up": "sio"} if layers else None
    )


@loha_jax.adapt
def logits(params, x):
    if "layers" in params:
        x, _ = jax.lax.scan(
            lambda x, layer: (jnp.tanh(x @ layer["up"]["kernel"]), None), x, params["layers"]
        )
    return x @ params["out"]["kernel"] + params["shift"]["bias"]


def loss_fn(params, batch, key):
    scores = logits(params, batch["x"]).astype(jnp.promote_types(jnp.float32, batch["x"].dtype))
    accuracy = (scores.argmax(-1) == batch["y"]).mean()
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean(), {
        "accuracy": accuracy
    }


def data(count, dtype=np.float32, rows=8, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "x": random.normal(size=(rows, WIDTH)).astype(dtype),
            "y": random.integers(0, CLASSES, rows),
        }
        for _ in range(count)
    ]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def losses(*results):
    return [row["loss"] for result in results for row in result.history if "loss" in row]


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, seconds, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"
