"""Files and datasets of any container -> lines of JSON that can be read in any order.

==========================  =========================================================================================
JSON lines                  plain, `.gz` or `.zst`; told by content
a JSON array                a file that starts with `[` and is not named `.jsonl`; plain, `.gz` or `.zst`
Parquet                     read one row group after the other (needs pyarrow)
`hf://owner/name[@split]`   a dataset of the Hugging Face Hub (needs datasets and a network); the split is `train`
                            unless given
a directory                 what `datasets` finds in it, without a network; `DIR@split` for another split. Its JSON and
                            Parquet files are read as above, whatever else by `datasets`
==========================  =========================================================================================

Plain JSON lines are read where they lie. Everything else is written once to an unnamed scratch file beside the output,
one record a line, so that memory stays flat and the shuffle can still jump. A place is `path:line`, or `path:row` where
there are no lines, both from 1; the path is the file's, also where a directory was given.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.errors import InputError, listed
from steerlm_nemo.records import DAMAGED, RawLine, compression, open_bytes, parse_line, require_file, unreadable

HUB = "hf://"
# What makes a directory a dataset. (Without this `datasets` would search whole disks.)
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "*.parquet", "*.json*", "data/*.parquet", "data/*.json*")
_CHUNK = 1 << 20  # characters of a JSON array read at a time


class Lines:
    """Random access to the records of a file or dataset, blank lines left out; 16 bytes of memory per record.

    Raises:
        InputError: nothing readable under this name, a package that is not installed, or damaged data.
    """

    def __init__(self, source: str | Path, scratch_dir: Path) -> None:
        self.name = str(source)
        self._starts = array("Q")
        self._line_numbers = array("Q")
        require_source(self.name)
        directory = None if self.name.startswith(HUB) else _directory(self.name)
        files = _files_of_split(str(directory[0]), directory[1]) if directory else None
        # Of a directory, its files and the number of lines before each.
        self._files: list[tuple[int, str]] = []
        self._file = _all_lines(files, self._files, scratch_dir) if files else _json_lines(self.name, scratch_dir)
        start = 0
        try:
            for line_number, line in enumerate(self._file, 1):
                if not line.isspace():
                    self._starts.append(start)
                    self._line_numbers.append(line_number)
                start += len(line)
        except OSError as err:
            raise unreadable(self.name, err) from err

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[RawLine]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> RawLine:
        return parse_line(self.ref(index), self.raw(index))

    def ref(self, index: int) -> RecordRef:
        number = self._line_numbers[index]
        if not self._files:
            return RecordRef(self.name, number)
        num_before, name = self._files[bisect_left(self._files, (number,)) - 1]
        return RecordRef(name, number - num_before)

    def raw(self, index: int) -> bytes:
        """The bytes of a record, without line end and byte order mark."""
        try:
            self._file.seek(self._starts[index])
            raw = self._file.readline().rstrip(b"\r\n")
        except OSError as err:
            raise unreadable(self.name, err) from err
        return raw.removeprefix(b"\xef\xbb\xbf") if self._starts[index] == 0 else raw

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def require_source(source: str | Path) -> None:
    """Refuse a name that cannot be a source, before anything is read. Raises InputError."""
    name = str(source)
    if name.startswith(HUB):
        return
    try:
        _require_path(name)
    except OSError as err:
        raise unreadable(name, err) from err


def _require_path(name: str) -> None:
    if directory := _directory(name):
        next(directory[0].iterdir(), None)  # a glob finds nothing where nothing may be read
        files = [found for pattern in _DATASET_FILES for found in directory[0].glob(pattern)]
        for file in files:
            if file.is_file():
                require_file(file)
        if files:
            return
        raise InputError(f"{name} is a directory without data files; give a file, or a directory that `datasets` loads")
    if not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        raise InputError(f"{name}: no such file; a dataset of the Hugging Face Hub is written {HUB}{name}")
    require_file(name)


def _directory(name: str) -> tuple[Path, str | None] | None:
    """A directory and the split asked for, or None where the name is no directory."""
    for path, split in ((name, None), (name.rpartition("@")[0], name.rpartition("@")[2])):
        if path and Path(path).is_dir():
            return Path(path), split
    return None


def _json_lines(name: str, scratch_dir: Path) -> IO[bytes]:
    """One record a line, at its start, seekable."""
    require_source(name)
    if name.startswith(HUB):
        dataset, _, split = name.removeprefix(HUB).partition("@")
        return _spooled(_rows_as_lines(_dataset_rows(dataset, split or None)), scratch_dir)
    if directory := _directory(name):
        return _spooled(_rows_as_lines(_dataset_rows(str(directory[0]), directory[1])), scratch_dir)
    path = Path(name)
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                return _spooled(_rows_as_lines(_parquet_rows(path)), scratch_dir)
        if _is_array(path):
            return _spooled(_elements_as_lines(_array_elements(path)), scratch_dir)
        source = open_bytes(path)
        if compression(path) is None:
            return cast(IO[bytes], source)
        with source:
            return _spooled(iter(lambda: source.read(_CHUNK), b""), scratch_dir)
    except DAMAGED as err:
        raise InputError(f"{path}: damaged {compression(path)} data: {err}. Fetch the file again.") from err
    except OSError as err:
        raise unreadable(path, err) from err


def _all_lines(names: Sequence[str], places: list[tuple[int, str]], scratch_dir: Path) -> IO[bytes]:
    """The lines of several files as of one; `places` is told where each begins."""

    def lines() -> Iterator[bytes]:
        num_before = 0
        for name in names:
            places.append((num_before, name))
            with _json_lines(name, scratch_dir) as file:
                for number, line in enumerate(file):
                    yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\n") + b"\n"
                    num_before += 1

    return _spooled(lines(), scratch_dir)


def _spooled(chunks: Iterable[bytes], scratch_dir: Path) -> IO[bytes]:
    scratch = tempfile.TemporaryFile(dir=scratch_dir)  # noqa: SIM115 - closed by Lines
    try:
        scratch.writelines(chunks)
    except BaseException:
        scratch.close()
        raise
    scratch.seek(0)
    return scratch


def _elements_as_lines(elements: Iterator[Any]) -> Iterator[bytes]:
    # A NaN, which JSON does not have, stays one, so that its line is rejected.
    return (json.dumps(element).encode("ascii") + b"\n" for element in elements)


def _rows_as_lines(rows: Iterator[Any]) -> Iterator[bytes]:
    for row in rows:
        try:
            line = json.dumps(row, allow_nan=False, default=_as_json)
        except ValueError:
            line = json.dumps(_without_nan(row), default=_as_json)
        yield line.encode("ascii") + b"\n"


def _as_json(value: Any) -> Any:
    """A value of a table that JSON has no form for.

    Texts stored as plain bytes and whole decimals are what they stand for. All else becomes an object with the name of
    its type: no adapter takes one for a text or a number, so a row is rejected where it is read, and only there.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"bytes": value.hex()}
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == int(value) else float(value)
    return {type(value).__name__: str(value)}


