"""`loha_jax.train.fit` beside loops written by hand, interrupted, poisoned, in parts, on a mesh."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loha_jax
from loha_jax import LoHaConfig
from loha_jax.checkpoint import Checkpoints
from loha_jax.train import fit

KEY = jax.random.key(0)
TX = optax.sgd(1e-1)
WIDTH, CLASSES = 8, 4


def adapted(dtype=jnp.float32, layers=0, **options):
    """A linear classifier whose biases are trained whole, after a stack of layers that a scan runs."""
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


@pytest.fixture
def compilations():
    counter = Compilations()
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter._listen)


def test_it_is_the_loop_of_the_readme(x64):
    params, tx = adapted(jnp.float64), optax.adamw(1e-2)
    trainable, frozen = loha_jax.partition(params)
    opt_state, expected = tx.init(trainable), []
    gradient = jax.jit(
        jax.value_and_grad(
            lambda t, batch: loss_fn(loha_jax.combine(t, frozen), batch, KEY), has_aux=True
        )
    )
    for batch in data(10, np.float64):
        (loss, _), grads = gradient(trainable, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        expected.append(float(loss))
    result = fit(loss_fn, params, tx, data(10, np.float64), key=KEY)
    assert (result.step, result.stopped) == (10, "finished")
    np.testing.assert_allclose(losses(result), expected, rtol=1e-12)
    for got, want in zip(
        jax.tree.leaves((result.params, result.opt_state)),
        jax.tree.leaves((loha_jax.combine(trainable, frozen), opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_trains_as_the_whole_batch(parts, x64):
    tx, results = optax.adam(1e-2), []
    for accumulate in (1, parts):
        batches = data(10, np.float64)
        results.append(
            fit(loss_fn, adapted(jnp.float64), tx, batches, key=KEY, accumulate=accumulate)
        )
    whole, cut = results
    for row, expected in zip(cut.history, whole.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-12)
    for got, want in zip(jax.tree.leaves(cut.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_each_part_has_its_own_key():
    drawn = []

    def noisy(params, batch, key):
        jax.debug.callback(lambda x: drawn.append(float(x)), jax.random.uniform(key))
        return 0 * params["shift"]["bias"].copies["default"].sum() + batch["x"].mean()

    for accumulate in (1, 2):
        drawn.clear()
        fit(noisy, adapted(), optax.sgd(0.0), data(4), key=KEY, accumulate=accumulate)
        jax.effects_barrier()
        assert len(set(drawn)) == 4 * accumulate


def test_dropout_is_that_of_the_config_and_new_in_each_step():
    def whole_update(params, batch, key):
        (factors,) = params["out"]["kernel"].active_adapters
        rows = jnp.abs(factors.delta()).sum(1)  # one number per output
        return 0 * rows.sum(), {f"row{n}": row == 0 for n, row in enumerate(rows)}

    result = fit(
        whole_update,
        adapted(rank_dropout=0.5),
        optax.sgd(0.0),
        data(200, rows=2),
        key=KEY,
        accumulate=2,
    )
    dropped = np.array([[row[f"row{n}"] for n in range(CLASSES)] for row in result.history])
    assert set(dropped.ravel()) == {0, 0.5, 1}  # means of two parts, each with a draw of its own
    assert abs(dropped.mean() - 0.5) < 0.05
    assert len({tuple(row) for row in dropped}) > 30


def batches_from(position):
    yield from data(100)[position:]


@pytest.mark.parametrize(
    ("batches", "tx", "options"),
    [
        (
            data(100),
            optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(1e-2, 12)),
            {},
        ),
        (batches_from, optax.sgd(1e-2, 0.9), {"accumulate": 2, "dtype": jnp.bfloat16}),
        (
            batches_from,
            optax.chain(optax.add_noise(0.1, 0.5, 3), optax.MultiSteps(optax.sgd(1e-2), 2)),
            {},
        ),
    ],
    ids=["schedule", "accumulated in bfloat16", "noise"],
)
def test_interrupted_by_sigterm_and_resumed_is_not_interrupted(tmp_path, batches, tx, options):
    params = adapted(rank_dropout=0.3, module_dropout=0.1)

    def interrupt(step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(key=7, **more):
        return fit(
            loss_fn, params, tx, batches, key=jax.random.key(key), steps=12, **options, **more
        )

    expected, before = run(), signal.getsignal(signal.SIGTERM)
    first = run(checkpoints=tmp_path, on_metrics=interrupt)
    assert first.stopped == "sigterm"
    assert 3 <= first.step <= 6
    assert signal.getsignal(signal.SIGTERM) == before
    second = run(key=8, checkpoints=tmp_path)  # a run that is resumed has its own key
    assert (second.step, second.stopped) == (12, "finished")
    assert losses(first, second) == losses(expected)
    assert [row["step"] for row in first.history + second.history] == list(range(1, 13))
    third = run(checkpoints=tmp_path)
    assert (third.step, third.history) == (12, [])
    for result in (second, third):
        assert_same((result.params, result.opt_state), (expected.params, expected.opt_state))


def test_more_steps_continue_a_finished_run(tmp_path):
    arguments = {"key": KEY}
    with Checkpoints(tmp_path) as checkpoints:
        for steps in (4, 9):
            result = fit(
                loss_fn, adapted(), TX, data(20), steps=steps, checkpoints=checkpoints, **arguments
            )
    assert_same(result.params, fit(loss_fn, adapted(), TX, data(20), steps=9, **arguments).params)


def test_a_second_sigterm_does_what_the_first_would_have_done():
    def twice(step, metrics):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(signum, frame):
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(InterruptedError):
            fit(loss_fn, adapted(), TX, data(9), key=KEY, on_metrics=twice)
        assert signal.getsignal(signal.SIGTERM) == stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sigterm_after_the_last_step_is_not_lost():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("here"))
    try:
        result = fit(
            loss_fn,
            adapted(),
            TX,
            data(3),
            key=KEY,
            evaluate=lambda params: os.kill(os.getpid(), signal.SIGTERM) or {},
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.stopped, came) == ("finished", ["here"])


def test_it_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(loss_fn, adapted(), TX, data(3), key=KEY))
    )
    thread.start()
    thread.join()
    assert results[0].step == 3


def loss_with_a_broken_gradient(params, batch, key):
    loss, metrics = loss_fn(params, batch, key)
    bias = params["shift"]["bias"].copies["default"]
    return loss + jnp.sqrt(((bias**2).sum() + 1e-3) * jnp.abs(batch["x"][0, 0])), metrics


@pytest.mark.parametrize(
    ("where", "accumulate", "shown"),
    [
        ("nan", 1, "nan"),
        ("inf", 2, "nan"),
        ("gradient", 2, r"\d.*gradient nan"),
        ("update", 1, r"\d.*gradient \d"),
    ],
    ids=["nan", "inf", "gradient", "update"],
)
def test_what_is_not_finite_stops_and_leaves_the_state_as_it_was(
    tmp_path, where, accumulate, shown
):
    loss, tx, batches = loss_fn, optax.adam(1e-2), data(12)
    if where == "gradient":
        loss = loss_with_a_broken_gradient
        batches[5]["x"][0, 0] = 0  # the argument of the root
    elif where == "update":
        tx = optax.chain(tx, optax.scale_by_schedule(lambda n: jnp.where(n == 5, jnp.inf, 1.0)))
    else:
        batches[5]["x"][3] = float(where)
    params, options = adapted(rank_dropout=0.2), {"key": KEY, "accumulate": accumulate}
    expected = fit(loss, params, tx, batches, steps=5, **options)
    with pytest.warns(RuntimeWarning, match=rf"Step 6 is not finite \(loss {shown}"):
        result = fit(loss, params, tx, batches, checkpoints=tmp_path, checkpoint_every=2, **options)
    assert (result.step, result.stopped) == (5, "nan")
    assert result.history == expected.history
    assert_same((result.params, result.opt_state), (expected.params, expected.opt_state))
    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.restore(params, tx.init(loha_jax.partition(params)[0]))
    assert saved.step == 5
    assert_same((saved.params, saved.opt_state), (expected.params, expected.opt_state))


def test_in_bfloat16_the_model_computes_in_it_and_what_is_trained_stays_float32():
    seen = {}

    def inspect(params, batch, key):
        seen["params"] = {
            jax.tree_util.keystr(p): x.dtype.name for p, x in jax.tree.leaves_with_path(params)
        }
        seen["batch"], seen["scores"] = batch["x"].dtype, logits(params, batch["x"]).dtype
        return loss_fn(params, batch, key)

    params, tx = adapted(), optax.sgd(1e-2, 0.9)
    result = fit(inspect, params, tx, data(20), key=KEY, dtype=jnp.bfloat16)
    for path, dtype in seen["params"].items():
        assert dtype == ("float32" if "hada" in path or "scaling" in path else "bfloat16"), path
    assert seen["batch"] == seen["scores"] == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves((result.params, result.opt_state[0].trace))} == {
        "float32"
    }
    frozen = [loha_jax.partition(p)[1] for p in (params, result.params)]
    assert_same(*frozen)
    full = fit(loss_fn, params, tx, data(20), key=KEY)
    np.testing.assert_allclose(losses(result), losses(full), rtol=2**-6)
    assert losses(result) != losses(full)


def test_nothing_is_compiled_after_the_first_step(tmp_path, compilations):
    counts = {}
    quality = jax.jit(lambda params: logits(params, data(1)[0]["x"]).mean())
    batches = data(40)

    def count(step, metrics):
        counts[step] = compilations.count

    options = {
        "evaluate": lambda params: {"quality": quality(params)},
        "on_metrics": count,
        "checkpoints": tmp_path,
    }
    options |= {
        "key": KEY,
        "eval_every": 5,
        "checkpoint_every": 5,
        "accumulate": 2,
        "dtype": jnp.bfloat16,
    }
    fit(loss_fn, adapted(rank_dropout=0.5), TX, batches, steps=20, **options)
    assert (
        counts[20] == counts[6]
    )  # the first evaluation and the first checkpoint came after step 5
    fit(loss_fn, adapted(rank_dropout=0.5), TX, batches, steps=40, **options)
    assert counts[40] == counts[21]


def test_each_shape_of_a_batch_is_compiled_once(compilations):
    counts = []
    shapes = [8, 8, 8, 4, 4, 4, 8, 4, 8, 4, 8, 4]
    batches = [data(1, rows=rows)[0] for rows in shapes]
    fit(
        loss_fn,
        adapted(),
        TX,
        batches,
        key=KEY,
        on_metrics=lambda *_: counts.append(compilations.count),
    )
    assert counts[-1] - counts[0] == 1


def test_metrics_are_read_steps_after_they_were_started():
    order = []

    def batches(position):
        for n, batch in enumerate(data(6), 1):
            order.append(f"start {n}")
            yield batch

    fit(
        loss_fn,
        adapted(),
        TX,
        batches,
        key=KEY,
        on_metrics=lambda step, _: order.append(f"read {step}"),
    )
    assert order.index("read 1") > order.index("start 3")
    assert [x for x in order if x.startswith("read")] == [f"read {n}" for n in range(1, 7)]


def test_evaluation_is_recorded_and_may_keep_what_it_gets(tmp_path):
    kept, params = [], adapted()

    def evaluate(params):
        kept.append(params)
        return {"loss": loss_fn(params, data(1)[0], KEY)[0]}

    result = fit(loss_fn, params, TX, data(10), key=KEY, evaluate=evaluate, eval_every=4)
    found = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert list(found) == [4, 8, 10]
    for tree, loss in zip(kept, found.values(), strict=True):
        assert float(loss_fn(tree, data(1)[0], KEY)[0]) == loss
    assert_same(kept[0], fit(loss_fn, params, TX, data(4), key=KEY).params)
    assert_same(kept[2], result.params)
    assert set(result.seconds) == {"train", "compile", "evaluate", "save"}
    assert all(seconds >= 0 for seconds in result.seconds.values())


def test_the_best_checkpoint_is_kept(tmp_path):
    accuracies = iter([0.5, 0.9, 0.7, 0.6])
    with Checkpoints(
        tmp_path, keep=1, best="eval_accuracy", best_mode="max", keep_best=1
    ) as checkpoints:
        result = fit(
            loss_fn,
            adapted(),
            TX,
            data(8),
            key=KEY,
            evaluate=lambda params: {"accuracy": next(accuracies)},
            eval_every=2,
            checkpoints=checkpoints,
            checkpoint_every=2,
        )
        best = checkpoints.restore(result.params, result.opt_state, step=4)
    assert best.metrics["eval_accuracy"] == 0.9
    assert_same(best.params, fit(loss_fn, adapted(), TX, data(4), key=KEY).params)


ON_A_MESH = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import loha_jax
from loha_jax.train import fit
from test_loop import KEY, Compilations, adapted, data, loss_fn, losses

params, compilations = adapted(layers=2, rank_dropout=0.2), Compilations()
alone = fit(loss_fn, params, optax.adam(1e-2), data(8, rows=32), key=KEY, accumulate=2)


def on(mesh, kernel, batches, **options):
    counts = []
    kernel = jax.device_put(params["layers"]["up"]["kernel"].kernel, kernel and NamedSharding(mesh, kernel))
    config = params["layers"]["up"]["kernel"].adapters["default"].config
    base = {"layers": {"up": {"kernel": kernel}}, "out": params["out"], "shift": {"bias": np.zeros(4, np.float32)}}
    tree = loha_jax.inject(base, config, key=jax.random.split(KEY, 3)[2], layouts={r"layers\\.up": "sio"})
    options |= {"key": KEY, "accumulate": 2, "on_metrics": lambda *_: counts.append(compilations.count)}
    result = fit(loss_fn, tree, optax.adam(1e-2), batches, **options)
    np.testing.assert_allclose(losses(result), losses(alone), rtol=1e-5)
    assert counts[0] == counts[-1], counts
    f, mu = (tree["layers"]["up"]["kernel"].adapters["default"] for tree in (result.params, result.opt_state[0].mu))
    assert mu.hada_w1_b.sharding == f.hada_w1_b.sharding
    return f


for types in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    rows = NamedSharding(mesh, P("data"))
    assert on(mesh, None, data(8, rows=32), sharding=rows).hada_w1_a.sharding.spec == P()
    on(mesh, None, jax.device_put(data(8, rows=32), rows))
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
factors = on(mesh, P(None, "data", "model"), data(8, rows=32), sharding=NamedSharding(mesh, P("data")))
assert factors.hada_w1_a.sharding.spec == P(None, "model", None), factors.hada_w1_a.sharding
assert factors.hada_w1_b.sharding.spec == P(None, None, "data"), factors.hada_w1_b.sharding
"""


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_run_and_every_array_stays_where_it_was():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_log_every_gives_means():
    single = fit(loss_fn, adapted(), TX, data(10), key=KEY)
    means = fit(loss_fn, adapted(), TX, data(10), key=KEY, log_every=4)
    assert [row["step"] for row in means.history] == [4, 8, 10]
    for row, part in zip(means.history, np.split(np.array(losses(single)), [4, 8]), strict=True):
        assert row["loss"] == pytest.approx(part.mean())


