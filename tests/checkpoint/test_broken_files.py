import shutil
import warnings

import jax
import pytest
from checkpoint_trees import assert_same_bits, bits, dense, saved, start

from loha_jax import checkpoint
from loha_jax.checkpoint import Checkpoints
from loha_jax.interop import FileError


def files_of_a_checkpoint(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damages(size):
    yield "empty", lambda data: b""
    yield "half", lambda data: data[: size // 2]
    yield "longer", lambda data: data + b"\0"
    yield "zeros", lambda data: bytes(size)
    yield "deleted", lambda data: None
    for n in range(8):  # a bit each, spread over the file
        at = (2 * n + 1) * size // 16
        yield (
            f"bit of byte {at}",
            lambda data, at=at, n=n: data[:at] + bytes([data[at] ^ (1 << n)]) + data[at + 1 :],
        )


@pytest.mark.slow
def test_broken_files_never_give_wrong_values(tmp_path):
    """Whatever is broken gives the earlier checkpoint or the right values."""
    states = saved(tmp_path / "whole", 1, 2, metrics={"loss": 1.5})
    params, opt_state = start()
    fell_back = set()
    for name in files_of_a_checkpoint(tmp_path / "whole" / "2"):
        data = (tmp_path / "whole" / "2" / name).read_bytes()
        for kind, damage in damages(len(data)):
            folder = tmp_path / "broken"
            shutil.copytree(tmp_path / "whole", folder)
            path = folder / "2" / name
            path.unlink() if (broken := damage(data)) is None else path.write_bytes(broken)
            with (
                warnings.catch_warnings(record=True) as caught,
                Checkpoints(folder, best="loss") as checkpoints,
            ):
                warnings.simplefilter("always")
                restored = checkpoints.restore(params, opt_state)
            messages = [str(w.message) for w in caught]
            assert restored.step == (1 if messages else 2), (name, kind)
            assert all(
                f"The checkpoint of step 2 ({folder / '2'}) is corrupted: " in m for m in messages
            ), (name, kind)
            if messages:
                fell_back.add(name.parts[0])
                with (
                    Checkpoints(folder) as checkpoints,
                    pytest.raises(FileError, match=r"step 2 .* is corrupted"),
                ):
                    checkpoints.restore(params, opt_state, step=2)
            assert_same_bits((restored.params, restored.opt_state), states[restored.step])
            assert bits(restored.key) == bits(jax.random.key(restored.step))
            assert (restored.data, restored.metrics) == ({"batch": restored.step}, {"loss": 1.5})
            shutil.rmtree(folder)
    assert fell_back == {"state", "description"}


def test_every_number_of_the_description_is_protected(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "1" / "description" / "description.json"
    text = path.read_text()
    for old, new in (
        ('"batch": 1', '"batch": 2'),
        ('"r": 2', '"r": 3'),
        ('"step": 1', '"step": 7'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with (
            pytest.raises(FileError, match="is not as it was written"),
            pytest.warns(UserWarning, match="is skipped"),
        ):
            checkpoint.restore(tmp_path, dense())


def test_values_that_changed_without_a_trace_are_found(tmp_path):
    """Whole files, of another checkpoint of the same run: nothing but the digests can tell."""
    states = saved(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "3" / "state")
    shutil.copytree(tmp_path / "2" / "state", tmp_path / "3" / "state")
    with pytest.warns(
        UserWarning, match=r"step 3 .* the values of .*hada_w1_a.* are not those that were saved"
    ):
        restored = checkpoint.restore(tmp_path, *start())
    assert restored.step == 2
    assert_same_bits(restored.params, states[2][0])
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "2").rename(tmp_path / "5")
    with pytest.warns(UserWarning, match="is of step 2"):
        assert checkpoint.restore(tmp_path, dense()).step == 1


def test_where_all_are_broken_the_error_lists_them(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "state")
    with (
        pytest.raises(FileError, match="holds no intact checkpoint") as raised,
        pytest.warns(UserWarning, match="is corrupted"),
    ):
        checkpoint.restore(tmp_path, *start())
    assert all(f"The checkpoint of step {n}" in str(raised.value) for n in (1, 2))


def test_a_half_written_checkpoint(tmp_path):
    """A half written checkpoint is left out and removed by the next save."""
    saved(tmp_path, 1, 2)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(unfinished)
    params, opt_state = start()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=f"{unfinished} is unfinished"):
            assert checkpoints.restore(params, opt_state).step == 1
        assert unfinished.exists()
        checkpoints.save(2, params, opt_state)
        checkpoints.wait()
        assert not unfinished.exists()
        assert checkpoints.restore(params, opt_state).step == 2


def test_a_broken_checkpoint_is_replaced_and_does_not_count(tmp_path):
    states = saved(tmp_path, 1, 2, 3, metrics={"loss": 1.0})
    params, opt_state = start()
    for step in (2, 3):
        (tmp_path / str(step) / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:
        assert checkpoints.best_step == 3
        with pytest.warns(UserWarning, match="is corrupted"):
            assert checkpoints.restore(params, opt_state).step == 1
        assert checkpoints.best_step == 1
        checkpoints.save(
            2, *states[2], metrics={"loss": 2.0}
        )  # 1 is the best, 2 the latest, 3 still ahead
        checkpoints.wait()
        assert checkpoints.all_steps == [1, 2, 3]
        checkpoints.save(4, *states[3], metrics={"loss": 3.0})
        checkpoints.wait()
        assert checkpoints.all_steps == [1, 4]
        assert_same_bits(checkpoints.restore(params, opt_state, step=1).params, states[1][0])
