"""Ten thousand steps leave no array, program or tracer behind, and everything stays finite."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import loha_jax

RUN = """
import json, resource, sys
import jax, jax.numpy as jnp, numpy as np, optax
import loha_jax
from loha_jax.train import fit

STEPS, WIDTH, CLASSES = int(sys.argv[1]), 16, 4
compiled, seen = [], {}
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
        event == "/jax/core/compile/backend_compile_duration" and compiled.append(1)
    )
)
keys = jax.random.split(jax.random.key(0), 4)
base = {
    "layers": {"up": {"kernel": jax.random.normal(keys[0], (3, WIDTH, WIDTH)) / 4}},
    "out": {"kernel": jax.random.normal(keys[1], (WIDTH, CLASSES)) / 4, "bias": jnp.zeros(CLASSES)},
    "norm": {"scale": jnp.ones(WIDTH)},
}
config = loha_jax.LoHaConfig(
    r=2,
    target_modules=["up", "out"],
    modules_to_save=["norm"],
    rank_dropout=0.1,
    module_dropout=0.1,
)
params = loha_jax.inject(base, config, key=keys[2], layouts={r"layers\\.up": "sio"})
truth = np.random.default_rng(0).normal(size=(WIDTH, CLASSES))


@loha_jax.adapt
def logits(params, x):
    x, _ = jax.lax.scan(
        lambda x, layer: (x + jnp.tanh(x @ layer["up"]["kernel"]), None), x, params["layers"]
    )
    return (x * params["norm"]["scale"]) @ params["out"]["kernel"] + params["out"]["bias"]


def loss_fn(params, batch, key):
    scores = logits(params, batch["x"])
    assert scores.dtype == jnp.bfloat16
    scores = scores.astype(jnp.float32)
    accuracy = (scores.argmax(-1) == batch["y"]).mean()
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean(), {
        "accuracy": accuracy
    }


def batches(position):
    while True:
        x = np.random.default_rng(position).normal(size=(16, WIDTH)).astype(np.float32)
        yield {"x": x, "y": (x @ truth).argmax(-1)}
        position += 1


held_out = next(batches(10**6))
quality = jax.jit(lambda params: (logits(params, held_out["x"]).argmax(-1) == held_out["y"]).mean())


def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def watch(step, metrics):
    if step % (STEPS // 10) or "loss" not in metrics:
        return
    seen[step] = {"resident": memory("VmRSS"), "compiled": len(compiled), **metrics}
    if step == STEPS // 5:  # from here on, what the process may write to grows by no more than this
        ceiling = memory("VmData") + 16 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, resource.RLIM_INFINITY))


result = fit(
    loss_fn,
    params,
    optax.adamw(3e-3),
    batches,
    key=keys[3],
    steps=STEPS,
    accumulate=2,
    dtype=jnp.bfloat16,
    evaluate=lambda params: {"accuracy": quality(params)},
    eval_every=STEPS // 10,
    log_every=100,
    on_metrics=watch,
)
finite = all(np.isfinite(x).all() for x in jax.tree.leaves((result.params, result.opt_state)))
print(
    json.dumps(
        {
            "seen": seen,
            "step": result.step,
            "stopped": result.stopped,
            "seconds": result.seconds,
            "finite": finite,
            "losses": [row["loss"] for row in result.history if "loss" in row],
        }
    )
)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_ten_thousand_steps_leave_nothing_behind():
    steps = 10_000
    environment = {**os.environ, "JAX_CHECK_TRACER_LEAKS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(steps)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    seen = {int(step): row for step, row in found["seen"].items()}
    print(
        {
            step: (f"{row['resident'] / 2**20:.1f} MiB", row["compiled"], row["loss"])
            for step, row in seen.items()
        }
    )
    print(found["seconds"])
    assert (found["step"], found["stopped"], found["finite"]) == (steps, "finished", True)
    assert found["losses"][-1] < 0.7 * found["losses"][0]
    assert seen[steps]["compiled"] == seen[2000]["compiled"]  # after the first evaluation
    assert seen[steps]["resident"] - seen[2000]["resident"] < 2**20


@pytest.mark.parametrize("strategy", ["factored", "fused", "dense"])
@pytest.mark.parametrize("config", [loha_jax.LoHaConfig, loha_jax.LycorisConfig])
def test_no_rule_of_differentiation_holds_a_tracer(config, strategy):
    """A scan over layers, a convolution and a lookup, with all that LyCORIS adds.

    The tracers of the scan end with it.
    """
    options = {
        "use_effective_conv2d": True,
        "rank_dropout": 0.1,
        "target_modules": ["up", "conv", "table"],
    }
    if config is loha_jax.LycorisConfig:
        options |= {"weight_decompose": True, "use_scalar": True}
    base = {
        "table": {"embedding": jnp.ones((5, 8))},
        "layers": {"up": {"kernel": jnp.ones((3, 8, 8))}},
        "conv": {"kernel": jnp.ones((3, 3, 8, 2))},
    }
    layouts = {r"layers\.up": "sio", "conv": "kkio"}
    params = loha_jax.inject(base, config(r=2, **options), key=jax.random.key(0), layouts=layouts)

    def fn(params, ids):
        x = jnp.asarray(params["table"]["embedding"])[ids]
        x, _ = jax.lax.scan(
            lambda x, layer: (x + jax.nn.gelu(x @ layer["up"]["kernel"]), None), x, params["layers"]
        )
        kernel = jnp.asarray(params["conv"]["kernel"])
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        ).sum()

    trainable, frozen = loha_jax.partition(params)

    def loss(trainable, key):
        return loha_jax.adapt(fn, strategy=strategy)(
            loha_jax.dropout(loha_jax.combine(trainable, frozen), key),
            jnp.zeros((2, 4, 4), jnp.int32),
        )

    with jax.checking_leaks():
        jax.jit(jax.grad(loss)).trace(trainable, jax.random.key(1))
