"""Files on macOS and Windows, imitated by hiding the calls that they lack."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crash_results import files_of
from merge_inputs import files_in, stop_at_the_end
from peft_samples import Sample

from loha_jax import interop
from loha_jax.interop.commands.convert import convert_adapter
from loha_jax.interop.disk import atomic, resumable_folder, system
from loha_jax.interop.disk.base_checkpoint import Checkpoint
from loha_jax.interop.merge.files import merge_checkpoint

HIDDEN = {
    "linux": (),
    "macos": ("copy_file_range", "fdatasync", "O_DIRECT"),
    "windows": (
        *("copy_file_range", "fdatasync", "O_DIRECT", "pwrite", "pread", "preadv", "pwritev"),
        *("geteuid", "O_NOFOLLOW", "posix_fadvise", "sync"),
    ),
}
LINEAR = Sample("linear")
BASE = LINEAR.folder / "base.safetensors"


@pytest.fixture(params=HIDDEN)
def platform(request, monkeypatch):
    """The name of a system whose lacks are those of this process."""
    for name in HIDDEN[request.param]:
        monkeypatch.delattr(os, name, raising=False)
    if request.param != "linux":

        def no_library(*_, **__):
            raise AttributeError("renameat2")

        monkeypatch.setattr(system.ctypes, "CDLL", no_library)
    if request.param == "windows":
        monkeypatch.setattr(system, "fcntl", None)
        for module in (system, atomic, resumable_folder):
            monkeypatch.setattr(module, "IS_WINDOWS", True)
        imitate_windows(monkeypatch)
    return request.param


def open_files():
    """The files that this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue  # the listing itself
    return found


def imitate_windows(monkeypatch):
    """Descriptors of folders are missing, and open files stay in place.

    They are not renamed or removed, and folders are not renamed onto others.
    """
    real = {name: getattr(os, name) for name in ("open", "rename", "replace", "unlink")}

    def refuse_open(path):
        if any(file == str(path) or file.startswith(f"{path}{os.sep}") for file in open_files()):
            raise PermissionError(errno.EACCES, "used by another process", str(path))

    def open_(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return real["open"](path, *arguments, **options)

    def moved(name):
        def run(source, target, **options):
            refuse_open(os.path.realpath(source))
            refuse_open(os.path.realpath(target))
            if os.path.lexists(target) and (name == "rename" or os.path.isdir(target)):
                raise FileExistsError(errno.EEXIST, "it is there", str(target))
            real[name](source, target, **options)

        return run

    def unlink(path, **options):
        if "dir_fd" not in options:
            refuse_open(os.path.realpath(path))
        real["unlink"](path, **options)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "unlink", unlink)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, moved(name))
    monkeypatch.setattr(shutil, "rmtree", remove_tree)


def remove_tree(path, ignore_errors=False):
    """`shutil.rmtree` without descriptors of folders."""
    try:
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path, ignore_errors)
            else:
                try:
                    os.unlink(entry.path)
                except OSError:
                    if not ignore_errors:
                        raise
        os.rmdir(path)
    except OSError:
        if not ignore_errors:
            raise


def adapted(name):
    return interop.load_peft(Sample(name).adapter, Sample(name).params())


def test_adapters_are_saved_new_over_old_and_beside_other_files(platform, tmp_path):
    params, other = adapted("linear"), adapted("linear_bf16_base_fp32_adapter")
    interop.save_peft(tmp_path / "wanted", params)
    for folder in (tmp_path / "new", tmp_path / "old", tmp_path / "beside", tmp_path / "empty"):
        if folder.name in ("old", "beside"):
            interop.save_peft(folder, other)
        elif folder.name == "empty":
            folder.mkdir()
        if folder.name == "beside":
            (folder / "notes.txt").write_text("mine")
        interop.save_peft(folder, params)
        found = files_of(folder)
        assert found.pop("notes.txt", b"mine") == b"mine"
        assert found == files_of(tmp_path / "wanted")
    assert files_in(tmp_path) == ["beside", "empty", "new", "old", "wanted"]


