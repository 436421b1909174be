"""Where the values of tensors lie in a file of `torch.save`, so that they are read like those of a safetensors file.

Such a file is a zip whose records are stored as they are: `data.pkl` says of each tensor which record it is of, from
which value on, its shape and strides. Nothing is unpickled that could run (see `pickles`), and torch is not imported.
"""

from __future__ import annotations

import math
import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import IO, Any

from steerlm_nemo.checkpoint.pickles import Inert

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_DTYPES = {f"torch.{storage}": dtype for dtype, storage in STORAGES.items()}
_REBUILD = "torch._utils._rebuild_tensor_v2"


def ints(size: Any) -> tuple[int, ...]:
    """A `torch.Size` as the unpickler leaves it."""
    return tuple(int(number) for number in (size.args[0] if isinstance(size, Inert) else size))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose values follow one another, row after row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as `data.pkl` describes it; `dtype` is torch's name of it, or of its storage where that is no float."""

    dtype: str
    record: str
    first: int  # value of the record
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        return self.strides == contiguous(self.shape)


def pickled_tensor(value: Any) -> PickledTensor | None:
    """None: not a tensor, or one of another kind (sparse, quantised).

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is malformed.
    """
    if getattr(value, "global_name", None) != _REBUILD:
        return None
    storage, first, shape, strides = value.args[:4]
    _, storage_type, key, *_ = storage.args[0]
    name = storage_type.global_name
    return PickledTensor(_DTYPES.get(name, name), str(key), int(first), ints(shape), ints(strides))


class Records:
    """The records of an opened file of `torch.save`.

    Raises:
        OSError, ValueError, LookupError, struct.error, zipfile.BadZipFile: the file is damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        with zipfile.ZipFile(file) as archive:
            top = archive.namelist()[0].split("/")[0]
            self._infos = {info.filename.removeprefix(f"{top}/"): info for info in archive.infolist()}
            order = archive.read(f"{top}/byteorder").decode() if "byteorder" in self._infos else sys.byteorder
        self.is_of_this_byte_order = order == sys.byteorder

    def place(self, key: str) -> tuple[int, int]:
        """Where the values of a record start in the file, and how many bytes they are."""
        info = self._infos[f"data/{key}"]
        self._file.seek(info.header_offset)
        name_and_extra = struct.unpack("<2H", self._file.read(30)[26:])
        return info.header_offset + 30 + sum(name_and_extra), info.file_size
