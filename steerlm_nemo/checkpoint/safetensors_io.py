"""safetensors files read and written a piece at a time.

The official reader maps the whole file into memory, which counts against the limit that conversion keeps; this one
reads any part of a tensor into a buffer. Format: 8 bytes of length, that many of JSON header, then raw tensor data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.recognise import by_content
from steerlm_nemo.checkpoint.streaming import read_into
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import unreadable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ST_DTYPES = {name: code for code, name in TORCH_DTYPES.items()}
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TensorPlace:
    path: Path
    start: int
    num_bytes: int
    dtype: str  # as torch spells it
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on.

        Raises:
            InputError: the file is shorter than when its header was read, or cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                is_there = read_into(file, self.start + start, into)
        except OSError as err:
            raise unreadable(self.path, err) from err
        if not is_there:
            raise InputError(f"{self.path}: ends too early")


def places_in(path: Path, ignored: str | None = None) -> dict[str, TensorPlace]:
    """Where every tensor of one file lies, checked against the file's size; not those whose name ends in `ignored`.

    Raises:
        InputError: not a safetensors file, cut off, or a dtype that is not a float of 16 or 32 bits.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if not 2 <= header_size <= min(_MAX_HEADER, size - 8):
                raise InputError(
                    f"{path}: {by_content(path) or 'not a safetensors file, or cut off; download it again'}"
                )
            header = json.loads(file.read(header_size))
    except OSError as err:
        raise unreadable(path, err) from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: its safetensors header is not JSON ({err}); download it again") from err
    try:
        return {
            name: _place(path, size, 8 + header_size, name, entry)
            for name, entry in header.items()
            if name != "__metadata__" and not (ignored and name.endswith(ignored))
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        raise InputError(f"{path}: its safetensors header is malformed ({err!r}); download it again") from err


def _place(path: Path, size: int, data_start: int, name: str, entry: dict[str, Any]) -> TensorPlace:
    if entry["dtype"] not in TORCH_DTYPES:
        raise InputError(
            f"{path}: {name} has dtype {entry['dtype']}; quantised and integer weights are not supported, "
            f"only {', '.join(TORCH_DTYPES)}"
        )
    first, last = entry["data_offsets"]
    if not all(type(number) is int for number in (first, last, *entry["shape"])):
        raise TypeError(f"shape or data_offsets of {name}")
    dtype, shape = TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, num_bytes = data_start + first, last - first
    if num_bytes != math.prod(shape) * ITEM_SIZE[dtype] or first < 0 or start + num_bytes > size:
        raise InputError(f"{path}: {name} lies outside the file ({size} bytes); it is cut off, download it again")
    return TensorPlace(path, start, num_bytes, dtype, shape)


def header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file whose tensors follow in this order; values are (torch dtype, shape)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * ITEM_SIZE[dtype]
        entries[name] = {"dtype": ST_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers expect aligned data
    return len(text).to_bytes(8, "little") + text