def _without_nan(value: Any) -> Any:
    """The same with an object in the place of each number that is none."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _is_array(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return False
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array_elements(path: Path) -> Iterator[Any]:
    """The elements of the array in a file, one after the other; memory holds one element and one chunk.

    ijson would take a third of the time (0.26 s instead of 0.79 s for 35 MB), but its yajl writes `?` for half a
    surrogate pair without a word, and refuses the whole file at the first NaN, which pandas writes for what is missing.
    Here such a record is rejected, and the others are read.

    Raises:
        InputError: damaged JSON. What follows a damaged element cannot be told apart, so the whole file is refused.
    """
    import codecs

    decode = json.JSONDecoder().raw_decode
    number = 0
    with open_bytes(path) as file, codecs.getreader("utf-8-sig")(file) as reader:
        try:
            text = reader.read(_CHUNK).lstrip()[1:]
            separator = ""  # what has to stand before the next element
            size = _CHUNK
            while True:
                text = text.lstrip()
                rest = text[len(separator) :].lstrip() if text.startswith(separator) else text
                if text.startswith("]"):
                    if (text[1:] + reader.read()).strip():
                        raise InputError(f"{path}: text after the end of the array of {number} records")
                    return
                try:
                    if not text.startswith(separator) or not rest:
                        raise ValueError(f"{separator or 'a record'} or ] expected")
                    element, end = decode(rest)
                    if end == len(rest) and isinstance(element, int | float):  # may go on in the next chunk
                        raise ValueError("the array has no end")
                except (ValueError, RecursionError) as err:
                    more = reader.read(size)
                    if not more:
                        raise InputError(f"{path}: not JSON after record {number}: {err}. Fetch it again.") from err
                    text += more
                    size *= 2  # so that a long element is not tried at every chunk
                    continue
                yield element
                number += 1
                text, separator, size = rest[end:], ",", _CHUNK
        except UnicodeDecodeError as err:
            raise InputError(f"{path}: not UTF-8 after record {number}: {err}") from err


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as err:
        raise InputError(f"{path} is a Parquet file; `pip install pyarrow` to read it") from err
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as err:
        raise InputError(f"{path}: damaged Parquet data: {err}. Fetch the file again.") from err


def _dataset_rows(name: str, split: str | None) -> Iterator[dict[str, Any]]:
    datasets = _datasets(name)
    number = 0
    try:
        for row in _loaded(datasets, name, split):
            number += 1
            yield row
    except InputError:
        raise
    # `datasets` lets errors of pyarrow, of json and of its own through, at any row.
    except Exception as err:
        raise _refusal(name, number, err) from err


def _refusal(name: str, number: int, err: Exception) -> InputError:
    """What to say where `datasets` fails after a number of rows."""
    reason = str(err).strip().split("\n")[0]
    if "trust_remote_code" in reason:
        reason = "the dataset is made by code of its own, which is never run here"
    where = f"cannot be read after row {number}" if number else "cannot be loaded"
    if Path(name).is_dir():
        return InputError(
            f"{name}: {where}: {reason}. Give one of its files (JSON lines, JSON or Parquet) instead: "
            f"{_files_shown(name)}"
        )
    return InputError(
        f"{HUB}{name}: {where}: {reason}. Without a network, download the files of the dataset elsewhere and give one "
        "of them (JSON lines, JSON or Parquet) or their directory as --input_file."
    )


def _files_of_split(name: str, split: str | None) -> list[str] | None:
    """The JSON and Parquet files that `datasets` finds for a split of a directory; None where it must read them itself.

    They are read as files are, one record after the other: `datasets` makes one table of them, which fails, or loses
    keys, at the first record of other types than those before it.
    """
    if any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        return None
    datasets = _datasets(name)
    try:
        config = datasets.load_dataset_builder(name, **_no_code(datasets)).config
    except Exception as err:  # as above
        raise _refusal(name, 0, err) from err
    reads_all = getattr(config, "field", None) is None and getattr(config, "columns", None) is None
    if type(config).__name__ not in ("JsonConfig", "ParquetConfig") or not reads_all:
        return None
    return [str(file) for file in _split_of(name, split, config.data_files)]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as err:
        raise InputError(f"{name} is a dataset; `pip install 'datasets<4'` to read it") from err
    return datasets


def _no_code(datasets: Any) -> dict[str, Any]:
    """Code that a dataset brings is never run: `datasets` before 4 would ask, and then do it."""
    return {"trust_remote_code": False} if datasets.__version__ < "4" else {}


def _loaded(datasets: Any, name: str, split: str | None) -> Iterable[Any]:
    """The rows of a split."""
    is_local = Path(name).is_dir()
    if is_local and (Path(name) / "dataset_info.json").is_file():
        rows = datasets.load_from_disk(name)
        if split not in (None, str(rows.split)):
            raise InputError(f"{name}: no dataset with a split {split!r} here; it holds one, so give {name}")
        return cast(Iterable[Any], rows)
    if is_local and (Path(name) / "dataset_dict.json").is_file():
        return _split_of(name, split, datasets.load_from_disk(name))
    options = {"streaming": True, **_no_code(datasets)}
    if is_local:
        return _split_of(name, split, datasets.load_dataset(name, **options))
    return cast(Iterable[Any], datasets.load_dataset(name, split=split or "train", **options))


def _files_shown(name: str) -> str:
    files = sorted({str(path) for pattern in _DATASET_FILES for path in Path(name).glob(pattern)})
    return listed(files, most=5)


def _split_of(name: str, split: str | None, splits: Mapping[str, Iterable[Any]]) -> Iterable[Any]:
    """One split of a directory's; the others are named, since nobody may have known of them."""
    chosen = split or "train"
    others = listed(f"{name}@{other}" for other in splits if other != chosen)
    if chosen not in splits:
        raise InputError(f"{name}: no dataset with a split {chosen!r} here; there are {others}")
    if split is None and others:
        print(f"{name}: reading its split {chosen} only; there are also {others}", file=sys.stderr)
    return splits[chosen]
