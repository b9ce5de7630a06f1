"""The history and the progress bar of `fit`."""

import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import KEY, TX, adapted, data, loss_fn, losses

from loha_jax.train import fit


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


def test_log_every_gives_means():
    single = fit(loss_fn, adapted(), TX, data(10), key=KEY)
    means = fit(loss_fn, adapted(), TX, data(10), key=KEY, log_every=4)
    assert [row["step"] for row in means.history] == [4, 8, 10]
    for row, part in zip(means.history, np.split(np.array(losses(single)), [4, 8]), strict=True):
        assert row["loss"] == pytest.approx(part.mean())


def test_it_ends_with_the_batches(capsys):
    """It ends where the batches end and shows nothing without a terminal."""
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
    "metrics", [{"loss": 1.0}, {"rows": jnp.ones(3)}, [1.0]], ids=["name", "shape", "type"]
)
def test_metrics_are_scalars_with_names_of_their_own(metrics):
    with pytest.raises(ValueError, match=r"should be a scalar|returns the loss"):
        fit(lambda *a: (loss_fn(*a)[0], metrics), adapted(), TX, data(5), key=KEY)