def test_base_checkpoints_are_saved(platform, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        interop.save_merged(tmp_path / name, adapted("linear"), max_shard_size=200)
        assert len(Checkpoint(tmp_path / name).files) > 1
    interop.save_lycoris(tmp_path / "a.safetensors", adapted("linear"))
    interop.save_lycoris(tmp_path / "a.safetensors", adapted("linear"))
    assert files_in(tmp_path) == ["a.safetensors", "empty", "new"]


@pytest.mark.parametrize("dtype", [None, np.float16])
def test_checkpoints_are_merged_and_replaced(platform, dtype, tmp_path):
    for force in (False, True):
        merge_checkpoint(BASE, [(LINEAR.adapter, 1.0)], tmp_path / "out", dtype=dtype, force=force)
    assert files_in(tmp_path) == ["out"]
    merged, base = Checkpoint(tmp_path / "out"), Checkpoint(BASE)
    for key in base.shapes:
        change = (
            LINEAR.io.get(f"delta::{key.removesuffix('.weight')}", 0)
            if key.endswith(".weight")
            else 0
        )
        np.testing.assert_allclose(
            merged.read(key).astype(np.float32), base.read(key) + change, rtol=2e-3, atol=2e-3
        )


def test_an_interrupted_merge_is_resumed(platform, tmp_path):
    interop.save_merged(tmp_path / "base", LINEAR.params(), max_shard_size=200)
    arguments = (tmp_path / "base", [(LINEAR.adapter, 1.0)], tmp_path / "out")

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(*arguments, progress=stop_at_the_end)
    assert merge_checkpoint(*arguments).kept
    assert files_in(tmp_path) == ["base", "out"]


def test_adapters_are_converted_and_replaced(platform, tmp_path):
    for force in (False, True):
        convert_adapter(LINEAR.adapter, tmp_path / "folder", "peft", force=force)
        convert_adapter(LINEAR.adapter, tmp_path / "file", "kohya", force=force)
    assert files_in(tmp_path) == ["file", "folder"]


def test_positioned_reads_and_writes(platform, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    with (
        open(tmp_path / "a", "w+b", buffering=0) as first,
        open(tmp_path / "b", "w+b", buffering=0) as second,
    ):
        system.write_at(first.fileno(), 7, values[7:])
        system.write_at(first.fileno(), 0, values[:7])
        system.copy_range(first.fileno(), 100, second.fileno(), 3, 9_000)
        found = np.empty(9_003, np.uint8)
        system.read_at(second.fileno(), 0, found)
        with pytest.raises(OSError, match="became shorter"):
            system.read_at(second.fileno(), 10, np.empty_like(found))
        with pytest.raises(OSError, match="became shorter"):
            system.copy_range(first.fileno(), 9_000, second.fileno(), 0, 2_000)
    np.testing.assert_array_equal(found, np.concatenate([np.zeros(3, np.uint8), values[100:9_100]]))


def test_the_lock_of_windows_is_taken_where_fcntl_is_missing(monkeypatch, tmp_path):
    taken = []

    class Locks:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, mode, size):
            taken.append((mode, size))
            if len(taken) > 1:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", Locks)
    with (
        resumable_folder.WorkingFolder(tmp_path / "out", ""),
        pytest.raises(FileExistsError, match="Another run"),
        resumable_folder.WorkingFolder(tmp_path / "out", ""),
    ):
        pass
    assert taken == [(2, 1)] * 2


def test_imports_need_nothing_of_posix():
    """`resource`, `pwd` and `fcntl` are missing on Windows."""
    code = (
        "import sys, os, jax, loha_jax\n"
        "hidden = [m for m in ('fcntl', 'resource', 'pwd', 'grp', 'termios') if m not in "
        "sys.modules or m == 'fcntl']\n"
        "sys.modules.update(dict.fromkeys(hidden))\n"
        f"for name in {HIDDEN['windows']}: vars(os).pop(name, None)\n"
        "import loha_jax.interop, loha_jax.interop.commands.main, loha_jax.interop.merge.files\n"
        "from loha_jax.interop.disk import system\n"
        "assert system.fcntl is None\n"
        "print(len([m for m in sys.modules if m.startswith('loha_jax.interop.')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_no_text_is_read_in_the_encoding_of_the_system():
    """Windows' is not UTF-8."""
    root = Path(interop.__file__).parent
    calls = re.compile(r"\.(?:read_text|write_text)\((?![^)]*encoding)[^)]*\)")
    assert not [
        (p.name, m[0])
        for p in root.rglob("*.py")
        for m in calls.finditer(p.read_text(encoding="utf-8"))
    ]
