"""`fit` interrupted by SIGTERM, and resumed."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import optax
import pytest
from training_runs import (
    KEY,
    TX,
    adapted,
    assert_same,
    data,
    loss_fn,
    losses,
)

from loha_jax.train import fit


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
def test_interrupted_and_resumed(tmp_path, batches, tx, options):
    """Interrupted by SIGTERM and resumed is not interrupted."""
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
