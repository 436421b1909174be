"""What a run over a file has finished so far, kept so that a killed run goes on where it was.

`OUTPUT.progress.jsonl`: a first line with the settings of the run, then one line per finished record::

    {"settings": {...}}
    {"line": 8, "sha256": "...", "counts": {...}, "record": {...}}

Records are known by input line and hash of its bytes, never by their text: equal conversations stay apart, and an
edited line is asked about again. A line torn by a kill is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from steerlm_nemo.errors import InputError
from steerlm_nemo.outputs import remove_earlier, require_writable, target_of
from steerlm_nemo.records import RawLine


class Journal:
    """Append-only file of finished records, in order of completion. Used from one thread."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or create. Raises InputError if it cannot be, or if the file belongs to a run with other settings."""
        self.path = path
        self._entries: dict[int, tuple[str, int]] = {}  # input line -> hash, position in the file
        require_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = target_of(path).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._file.close()
            raise InputError(f"{path} is in use: another run is writing the same output") from err
        end = self._load(settings)
        self._file.truncate(end)
        if not end:
            self._append({"settings": dict(settings)})

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def has(self, line: RawLine) -> bool:
        found = self._entries.get(line.ref.line)
        return found is not None and found[0] == _hash(line)

    def add(self, line: RawLine, record: Mapping[str, Any], counts: Mapping[str, int]) -> None:
        """Note a finished record; it survives a kill of this process from here on."""
        entry = {"line": line.ref.line, "sha256": _hash(line), "counts": dict(counts), "record": record}
        self._entries[line.ref.line] = (_hash(line), self._append(entry))

    def get(self, line: RawLine) -> tuple[dict[str, Any], Counter[str]] | None:
        """The finished record and its counts, if this very record is finished."""
        if not self.has(line):
            return None
        self._file.seek(self._entries[line.ref.line][1])
        entry = json.loads(self._file.readline())
        return entry["record"], Counter(entry["counts"])

    def delete(self) -> None:
        self._file.close()
        remove_earlier(self.path)

    def _append(self, entry: Mapping[str, Any]) -> int:
        position = self._file.seek(0, 2)
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        return position

    def _load(self, settings: Mapping[str, Any]) -> int:
        """Read the entries; returns where the last whole line ends."""
        end = 0
        self._file.seek(0)
        for raw in self._file:
            try:
                entry = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            if end:
                self._entries[entry["line"]] = (entry["sha256"], end)
            elif (then := entry.get("settings")) != dict(settings):
                raise InputError(
                    f"{self.path} was begun with other settings: {_difference(then, settings)}. "
                    "Repeat them to go on, or delete the file to start anew."
                )
            end += len(raw)
        return end


def _hash(line: RawLine) -> str:
    return hashlib.sha256(line.raw).hexdigest()


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} was {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    )
