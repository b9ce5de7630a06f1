"""Files that change together: the config and the weights in an adapter's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from loha_jax.runtime.untrusted import FileError

from .atomic import (
    is_replaceable,
    naming,
    remove_abandoned,
    temporary_folder,
    whole_folder,
    write_files,
)
from .system import exchange, locked_folder, sync_folder
from .tensor_files import TORCH_SUFFIXES

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
"""The name of an adapter's file in diffusers and SimpleTuner."""

PENDING = ".loha_jax_pending"
"""A folder inside, with new files that a killed process did not move to their places."""

_WANTED = ". Give an adapter's file, or a folder with one, or PEFT's with adapter_config.json"


def write_together(folder: Path, files: Mapping[str, bytes], once: Mapping[str, bytes]) -> None:
    """Write files that are read together, so that no reader finds old and new ones mixed.

    A new folder appears whole. If only one file has changed, it is replaced. If several have
    changed and the folder holds nothing else, a new folder takes its place in one step. Otherwise
    the new files are written to a folder `PENDING` inside and then moved. If the process ends
    between the moves, the last file is missing: `pending_or_own` finds the new files, other readers
    report a missing file, and the next write finishes the moves.

    Args:
        folder: made if it is not there.
        files: content by name; the last one is what a reader looks for first.
        once: likewise, written where there is no such file.
    """
    if not folder.is_dir() and _make_folder(folder, {**files, **once}):
        return
    for place in (folder, *(folder / name for name in (*files, *once, PENDING))):
        remove_abandoned(place)
    with naming(folder), locked_folder(folder):
        _finish(folder, list(files))
    changed = {name: data for name, data in files.items() if not _holds(folder / name, data)}
    new = {name: data for name, data in once.items() if not os.path.lexists(folder / name)}
    if len(changed) < 2:
        write_files(folder, {**changed, **new})
        return
    kept = {
        name: (folder / name).read_bytes()
        for name in once.keys() - new.keys()
        if (folder / name).is_file()
    }
    if _replace_folder(folder, {**files, **new, **kept}):
        return
    with naming(folder), locked_folder(folder), temporary_folder(folder / PENDING) as work:
        (work / "new").mkdir()
        write_files(work / "new", files)
        os.rename(work / "new", folder / PENDING)  # from here on it is the new files that count
        sync_folder(folder)
        _finish(folder, list(files))
    write_files(folder, new)


def pending_or_own(folder: Path, name: str) -> Path:
    """Return the path of a file that `write_together` wrote or would write."""
    pending = folder / PENDING / name
    return pending if pending.is_file() else folder / name


def find_adapter_file(folder: Path) -> Path:
    """Return the file of an adapter in a folder that has no `adapter_config.json`.

    That is `pytorch_lora_weights.safetensors` (diffusers, SimpleTuner), or else the only
    safetensors file.

    Raises:
        FileNotFoundError: the folder has no safetensors file; the error names those in folders
            inside.
        FileError: it has several.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "style.safetensors").touch()
        ...     find_adapter_file(Path(folder)).name
        'style.safetensors'
    """
    if (file := folder / DIFFUSERS_NAME).is_file():
        return file
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise FileError(
            f"'{folder}' holds several safetensors files: {names}. Give the path of one of them."
        )
    inside = sorted(
        {f"'{file.parent}'" for file in folder.glob("*/*.safetensors") if file.is_file()}
    )
    pickles = sorted(f"'{file}'" for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES)
    hint = f"; give one of its folders: {', '.join(inside)}" if inside else _WANTED
    hint = f"; give the file that is the adapter: {', '.join(pickles)}" if pickles else hint
    raise FileNotFoundError(f"There is no adapter in '{folder}'{hint}")


def _make_folder(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Create a folder of these files; return False if another process has created it meanwhile."""
    try:
        with naming(folder), whole_folder(folder) as new:
            if new == folder:  # it is there
                return False
            write_files(new, files)
    except OSError:
        if folder.is_dir():
            return False
        raise
    return True


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Replace a folder that holds no other files; return False if that is impossible."""
    entries = list(os.scandir(folder))
    if not is_replaceable(folder) or not all(
        e.name in files and e.is_file(follow_symlinks=False) for e in entries
    ):
        return False
    folder = Path(os.path.realpath(folder))
    with naming(folder), temporary_folder(folder) as work:
        (work / "new").mkdir()
        write_files(work / "new", files)
        if (work / "new").stat().st_gid != folder.stat().st_gid:
            return False
        shutil.copystat(folder, work / "new")
        if not exchange(work / "new", folder):
            return False
        sync_folder(folder.parent)
        for entry in os.scandir(work / "new"):  # added by another process at the last moment
            if entry.name not in files:
                os.rename(entry, folder / entry.name)
    return True


def _finish(folder: Path, names: list[str]) -> None:
    """Move pending files to their places; the last one is missing meanwhile."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    if (pending / names[-1]).is_file():
        (folder / names[-1]).unlink(missing_ok=True)
    for name in names:
        if (pending / name).is_file():
            os.replace(pending / name, folder / name)
    sync_folder(folder)
    shutil.rmtree(pending)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
