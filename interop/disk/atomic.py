"""Results that appear whole or not at all, whatever ends the process: temporary names, and one rename at the end.

A temporary name is locked (`flock`) while its process lives. So what a killed one left is known, and the next write to
the same place removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIX = ".tmp"
_REPLACED = "replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


# --- one file ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, flushes to disk, then renames: never half a file, never none."""
    with naming(path), TemporaryFile(path) as file:
        write_at(file.descriptor, 0, data)
        file.flush()
        file.move_into_place()
        sync_folder(path.parent)


class TemporaryFile:
    """A new file on its way to `path`, in the same folder; leaving the `with` block removes it where it was not moved.

    Attributes:
        descriptor: to write with.
    """

    def __init__(self, path: Path):
        remove_abandoned(path)
        self._path = path
        while True:
            with naming(path):
                self.descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
            self._temporary = Path(name)
            if _lock(self.descriptor, self._temporary):
                return
            os.close(self.descriptor)

    def flush(self) -> None:
        """To disk, with the mode of a new file, which a temporary one has not."""
        os.fsync(self.descriptor)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self._temporary, 0o666 & ~mask)

    def move_into_place(self) -> None:
        """Replaces what is at `path`."""
        os.replace(self._temporary, self._path)

    def close(self) -> None:
        """Closes the file and removes it where it is a temporary one still."""
        self._temporary.unlink(missing_ok=True)
        os.close(self.descriptor)

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_at(descriptor: int, offset: int, data: Any) -> None:
    """Writes all bytes of a buffer to a place in a file."""
    view = memoryview(data)
    while len(view):  # one call writes at most 2 GB
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses inside is an OSError about this path, not about a temporary one or none at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileExistsError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- folders ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, removed at the end."""
    remove_abandoned(out)
    while True:
        with naming(out):
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_SUFFIX, dir=out.parent))
        descriptor = os.open(folder, os.O_RDONLY)
        if _lock(descriptor, folder):
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` when all went well.

    It is `out` itself where that holds files already, or cannot be replaced: then each file is to appear on its own.
    """
    if out.is_dir() and (any(out.iterdir()) or not is_replaceable(out)):
        yield out
        return
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out) as work:
        new = work / "new"
        new.mkdir()
        if out.is_dir():
            shutil.copystat(out, new)
        yield new
        sync_folder(new)
        os.rename(new, out)  # an empty folder gives way
    sync_folder(out.parent)


def move_into_place(new: Path, out: Path, force: bool) -> None:
    """Renames a finished file or folder to its place.

    What was there is exchanged with it in one step, and removed. Where the file system cannot exchange (not on Linux,
    or NFS), there is a moment between two renames: what was there is then restored by the next write to the place.

    Args:
        new: in a folder of its own beside `out`.
        out: the place.
        force: whether something may be there.

    Raises:
        FileExistsError: something is.
    """
    if not os.path.lexists(out):
        os.rename(new, out)
    elif not force:
        raise FileExistsError(f"{out} has appeared meanwhile")
    elif not exchange(new, out):
        aside = new.parent / _REPLACED
        _remove(aside)
        os.rename(out, aside)
        try:
            os.rename(new, out)
        except BaseException:
            os.rename(aside, out)
            raise
        new = aside
    sync_folder(out.parent)
    _remove(new)


def restore(folder: Path, out: Path) -> None:
    """Puts back what `move_into_place` had moved from `out` into a folder when it was ended between two renames."""
    if (folder / _REPLACED).exists() and not os.path.lexists(out):
        os.rename(folder / _REPLACED, out)


def remove_abandoned(path: Path) -> None:
    """Removes the temporary files and folders that killed processes left on their way to a path."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(_SUFFIX)}")
    try:
        left = [entry for entry in os.scandir(path.parent) if temporary.fullmatch(entry.name)]
    except OSError:
        return  # whatever comes next says why
    for entry in left:
        with contextlib.suppress(OSError):  # it is locked: its process lives
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    restore(Path(entry), path)
                _remove(Path(entry))
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, temporary: Path) -> bool:
    """Says that a new temporary name is in use; whether it is there still, for it was not from the first moment on."""
    with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.stat(temporary), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def is_replaceable(folder: Path) -> bool:
    """Whether another folder can take a folder's place unnoticed."""
    real = Path(os.path.realpath(folder))
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it has been removed
        return False
    return (
        real != here
        and real not in here.parents
        and not os.path.ismount(real)
        and real.stat().st_uid == os.geteuid()
        and os.access(real, os.W_OK)
        and os.access(real.parent, os.W_OK)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
