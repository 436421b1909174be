"""Disk and processor kept busy at once: the next tensor is read while this one is written and sent to the disk."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Each unit with `read(unit)`; the next one is read in a thread meanwhile, so two results are held at a time."""
    with ThreadPoolExecutor(1, "read") as reader:
        pending: deque[tuple[Unit, Future[Result]]] = deque()
        for unit in units:
            pending.append((unit, reader.submit(read, unit)))
            if len(pending) == 2:
                first, result = pending.popleft()
                yield first, result.result()
        for last, result in pending:
            yield last, result.result()


class EagerFile(io.BufferedWriter):
    """A new file that goes to the disk while it is written, so that little is left to wait for in `sync`."""

    EVERY_BYTES = 32 * 2**20

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._unsent = 0

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._unsent += count
        if self._unsent >= self.EVERY_BYTES:
            self._unsent = 0
            _start_writeback(self.fileno())
        return count

    def sync(self) -> None:
        """Return when everything is on disk. Raises OSError for any failure since the file was opened."""
        self.flush()
        os.fsync(self.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # flushing to a full disk fails once more here; `sync` has told
            super().close()


def _start_writeback(descriptor: int) -> None:
    """Ask the system to write what it holds of this file, without waiting (Linux; elsewhere `sync` does it all)."""
    # An fdatasync would do it too, but also commits the file system's journal, other programs' data included.
    sync_file_range_write = 2
    if sys.platform == "linux":
        whole = ctypes.c_int64(0)  # from offset 0, 0 bytes: to the end
        ctypes.CDLL(None).sync_file_range(descriptor, whole, whole, sync_file_range_write)
