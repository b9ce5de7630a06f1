"""Results that appear whole or not at all, whatever ends the process.

They have a temporary name until one rename at the end. A temporary name is locked (`flock`) while
its process lives. An unlocked one is the leftover of a killed process: the next write to the same
place removes it. Windows has no such locks: nothing is removed there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .system import IS_WINDOWS, exchange, lock, opened_folder, sync_folder, write_at

_SUFFIX = ".tmp"
_REPLACED = "replaced"


# --- one file -------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write all of a file or nothing: under a temporary name, flushed to disk, then renamed."""
    with naming(path), TemporaryFile(path) as file:
        write_at(file.descriptor, 0, data)
        file.flush()
        file.move_into_place()
        sync_folder(path.parent)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file atomically."""
    for name, data in files.items():
        write_atomically(folder / name, data)


class TemporaryFile:
    """A new file on its way to `path`, in the same folder.

    The end of the `with` block removes it if it was not moved.

    Attributes:
        descriptor: to write with.
    """

    def __init__(self, path: Path):
        remove_abandoned(path)
        self._path = path
        self._is_open = True
        while True:
            with naming(path):
                self.descriptor, name = tempfile.mkstemp(
                    prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent
                )
            self._temporary = Path(name)
            if _lock(self.descriptor, self._temporary):
                return
            os.close(self.descriptor)

    def flush(self) -> None:
        """Flush the file to disk and give it the mode that new files have."""
        os.fsync(self.descriptor)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self._temporary, 0o666 & ~mask)

    def move_into_place(self) -> None:
        """Replace what is at `path`."""
        if IS_WINDOWS:
            self._release()
        os.replace(self._temporary, self._path)

    def close(self) -> None:
        """Close the file, and remove it if it is still a temporary one."""
        self._release()
        self._temporary.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._is_open:
            os.close(self.descriptor)
        self._is_open = False

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Re-raise any `OSError` from the block with `path` in its message, not the temporary path."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileExistsError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Make a hidden folder beside `out`, and remove it at the end."""
    remove_abandoned(out)
    while True:
        with naming(out):
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_SUFFIX, dir=out.parent))
        with opened_folder(folder) as descriptor:
            if descriptor is None or _lock(descriptor, folder):
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `out` unless the block raises.

    It is `out` itself if that already holds files or cannot be replaced; the block then writes each
    file atomically.
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
        try:
            os.rename(new, out)  # replaces an empty folder
        except FileExistsError:  # not on Windows
            out.rmdir()
            os.rename(new, out)
    sync_folder(out.parent)


def move_into_place(new: Path, out: Path, force: bool) -> None:
    """Rename a finished file or folder to its place.

    An old result is exchanged with the new one in one step, and then removed. Only Linux can
    exchange names, and not on NFS. Elsewhere the place is empty between two renames; if the process
    ends there, the next write to the place restores the old result.

    Args:
        new: the file or folder, in a folder of its own beside `out`.
        out: the place.
        force: replace what is there.

    Raises:
        FileExistsError: something is there and `force` is false.
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
    """Put back the old result that `move_into_place` left in a folder when it was interrupted."""
    if (folder / _REPLACED).exists() and not os.path.lexists(out):
        os.rename(folder / _REPLACED, out)


def check_place(out: Path, force: bool, inputs: Iterable[str | Path]) -> None:
    """Refuse a place for a result that is taken, has no folder, or holds what is read.

    Args:
        out: the place.
        force: what is there is to be replaced.
        inputs: the files and folders that the result is made of.

    Raises:
        FileExistsError: something is there and `force` is false.
        FileNotFoundError: the folder that it is to be in does not exist.
        ValueError: an input is there, or inside.
    """
    real = out.resolve()
    for path in inputs:
        source = Path(path).resolve()
        if real == source or real in source.parents:
            raise ValueError(f"{out} is, or holds, {path}, which would be replaced")
    if os.path.lexists(out) and not force:
        raise FileExistsError(
            f"{out} is there already. Choose another place, or pass `force=True` to replace it"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{out.parent}' to put {out.name} into")


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders of a path that killed processes left behind."""
    if IS_WINDOWS:
        return
    temporary = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(_SUFFIX)}")
    try:
        left = [entry for entry in os.scandir(path.parent) if temporary.fullmatch(entry.name)]
    except OSError:
        return  # the write that follows raises it
    for entry in left:
        with contextlib.suppress(OSError):  # locked: its process lives
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                lock(descriptor, wait=False)
                if entry.is_dir(follow_symlinks=False):
                    restore(Path(entry), path)
                _remove(Path(entry))
            finally:
                os.close(descriptor)


def _lock(descriptor: int, temporary: Path) -> bool:
    """Lock a new temporary name; return whether it still exists, as it was unlocked at first."""
    with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
        lock(descriptor, wait=True)
    try:
        return os.path.samestat(os.stat(temporary), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def folder_to_write(path: str | Path, writer: str) -> Path:
    """Return the path of a folder that a function, called `writer`, is to write.

    Raises:
        NotADirectoryError: a file is there.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; {writer} writes a folder")
    return folder


def file_to_write(path: str | Path, writer: str) -> Path:
    """Return the path of a file that a function, called `writer`, is to write.

    Raises:
        IsADirectoryError: a folder is there.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(
            f"{file} is a folder; {writer} writes a file, such as {file / 'adapter.safetensors'}"
        )
    return file


def is_replaceable(folder: Path) -> bool:
    """Return whether another folder can take a folder's place unnoticed."""
    real = Path(os.path.realpath(folder))
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it has been removed
        return False
    return (
        real != here
        and real not in here.parents
        and not os.path.ismount(real)
        and (IS_WINDOWS or real.stat().st_uid == os.geteuid())
        and os.access(real, os.W_OK)
        and os.access(real.parent, os.W_OK)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
