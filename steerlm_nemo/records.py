"""JSONL files, read and written so that nothing is lost in silence.

`.jsonl`, plain or compressed (`.gz`, `.zst`), one JSON object per line, UTF-8. Outputs appear under their final name
only when complete.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from steerlm_nemo.conversation import RecordRef, dump_json
from steerlm_nemo.errors import InputError, RecordError, listed
from steerlm_nemo.outputs import remove_earlier, replacing, target_of


@dataclass(frozen=True)
class RawLine:
    """One line as it stands in the file. `record` is None where `problem` says why the line is unusable."""

    ref: RecordRef
    raw: bytes  # without the line end
    record: dict[str, Any] | None
    problem: str | None = None

    def require_record(self) -> dict[str, Any]:
        """The record. Raises RecordError where there is none."""
        if self.record is None:
            raise RecordError(self.ref, str(self.problem))
        return self.record


def require_file(path: str | Path) -> Path:
    """The path, if it is a file that can be read. Raises InputError otherwise, saying what is there instead."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a directory; a file is needed here")
        if not stat.S_ISREG(mode):  # a pipe, as of `<(zcat ...)`, can be read once only
            raise InputError(f"{path} is no regular file but {_other_kind(mode)}; save its content to a file first")
        path.open("rb").close()
    except FileNotFoundError as err:
        target = f" (a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
        raise InputError(f"{path}: no such file{target}") from err
    except (OSError, ValueError) as err:
        raise unreadable(path, err) from err
    return path


def _other_kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_whole(path: str | Path) -> bytes:
    """The content of a small file. Raises InputError."""
    path = require_file(path)
    try:
        return path.read_bytes()
    except OSError as err:
        raise unreadable(path, err) from err


def read_json(path: str | Path) -> Any:
    """The JSON value that a small file holds. Raises InputError."""
    try:
        return json.loads(read_whole(path).decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: not JSON: {err}") from err


def unreadable(path: str | Path, err: OSError | ValueError) -> InputError:
    """What to say of a file or directory that is there and does not let itself be read, or of a name of none."""
    reason = getattr(err, "strerror", None) or err
    return InputError(f"{path}: cannot be read: {reason}. Check its permissions, or give a copy of it.")


def read_lines(path: str | Path) -> Iterator[RawLine]:
    """Every line of a JSONL file, blank ones excepted, malformed ones marked with their problem.

    Streams: memory does not grow with the file.

    Raises:
        InputError: no such file, a directory, a container of another kind, or a compressed stream that is damaged or
            cut off.
    """
    return (parse_line(ref, raw) for ref, raw in read_raw_lines(path))


def read_raw_lines(path: str | Path) -> Iterator[tuple[RecordRef, bytes]]:
    """As `read_lines`, not parsed."""
    path = require_file(path)
    line_number = 0
    try:
        with open_bytes(path) as file:
            for line_number, line in enumerate(file, 1):
                raw = line.rstrip(b"\r\n")
                if line_number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield RecordRef(str(path), line_number), raw
    except DAMAGED as err:
        kind = compression(path)
        raise InputError(f"{path}: damaged {kind} data after line {line_number}: {err}. Fetch the file again.") from err
    except OSError as err:
        raise unreadable(path, err) from err


def read_records(path: str | Path) -> Iterator[tuple[RecordRef, dict[str, Any]]]:
    """As `read_lines`, but the first malformed line raises RecordError."""
    for line in read_lines(path):
        yield line.ref, line.require_record()


class DamagedZstd(OSError):
    """A Zstandard stream that cannot be decompressed."""


# What reading a compressed file to its end may raise.
DAMAGED = (gzip.BadGzipFile, DamagedZstd, EOFError, zlib.error)
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def compression(path: Path) -> str | None:
    """`gzip`, `zstd` or None, by content: names lie."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, decompressed where its content says so. Reading may raise one of `DAMAGED`.

    Raises:
        InputError: not the text of records, but a container of another kind, which read as lines would lose some.
    """
    with _decompressed(path) as file:
        start = file.read(_START)
    if advice := _no_text(start):
        raise InputError(f"{path} is no file of JSON lines: {advice}")
    return _decompressed(path)


def _decompressed(path: Path) -> gzip.GzipFile | io.BufferedReader:
    kind = compression(path)
    if kind == "gzip":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFile(path), 1 << 18) if kind == "zstd" else path.open("rb")