def test_it_ends_where_the_batches_end_and_shows_nothing_without_a_terminal(capsys):
    result = fit(loss_fn, adapted(), TX, data(5), key=KEY, steps=100)
    assert (result.step, result.stopped, capsys.readouterr()) == (5, "finished", ("", ""))


def test_there_is_a_bar_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    fit(loss_fn, adapted(), TX, data(5), key=KEY)
    shown = capsys.readouterr().out
    assert "5/5" in shown
    assert "loss " in shown
    fit(loss_fn, adapted(), TX, data(5), key=KEY, progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps is a number"),
        ({"accumulate": 0}, "accumulate is 1 or more, got 0"),
        (
            {"accumulate": 3},
            r"accumulate=3 splits batches into equal parts, but \['x'\] has 8 rows",
        ),
        ({"log_every": 0}, "log_every is 1 or more"),
        ({"eval_every": 2}, "needs evaluate="),
        ({"checkpoint_every": 2}, "needs checkpoints="),
        ({"dtype": jnp.float16}, "take bfloat16"),
        ({"dtype": jnp.int32}, "dtype is a floating dtype, got int32"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(loss_fn, adapted(), TX, data(5), key=KEY, **options)


@pytest.mark.parametrize(
    "metrics", [{"loss": 1.0}, {"rows": jnp.ones(3)}, [1.0]], ids=["name", "shape", "type"]
)
def test_metrics_are_scalars_with_names_of_their_own(metrics):
    with pytest.raises(ValueError, match=r"should be a scalar|returns the loss"):
        fit(lambda *a: (loss_fn(*a)[0], metrics), adapted(), TX, data(5), key=KEY)


def test_a_model_is_referred_to_its_own_optimizer():
    from flax import nnx

    with pytest.raises(TypeError, match=r"nnx\.Optimizer"):
        fit(loss_fn, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TX, data(5), key=KEY)


@pytest.mark.parametrize("name", ["lbfgs", "reduce_on_plateau"])
def test_optimizers_that_ask_for_the_loss_get_it(name):
    """Beside optax' own loop, written by hand."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, rtol=1.0)
    tx = optax.lbfgs() if name == "lbfgs" else optax.chain(optax.sgd(0.1), plateau)
    params, batches = adapted(), data(3)
    result = fit(loss_fn, params, tx, batches, key=KEY, progress=False)
    trained, frozen = loha_jax.partition(params)
    state = tx.init(trained)
    for batch in batches:
        value_fn = lambda t, batch=batch: loss_fn(loha_jax.combine(t, frozen), batch, KEY)[0]  # noqa: E731
        value, grad = jax.value_and_grad(value_fn)(trained)
        updates, state = tx.update(grad, state, trained, value=value, grad=grad, value_fn=value_fn)
        trained = optax.apply_updates(trained, updates)
    for got, want in zip(
        *map(jax.tree.leaves, (loha_jax.partition(result.params)[0], trained)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max())


def test_an_optimizer_that_says_it_takes_more_than_it_does():
    """`sam` has the type for extra arguments and takes none."""
    tx = optax.contrib.sam(optax.sgd(0.1), optax.contrib.normalize(), sync_period=2)
    params, batches = adapted(), data(4)
    result = fit(loss_fn, params, tx, batches, key=KEY, progress=False)
    trained, frozen = loha_jax.partition(params)
    state = tx.init(trained)
    for batch in batches:
        grad = jax.grad(lambda t, batch=batch: loss_fn(loha_jax.combine(t, frozen), batch, KEY)[0])(
            trained
        )
        updates, state = tx.update(grad, state, trained)
        trained = optax.apply_updates(trained, updates)
    for got, want in zip(
        *map(jax.tree.leaves, (loha_jax.partition(result.params)[0], trained)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max())
