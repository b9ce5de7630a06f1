"""`DirectFile`: large values to disk past the page cache, which a file that nobody reads again only fills."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from loha_jax.interop.disk.atomic import write_at

_PAGE = 4096
"""What Linux wants places, sizes and addresses to be multiples of."""


class DirectFile:
    """A new file of known size, written in any order by several threads.

    Whole pages of a value go to the disk from an aligned copy of it (`O_DIRECT`), without a copy in the kernel and
    without pushing the base checkpoint out of memory. Its ends, and everything where the system or the file system
    has no such thing, are written as usual.

    Args:
        path: of the file; one that is there is emptied.
        size: in bytes.

    Attributes:
        descriptor: for what is written in other ways.
    """

    def __init__(self, path: Path, size: int):
        self._held = threading.local()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct: int | None = None
        try:
            os.truncate(self.descriptor, size)
            if hasattr(os, "O_DIRECT"):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has it not
                os.close(self.descriptor)
                raise

    def write(self, place: int, data: np.ndarray) -> None:
        """Writes bytes, `uint8`, to a place."""
        start, stop = -(-place // _PAGE) * _PAGE, (place + data.size) // _PAGE * _PAGE
        if self._direct is None or start >= stop:
            write_at(self.descriptor, place, data)
            return
        pages = self._aligned(stop - start)
        pages[:] = data[start - place : stop - place]
        try:
            done = 0
            while done < pages.size:
                done += os.pwrite(self._direct, pages[done:].data, start + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            write_at(self.descriptor, start, pages)  # the disk wants larger units
        write_at(self.descriptor, place, data[: start - place])
        write_at(self.descriptor, stop, data[stop - place :])

    def _aligned(self, size: int) -> np.ndarray:
        """A buffer of this thread's at the start of a page."""
        held: Any = getattr(self._held, "buffer", None)
        if held is None or held.size < size:
            held = self._held.buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        return held[:size]

    def close(self) -> None:
        """Closes the file; what was not flushed may be lost."""
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)
