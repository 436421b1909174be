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

from steerlm_nemo.checkpoint.streaming import read_into
from steerlm_nemo.errors import InputError

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
            raise InputError(f"{self.path}: cannot be read: {err.strerror}") from err
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
                raise InputError(f"{path}: not a safetensors file, or cut off; download it again")
            header = json.loads(file.read(header_size))
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, UnicodeDecodeError) as err:
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


def find_tensors(folder: Path, ignored: str) -> dict[str, TensorPlace]:
    """The tensors of a Hugging Face folder, from one file or from the shards that its index names.

    Those whose name ends in `ignored` are left out, whatever their dtype.

    Where both are there the single file counts, as for transformers: shards of an earlier save often stay beside it.

    Raises:
        InputError: no safetensors there, a shard is missing, or index and shards disagree.
    """
    if (folder / SINGLE).is_file():
        return places_in(folder / SINGLE, ignored)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" Load {others[0]} with transformers and save it again as safetensors." if others else ""
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}.{hint}")
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    except OSError as err:
        raise InputError(f"{folder / INDEX}: cannot be read: {err.strerror}") from err
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(f"{folder / INDEX}: not a safetensors index ({err!r})") from err
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: not a safetensors index (weight_map is {str(weight_map)[:60]})")
    if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise InputError(
            f"{folder / INDEX}: not a safetensors index (weight_map gives {wrong[0]} no file name, but "
            f"{weight_map[wrong[0]]!r}); download it again"
        )
    places: dict[str, TensorPlace] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InputError(f"{folder / INDEX}: names the shard {shard!r}, which is not a file of this folder")
        places |= places_in(folder / shard, ignored)
    if missing := sorted(name for name in weight_map if name not in places and not name.endswith(ignored)):
        raise InputError(f"{folder / INDEX}: lists {missing[0]} in {weight_map[missing[0]]}, which does not have it")
    return places


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
