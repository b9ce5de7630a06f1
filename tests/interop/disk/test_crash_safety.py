"""Writers that are killed, meet a full disk, or may not write.

The old result or the new one is whole.

Each writer is killed KILL_CASES times (an environment variable; 3 by default), half of them before
an operation on a file that is drawn from all, half at random moments.
"""

import json
import os
import subprocess
import sys

import crash_writers
import pytest
from crash_writers import WRITERS, tree

from loha_jax import LoHaConfig, interop
from loha_jax.interop.disk import atomic
from loha_jax.interop.disk import paired_files as adapter_folder
from loha_jax.interop.disk.resumable_folder import WorkingFolder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    command = [
        sys.executable,
        crash_writers.__file__,
        str(folder),
        os.environ.get("KILL_CASES", "3"),
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_any_moment(results, writer):
    result = results["kill"][writer]
    assert not result["problems"]
    assert result["killed"]


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(results, writer):
    result = results["full disk"][writer]
    assert not result["problems"]
    assert result["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_read_only_folder(results, writer):
    assert not results["read-only"][writer]["problems"]


def abandoned(folder, name):
    return folder / f".{name}.abcd1234.tmp"


def test_leftovers_of_killed_processes(tmp_path):
    """Leftovers of a killed process are removed; files of a living one are not."""
    path = tmp_path / "a.bin"
    abandoned(tmp_path, "a.bin").write_bytes(b"half")
    abandoned(tmp_path, "b.bin").write_bytes(b"another's")
    with atomic.TemporaryFile(path) as living:
        atomic.write_atomically(path, b"new")
        assert len(list(tmp_path.glob(".a.bin.*.tmp"))) == 1
        living.move_into_place()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.bin.abcd1234.tmp", "a.bin"]


def test_the_old_result_is_restored_without_exchange(tmp_path, monkeypatch):
    """Without an exchange of names the old result is restored by the next write."""
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    out = tmp_path / "out"
    with atomic.temporary_folder(out) as work:
        (work / "new").mkdir()
        atomic.move_into_place(work / "new", out, force=False)
    (out / "old").touch()
    with atomic.temporary_folder(out) as work:
        (work / "new").write_text("new")
        atomic.move_into_place(work / "new", out, force=True)
        assert out.read_text() == "new"
        (work / "new").mkdir()
        monkeypatch.setattr(atomic.os, "rename", fail_at(2, os.rename))
        with pytest.raises(OSError, match="the disk is gone"):
            atomic.move_into_place(work / "new", out, force=True)
        assert out.read_text() == "new"
    monkeypatch.setattr(atomic.os, "rename", os.rename)
    for place in (
        abandoned(tmp_path, "out"),
        tmp_path / ".out.merging",
    ):  # what a kill between the renames leaves
        place.mkdir()
        out.rename(place / "replaced")
        if place.name.endswith(".merging"):
            with WorkingFolder(out, "") as work:
                assert work.files.is_dir()
        else:
            atomic.remove_abandoned(out)
        assert out.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def fail_at(count, call):
    calls = 0

    def run(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            raise OSError("the disk is gone")
        return call(*arguments)

    return run


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_file_that_another_process_adds(tmp_path, monkeypatch, exchanges):
    """A file that another process adds in the last moment is kept."""
    folder, exchange = tmp_path / "a", atomic.exchange
    interop.save_peft(folder, tree(1))

    def late(new, old):
        (folder / "theirs").write_text("kept")
        return exchange(new, old) if exchanges else False

    monkeypatch.setattr(adapter_folder, "exchange", late)
    interop.save_peft(folder, tree(2))
    assert (folder / "theirs").read_text() == "kept"
    assert LoHaConfig.from_pretrained(folder).alpha == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_pending_files(tmp_path):
    """Pending files are read finished by the next save and refused by PEFT."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "a"
    for version in (1, 2):
        interop.save_peft(tmp_path / str(version), tree(version))
    interop.save_peft(folder, tree(1))
    pending = folder / adapter_folder.PENDING
    pending.mkdir()  # as a kill after the first move leaves it
    (folder / "adapter_config.json").unlink()
    os.replace(tmp_path / "2" / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    os.replace(tmp_path / "2" / "adapter_config.json", pending / "adapter_config.json")
    base = {"q": {"kernel": tree(1)["q"]["kernel"].kernel}}
    factors = interop.load_peft(folder, base)["q"]["kernel"].adapters["default"]
    wanted = tree(2)["q"]["kernel"].adapters["default"]
    assert factors.alphas == (2.0,)
    assert (factors.hada_w1_a == wanted.hada_w1_a).all()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        peft.PeftConfig.from_pretrained(str(folder))
    interop.save_peft(folder, tree(2))
    assert peft.PeftConfig.from_pretrained(str(folder)).alpha == 2
    assert not pending.exists()


def test_the_current_folder_stays_the_same_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    for version in (1, 2, 2):
        interop.save_peft(".", tree(version))
    assert tmp_path.stat().st_ino == before
    assert LoHaConfig.from_pretrained(".").alpha == 2
    assert sorted(os.listdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for version in (1, 2):
        interop.save_peft(tmp_path / "link", tree(version))
    assert (tmp_path / "link").is_symlink()
    assert LoHaConfig.from_pretrained(tmp_path / "real").alpha == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_an_authors_model_card_and_the_folders_mode_stay(tmp_path):
    folder = tmp_path / "a"
    interop.save_peft(folder, tree(1))
    (folder / "README.md").write_text("mine")
    folder.chmod(0o750)
    interop.save_peft(folder, tree(2))
    assert (folder / "README.md").read_text() == "mine"
    assert folder.stat().st_mode & 0o777 == 0o750
