import multiprocessing
import random
import time

import jax
import numpy as np
import pytest
from checkpoint_writer import trees, write

import loha_jax
from loha_jax.checkpoint import Checkpoints
from loha_jax.interop import FileError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is unfinished")
def test_killed_processes_leave_whole_checkpoints(tmp_path, request):
    """A process is killed at any moment, and the latest checkpoint is whole.

    It is at least the last that was reported finished, and holds what was saved for it.
    """
    kills = request.config.getoption("checkpoint_kills", 8)
    draw = random.Random(request.config.getoption("checkpoint_seed", 0))
    config = loha_jax.LoHaConfig(r=4, target_modules=["q", "v"], init_weights=False)
    params = loha_jax.inject(
        {n: np.ones((256, 128), np.float32) for n in "qv"}, config, key=jax.random.key(0)
    )
    template = jax.tree.map(np.asarray, params)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["checkpoint_writer", "orbax.checkpoint"])
    finished = half_written = half_deleted = 0
    for _ in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=write, args=(str(tmp_path), template, sender))
        child.start()
        sender.close()
        finished = receiver.recv()
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        child.join()
        while receiver.poll():
            try:
                finished = receiver.recv()
            except EOFError:
                break
        half_written += any("tmp" in path.name for path in tmp_path.iterdir())
        with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
            latest = checkpoints.restore(*trees(template, 0))
            assert latest.step >= finished
            for step in checkpoints.all_steps:
                try:
                    restored = checkpoints.restore(*trees(template, 0), step=step)
                except FileError:  # an old one, of which half is deleted
                    assert step < latest.step
                    half_deleted += 1
                    continue
                assert (restored.step, restored.data) == (step, {"step": step})
                found, saved = (
                    jax.tree.leaves((restored.params, restored.opt_state)),
                    trees(template, step),
                )
                for a, b in zip(found, jax.tree.leaves(saved), strict=True):
                    np.testing.assert_array_equal(a, b)
    print(
        f"{kills} kills up to step {latest.step}: {half_written} left a half-written folder, "
        f"{half_deleted} found an "
        "old checkpoint half deleted"
    )