_START = 512  # bytes; a tar's first header
_UNPACK = "it is {} archive. Unpack it first and give the file within"
_DECOMPRESS = "it is compressed with {}. Decompress it first, or use gzip or zstd"
_TABLE = "it is {} file. Write it as JSON lines or Parquet first"
_CONTAINERS = {
    b"PK\x03\x04": _UNPACK.format("a zip"),
    b"PK\x05\x06": _UNPACK.format("an empty zip"),
    b"7z\xbc\xaf\x27\x1c": _UNPACK.format("a 7z"),
    b"Rar!\x1a\x07": _UNPACK.format("a rar"),
    b"\x1f\x8b": "it is compressed twice. Decompress it once",
    b"\x28\xb5\x2f\xfd": "it is compressed twice. Decompress it once",
    b"BZh": _DECOMPRESS.format("bzip2"),
    b"\xfd7zXZ\x00": _DECOMPRESS.format("xz"),
    b"\x04\x22\x4d\x18": _DECOMPRESS.format("lz4"),
    b"\xff\x06\x00\x00sNaPpY": _DECOMPRESS.format("snappy"),
    b"\x1f\x9d": _DECOMPRESS.format("compress"),
    b"PAR1": "it is a Parquet file. scripts/preprocessing.py reads one that is not compressed once more",
    b"ARROW1\x00\x00": _TABLE.format("an Arrow"),
    b"\xff\xff\xff\xff": _TABLE.format("an Arrow stream") + ", or give the directory that `datasets` saved",
    b"Obj\x01": _TABLE.format("an Avro"),
    b"ORC": _TABLE.format("an ORC"),
    b"\x89HDF\r\n\x1a\n": _TABLE.format("an HDF5"),
    b"SQLite format 3\x00": _TABLE.format("an SQLite"),
    b"\xff\xfe": "its text is UTF-16 or UTF-32. Convert it to UTF-8",
    b"\xfe\xff": "its text is UTF-16. Convert it to UTF-8",
}


def _no_text(start: bytes) -> str | None:
    """What a file that starts like this is and what to do with it; None for what may be JSON."""
    for magic, advice in _CONTAINERS.items():
        if start.startswith(magic):
            return advice
    if b"\0" not in start:
        return None
    import tarfile

    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")  # compares the header with its checksum
    except tarfile.HeaderError:
        # JSON has no null byte, but a line with one may stand among others.
        is_json = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
        return None if is_json else "its data are binary, of a kind that is not known. Write it as JSON lines"
    return _UNPACK.format("a tar")


class _ZstdFile(io.RawIOBase):
    """Frames one after the other. zstandard's own reader takes a file that is cut off for one that ends there."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._error = zstandard.ZstdError
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._file.read(1 << 17)
            if not data:
                if not self._frame.eof:
                    raise EOFError("the file is cut off")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as err:
                raise DamagedZstd(str(err)) from err
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def parse_line(ref: RecordRef, raw: bytes) -> RawLine:
    """One line, without its line end, as a JSON object or as the problem that it has."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        return RawLine(ref, raw, None, f"not UTF-8: byte {err.start}")
    try:
        record = _DECODER.decode(text)
        if not isinstance(record, dict):
            return RawLine(ref, raw, None, f"a JSON object is needed, found {type(record).__name__}")
        # Only an escape can spell one, and most lines have no such escape.
        problem = lone_surrogate(record) if _SURROGATE.search(raw) else None
    except (ValueError, RecursionError) as err:
        is_start = raw.strip() in (b"{", b"[")
        over_lines = " (one value over several lines? Write one a line, as `jq -c .` does)" if is_start else ""
        return RawLine(ref, raw, None, f"not JSON: {err}{over_lines}")
    return RawLine(ref, raw, record if problem is None else None, problem)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def lone_surrogate(value: Any) -> str | None:
    """What is wrong with a JSON value that holds half a surrogate pair: neither UTF-8 nor a tokenizer can carry it."""
    try:
        dump_json(value).encode("utf-8")
    except UnicodeEncodeError as err:
        return f"lone surrogate: a text holds {err.object[err.start]!r}"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# Made once: json.loads would make one for every line.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def dump_record(record: Mapping[str, Any]) -> str:
    """One line as the reference writes it: default separators, non-ASCII literal, key order kept.

    Raises:
        ValueError: a text holds a lone surrogate, or a number is infinite: neither has a place in a JSON file.
    """
    line = dump_json(record)
    line.encode("utf-8")
    return line


def require_other_file(output: str | Path, source: str | Path) -> None:
    """Raise InputError if writing `output` would replace `source`, from which it is made."""
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise InputError(f"{output} is the input itself; choose another output file")


