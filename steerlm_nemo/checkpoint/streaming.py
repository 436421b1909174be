"""Disk and processor kept busy at once: the next piece is read and the last one written while this one is used."""

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
from typing import Any, Protocol, TypeVar

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


PIECE_BYTES = 4 * 2**20  # good to read and write, and what the caches of a processor hold


def read_into(file: Any, start: int, buffer: memoryview) -> bool:
    """Fill `buffer` from an unbuffered file, from `start` on. False where the file ends before."""
    file.seek(start)
    done = 0
    while done < len(buffer):  # one call of the system reads at most 2 GiB
        count = file.readinto(buffer[done:])
        if not count:
            return False
        done += count
    return True


class Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Source = TypeVar("Source", bound=Sized)


def in_pieces(
    sources: Iterable[Source], limit: int, alone: Callable[[Source], bool] = lambda source: False
) -> Iterator[list[Source]]:
    """Sources that follow one another, together up to `limit` bytes; those that are to be alone, alone."""
    piece: list[Source] = []
    size = 0
    for source in sources:
        if piece and (alone(source) or alone(piece[0]) or size + source.num_bytes > limit):
            yield piece
            piece, size = [], 0
        piece.append(source)
        size += source.num_bytes
    if piece:
        yield piece


class EagerFile(io.BufferedWriter):
    """A new file, written in a thread while the caller prepares what comes next, and sent to the disk meanwhile.

    What a thread has failed to write is raised by the next call, as an OSError.
    """

    EVERY_BYTES = 32 * 2**20
    LARGE_BYTES = 2**18

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._unsent = 0
        self._thread = ThreadPoolExecutor(1, "write")
        self._under_way: Future[int] | None = None

    def write(self, data: Any) -> int:
        """Append bytes. Large ones are not copied: they must stay as they are until the next call returns."""
        self._wait()
        if len(data) < self.LARGE_BYTES:
            return self._write(data)
        self._under_way = self._thread.submit(self._write, data)
        return len(data)

    def tell(self) -> int:
        self._wait()
        return super().tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._wait()
        return super().seek(offset, whence)

    def sync(self) -> None:
        """Return when everything is on disk. Raises OSError for any failure since the file was opened."""
        self._wait()
        self.flush()
        os.fsync(self.fileno())

    def close(self) -> None:
        self._thread.shutdown()
        with contextlib.suppress(OSError):  # flushing to a full disk fails once more here; `sync` has told
            super().close()

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, data: Any) -> int:
        count = super().write(data)
        self._unsent += count
        if self._unsent >= self.EVERY_BYTES:
            self._unsent = 0
            _start_writeback(self.fileno())
        return count


def _start_writeback(descriptor: int) -> None:
    """Ask the system to write what it holds of this file, without waiting (Linux; elsewhere `sync` does it all)."""
    # An fdatasync would do it too, but also commits the file system's journal, other programs' data included.
    sync_file_range_write = 2
    if sys.platform == "linux":
        whole = ctypes.c_int64(0)  # from offset 0, 0 bytes: to the end
        ctypes.CDLL(None).sync_file_range(descriptor, whole, whole, sync_file_range_write)
