"""Calls of operating systems, with a fallback where one is missing.

They are locks, flushes, reads and writes at a place, and the exchange of names. Windows has no
`fcntl`, opens no folders, renames no open files, and reads and writes only at a descriptor's own
position. macOS has no `copy_file_range` and no `renameat2`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

fcntl: Any
msvcrt: Any
try:
    import fcntl  # of POSIX
except ImportError:
    fcntl = None
try:
    import msvcrt  # of Windows
except ImportError:
    msvcrt = None

IS_WINDOWS = os.name == "nt"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_LARGEST = 1 << 30  # macOS refuses to read or write 2 GB at once
_position = threading.Lock()


# --- locks ----------------------------------------------------------------------------------------


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file or folder against other processes until its descriptor is closed.

    Raises:
        OSError: another process has it and `wait` is false; or the system or the file system has no
            such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no locks on temporary names")
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def lock_file(descriptor: int) -> None:
    """Lock a file that exists only to be locked; an OSError if another process has it."""
    if fcntl is not None:
        lock(descriptor, wait=False)
    elif msvcrt is not None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[int | None]:
    """Open a folder; yield its descriptor, or None on Windows, which has none."""
    descriptor = None if IS_WINDOWS else os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time run the block, where folders can be locked."""
    with opened_folder(folder) as descriptor:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                lock(descriptor, wait=True)
        yield


# --- names ----------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; Windows does so by itself."""
    with opened_folder(folder) as descriptor:
        if descriptor is not None:
            os.fsync(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; return False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    if not rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


# --- bytes ----------------------------------------------------------------------------------------


def write_at(descriptor: int, offset: int, data: Any) -> None:
    """Write all bytes of a buffer to a place in a file."""
    view = memoryview(data)
    while len(view):
        written = _write_some(descriptor, view[:_LARGEST], offset)
        view, offset = view[written:], offset + written


def _write_some(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def read_at(descriptor: int, offset: int, buffer: Any) -> None:
    """Fill a buffer with the bytes at a place in a file.

    Raises:
        OSError: the file ends before.
    """
    view = memoryview(buffer)
    while len(view):
        count = _read_some(descriptor, view[:_LARGEST], offset)
        if not count:
            raise OSError(errno.EIO, "a file became shorter while it was read")
        view, offset = view[count:], offset + count


def _read_some(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def copy_range(source: int, start: int, target: int, place: int, size: int) -> None:
    """Copy bytes from file to file, inside the kernel where it can."""
    done = 0
    try:
        while hasattr(os, "copy_file_range") and done < size:
            count = os.copy_file_range(source, target, size - done, start + done, place + done)
            if not count:
                raise OSError(errno.EIO, "a file became shorter while it was read")
            done += count
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    if done < size:
        buffer = np.empty(size - done, np.uint8)
        read_at(source, start + done, buffer)
        write_at(target, place + done, buffer)
