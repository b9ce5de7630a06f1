"""One step of `fit`: parts of a batch, keys, dropout, dtypes, optimizers and compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import (
    CLASSES,
    KEY,
    TX,
    Compilations,
    adapted,
    assert_same,
    data,
    logits,
    loss_fn,
    losses,
)

import loha_jax
from loha_jax.train import fit


@pytest.fixture
def compilations():
    counter = Compilations()
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter._listen)


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


def test_bfloat16():
    """In bfloat16 the model computes in it and what is trained stays float32."""
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

        def value_fn(t, batch=batch):
            return loss_fn(loha_jax.combine(t, frozen), batch, KEY)[0]

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
