import math

import pytest
from checkpoint_trees import dense, saved, start

from loha_jax import checkpoint
from loha_jax.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("options", "losses", "left", "best"),
    [
        ({"keep": 2}, [3, 1, 2, 5, 4], [3, 4], None),
        ({"keep": None}, [3, 1, 2], [0, 1, 2], None),
        ({"keep": 1, "best": "loss"}, [3, 1, 2, 5, 4], [1, 4], 1),
        ({"keep": 1, "best": "loss", "best_mode": "max"}, [3, 1, 2, 5, 4], [3, 4], 3),
        ({"keep": 1, "best": "loss", "keep_best": 2}, [3, 1, 2, 5, 4], [1, 2, 4], 1),
        ({"keep": 1, "best": "loss", "keep_best": 0}, [3, 1, 2], [2], 2),
        ({"keep": 1, "best": "loss"}, [math.nan, 2, math.nan, 3], [1, 3], 1),
        ({"keep": 1, "best": "loss", "best_mode": "max"}, [math.nan, 2, math.nan, 1], [1, 3], 1),
        ({"keep": 2, "best": "loss"}, [math.nan, math.nan, math.nan], [1, 2], None),
        ({"keep": 1, "best": "loss"}, [None, 2, None, None], [1, 3], 1),
        ({"keep": 1, "best": "loss"}, [2, 1, 1, 3], [2, 3], 2),
    ],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_the_latest_and_the_best_stay(tmp_path, options, losses, left, best, reopened):
    params = dense()
    checkpoints = Checkpoints(tmp_path, **options)
    for step, loss in enumerate(losses):
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, **options)
        checkpoints.save(step, params, metrics=None if loss is None else {"loss": loss})
    assert (checkpoints.all_steps, checkpoints.latest_step, checkpoints.best_step) == (
        left,
        left[-1],
        best,
    )
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert (checkpoints.all_steps, checkpoints.best_step) == (left, best)


def test_an_older_step_is_not_saved_over_later_ones(tmp_path):
    params, opt_state = start()
    saved(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 3):
            with pytest.raises(ValueError, match=r"holds checkpoints of .*3"):
                checkpoints.save(step, params, opt_state)
        checkpoints.save(4, params, opt_state)


def test_one_that_is_not_there(tmp_path):
    params = dense()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path / "none", params)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert (checkpoints.restore(params), checkpoints.latest_step, checkpoints.best_step) == (
            None,
            None,
            None,
        )
        checkpoints.save(1, params)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2; it has \[1\]"):
            checkpoints.restore(params, step=2)
