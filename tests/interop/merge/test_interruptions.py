import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from merge_inputs import (
    BF16,
    delta,
    files_in,
    loha,
    merge_some_modules,
    normal,
    read_all,
    sharded_base,
    stop_at_the_end,
    write_adapter,
    write_base,
)
from safetensors.numpy import load_file, save_file

from loha_jax.interop.merge import files as merge_files
from loha_jax.interop.merge import shard as merge_shard
from loha_jax.interop.merge.files import merge_checkpoint


def test_what_is_there_is_replaced_only_with_force(tmp_path):
    path = write_base(tmp_path / "base", {"q.weight": normal(6, 4)})
    adapter = [(write_adapter(tmp_path / "adapter", {"q": loha(6, 4)}), 1.0)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="`force=True`"):
        merge_checkpoint(path, adapter, out)
    assert files_in(out) == ["mine.txt"]
    merge_checkpoint(path, adapter, out, force=True)
    assert files_in(out) == ["model.safetensors"]
    assert files_in(tmp_path) == ["adapter", "base", "out"]
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=r"is, or holds, .*, which would be replaced"):
            merge_checkpoint(path, adapter, place, force=True)


def test_one_run_at_a_time(tmp_path):
    path = write_base(tmp_path / "base", {"q.weight": normal(6, 4)})
    adapter = [(write_adapter(tmp_path / "adapter", {"q": loha(6, 4)}), 1.0)]

    def second(done, total):
        with pytest.raises(FileExistsError, match="Another run is writing"):
            merge_checkpoint(path, adapter, tmp_path / "out")

    merge_checkpoint(path, adapter, tmp_path / "out", progress=second)
    assert (tmp_path / "out").is_dir()


def test_a_disk_that_is_too_small_is_seen_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_files.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"takes .* GB more"):
        merge_some_modules(tmp_path)
    assert files_in(tmp_path) == ["adapter", "base"]


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """A disk that fills up leaves no result and the next run goes on."""
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter = [(write_adapter(tmp_path / "adapter", modules), 1.0)]
    written = 0
    real = merge_shard.write_at

    def write(descriptor, place, data):
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, place, data)

    monkeypatch.setattr(merge_shard, "write_at", write)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoint(path, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.merging" / "files").glob(".*"))  # nothing that is not whole
    monkeypatch.setattr(merge_shard, "write_at", real)
    report = merge_checkpoint(path, adapter, tmp_path / "out")
    assert report.kept
    check_merged(tmp_path / "out", base, modules)
    assert files_in(tmp_path) == ["adapter", "base", "out"]


def check_merged(out, base, modules, weight=1.0):
    merged = read_all(out)
    assert merged.keys() == base.keys()
    for key, value in merged.items():
        module = modules.get(key.removesuffix(".weight"))
        if module is None:
            assert value.tobytes() == base[key].tobytes()
        else:
            wanted = base[key].astype(np.float64) + weight * delta(module, 2)
            np.testing.assert_allclose(value.astype(np.float64), wanted, rtol=2**-8, atol=1e-5)


KILLED = """
import os, signal, sys
from loha_jax.interop.merge import shard as merge_shard
from loha_jax.interop.merge.files import merge_checkpoint
merge_shard._BLOCK = 1024
def progress(done, total):
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
merge_checkpoint(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], progress=progress)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_is_continued(tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter, out = write_adapter(tmp_path / "adapter", modules), tmp_path / "out"
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    finished = 0
    for share in (0.05, 0.4, 0.45, 0.93):
        command = [sys.executable, "-c", KILLED, path, adapter, out, str(int(share * total))]
        done = subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[3], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        now = len(list((tmp_path / ".out.merging" / "files").glob("*.safetensors")))
        assert now >= finished
        finished = now
    assert finished >= 2
    stamps = {
        p.name: p.stat().st_mtime_ns
        for p in (tmp_path / ".out.merging" / "files").glob("*.safetensors")
    }
    report = merge_checkpoint(path, [(adapter, 1.0)], out)
    assert len(report.kept) == finished
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    check_merged(out, base, modules)
    assert files_in(tmp_path) == ["adapter", "base", "out"]


@pytest.mark.parametrize("change", ["weight", "adapter", "base", "dtype"])
def test_shards_of_another_merge_are_not_kept(change, tmp_path):
    base, path = sharded_base(tmp_path)
    modules = {f"model.layers.{n}.q": loha(64, 48) for n in range(4)}
    adapter = write_adapter(tmp_path / "adapter", modules)

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(path, [(adapter, 1.0)], tmp_path / "out", progress=stop_at_the_end)
    assert list((tmp_path / ".out.merging" / "files").glob("*.safetensors"))
    weight, dtype = 1.0, None
    if change == "weight":
        weight = 0.5
    elif change == "dtype":
        dtype = BF16
    elif change == "adapter":
        file = adapter / "adapter_model.safetensors"
        state = load_file(file)
        state["base_model.model.model.layers.0.q.hada_w1_a"] *= 2
        modules["model.layers.0.q"]["hada_w1_a"] *= 2
        save_file(state, file)
    else:
        file = path / "model-00001-of-00004.safetensors"
        os.utime(file, ns=(1, 1))
    report = merge_checkpoint(path, [(adapter, weight)], tmp_path / "out", dtype=dtype)
    assert not report.kept
    check_merged(tmp_path / "out", base, modules, weight)
