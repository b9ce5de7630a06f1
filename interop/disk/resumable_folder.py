"""Results that appear whole and are resumed: in a hidden folder until one rename at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from .atomic import move_into_place, naming, restore, write_atomically
from .system import IS_WINDOWS, lock_file, sync_folder


class WorkingFolder:
    """The hidden folder of a result that takes long.

    One run at a time owns it. If that is interrupted, the next run can resume it.

    Args:
        out: the place of the result.
        fingerprint: a hash of everything that the result depends on. Files of a run with another
            hash are removed.

    Attributes:
        files: the folder that becomes the result.
    """

    def __init__(self, out: Path, fingerprint: str):
        self._out = out
        self._folder = out.parent / f".{out.name}.merging"
        self._lock_path = self._folder / "lock"
        self._manifest = self._folder / "manifest.json"
        self._fingerprint = fingerprint
        self.files = self._folder / "files"
        self._done = (
            self._folder / "done"
        )  # an old result comes here in exchange, and must not be resumed

    def __enter__(self) -> WorkingFolder:
        with naming(self._out):
            self._folder.mkdir(exist_ok=True)
        self._lock = open(self._lock_path, "w")
        try:
            lock_file(self._lock.fileno())
        except OSError as error:
            self._lock.close()
            raise FileExistsError(
                f"Another run is writing {self._out} ({self._folder} is locked)"
            ) from error
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        """Remove what cannot be resumed."""
        restore(self._folder, self._out)
        shutil.rmtree(self._done, ignore_errors=True)
        try:
            manifest = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            manifest = {}
        if manifest.get("fingerprint") != self._fingerprint:  # of other files, weights or options
            self._manifest.unlink(missing_ok=True)
            self.discard()
            text = json.dumps({"out": self._out.name, "fingerprint": self._fingerprint}, indent=2)
            write_atomically(self._manifest, text.encode())
        self.files.mkdir(exist_ok=True)
        for unfinished in self.files.glob(".*.part"):
            unfinished.unlink()

    def is_finished(self, name: str, size: int) -> bool:
        """Return whether an earlier run left a whole file and the note on its losses."""
        path = self.files / name
        return path.is_file() and path.stat().st_size == size and self.losses(name).is_file()

    def losses(self, name: str) -> Path:
        """Return the path of the note on what rounding lost in one of the files."""
        return self._folder / f"losses-{name}.json"

    def discard(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.files, ignore_errors=True)

    def publish(self, force: bool) -> None:
        """Rename the folder of files to its place."""
        sync_folder(self.files)
        self.files.rename(self._done)
        try:
            move_into_place(self._done, self._out, force)
        except BaseException:
            self._done.rename(self.files)
            raise
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        if self._folder.is_dir() and not any(self.files.glob("*.safetensors")):  # nothing to resume
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
        if IS_WINDOWS:  # which removes no open file
            with contextlib.suppress(OSError):
                self._lock_path.unlink(missing_ok=True)
                self._folder.rmdir()  # if nothing else is in it