@contextmanager
def atomic_output(path: str | Path) -> Iterator[IO[str]]:
    """A text file that takes its final name when the block ends without an error, and vanishes otherwise.

    Raises:
        InputError: nothing can be written at this path.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file; it appears under its name when complete. Raises InputError as `atomic_output`."""
    with replacing(path) as partial:
        partial.write_bytes(data)


_TURN = re.compile(r"^turn \d+: ")  # a reason is the same whichever turn has it


@dataclass
class Accounting:
    """Where every record read has gone. Rejected records are kept in a file beside the output.

    A run that fails leaves the outputs of an earlier one, and so the reject file that belongs to them: its own rejects
    are then in a file ending in `.rejects.new.jsonl`. `rejects_path` is always where those of this run are.
    """

    rejects_path: Path
    strict: bool = False
    outputs: tuple[Path, ...] = ()  # what the records are written to
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first_rejected: str | None = None  # place and reason; first in its file, not in time
    first_filtered: str | None = None
    _first_line: int = 0  # of `first_rejected`
    _file: IO[str] | None = None
    _earlier: Path | None = None  # the reject file of outputs that are there

    @classmethod
    def beside(cls, output: str | Path, strict: bool = False) -> Accounting:
        return cls(Path(f"{output}.rejects.jsonl"), strict, (Path(output),))

    def __enter__(self) -> Accounting:
        if self.earlier_outputs:
            self._earlier = self.rejects_path
            self.rejects_path = self.rejects_path.with_suffix(".new.jsonl")
        remove_earlier(self.rejects_path)  # of a run that wrote nothing else
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._earlier is None or err is not None:
            return
        if self._file is not None:
            target_of(self.rejects_path).replace(target_of(self._earlier))
        else:
            remove_earlier(self._earlier)
        self.rejects_path = self._earlier

    @property
    def earlier_outputs(self) -> bool:
        """Whether an earlier run's output is there."""
        return any(output.exists() for output in self.outputs)

    def written(self) -> None:
        self.counts["written"] += 1

    def filtered(self, ref: RecordRef, reason: str) -> None:
        """Left out because the user asked for it (a filter, a length limit)."""
        self.counts["filtered"] += 1
        self.first_filtered = self.first_filtered or f"{ref}: {reason}"
        self.reasons[reason] += 1

    def rejected(self, ref: RecordRef, reason: str, raw: bytes) -> None:
        """Unusable. Raises RecordError in strict mode."""
        if self.strict:
            raise RecordError(ref, reason)
        self.counts["rejected"] += 1
        self.reasons[_TURN.sub("", reason).split(":")[0]] += 1
        if self.first_rejected is None or ref.line < self._first_line:
            self.first_rejected, self._first_line = f"{ref}: {reason}", ref.line
        if self._file is None:
            self.rejects_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = target_of(self.rejects_path).open("w", encoding="utf-8", newline="\n")
        raw_text = raw.decode("utf-8", errors="backslashreplace")
        self._file.write(json.dumps({"where": str(ref), "reason": reason, "raw": raw_text}, ensure_ascii=True) + "\n")
        self._file.flush()

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write the counts and reasons, after the facts given, as JSON. Raises InputError as `atomic_output`."""
        body = {
            **facts,
            "read": sum(self.counts.values()),
            **{kind: self.counts[kind] for kind in ("written", "filtered", "rejected")},
            "reasons": dict(self.reasons),
        }
        with atomic_output(path) as file:
            # Backslashes for what UTF-8 cannot carry: a name may hold a lone surrogate.
            file.write(json.dumps(body, indent=2) + "\n")

    def reasons_text(self) -> str:
        """The reasons for what was left out, the most frequent first, with how often each occurred."""
        return listed((f"{reason}: {count}" for reason, count in self.reasons.most_common()), "; ")

    def summary(self) -> str:
        """Counts that add up to the records read, reasons, and the reject file if there is one."""
        total = sum(self.counts.values())
        text = f"{total} read = " + " + ".join(
            f"{self.counts[kind]} {kind}" for kind in ("written", "filtered", "rejected")
        )
        if self.reasons:
            text += f" ({self.reasons_text()})"
        first = self.first_rejected or (None if self.counts["written"] else self.first_filtered)
        if first is not None:
            text += f". The first one: {first}"
        if self.counts["rejected"]:
            text += f"; rejected records are in {self.rejects_path}"
        return text
