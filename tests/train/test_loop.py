"""`loha_jax.train.fit` beside loops written by hand, interrupted, poisoned, in parts, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import KEY, TX, adapted, assert_same, data, loss_fn, losses

import loha_jax
from loha_jax.checkpoint import Checkpoints
from loha_jax.train import fit


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


def test_more_steps_continue_a_finished_run(tmp_path):
    arguments = {"key": KEY}
    with Checkpoints(tmp_path) as checkpoints:
        for steps in (4, 9):
            result = fit(
                loss_fn, adapted(), TX, data(20), steps=steps, checkpoints=checkpoints, **arguments
            )
    assert_same(result.params, fit(loss_fn, adapted(), TX, data(20), steps=9, **arguments).params)


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
def test_what_is_not_finite_stops(tmp_path, where, accumulate, shown):
    """Training stops at a value that is not finite and leaves the state as it was."""
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


def test_a_model_is_referred_to_its_own_optimizer():
    from flax import nnx

    with pytest.raises(TypeError, match=r"nnx\.Optimizer"):
        fit(loss_fn, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TX, data(5), key=KEY)
