"""Megatron's `torch_dist` checkpoints, read and written one tensor at a time without Megatron or process groups.

A folder holds
    metadata.json    which backend wrote it
    common.pt        what is not sharded: an empty dict in a `.nemo`
    .metadata        a pickle: every tensor's dtype, shape and chunks, and where each chunk lies
    __<rank>_<n>.distcp   chunks, each a whole `torch.save` file, one after the other
Chunks are addressed by key and offset in the global tensor, so a checkpoint can be read at any tensor or pipeline
parallel size, whatever wrote it. Reading parses `.metadata` with `InertUnpickler`: nothing in it is trusted.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from steerlm_nemo.checkpoint.pickles import Slice, load_inert, load_torch_file
from steerlm_nemo.checkpoint.safetensors_io import ITEM_SIZE
from steerlm_nemo.checkpoint.torch_files import STORAGES, Records, contiguous, ints, pickled_tensor
from steerlm_nemo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = ".metadata"
DATA_FILE = "__0_0.distcp"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Offset = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Part of a global tensor and where it lies: a `torch.save` file, or its bare bytes (zarr)."""

    offset: Offset
    shape: tuple[int, ...]
    file: str
    start: int
    num_bytes: int
    is_bare: bool = False


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # as torch spells it, without the `torch.`
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """A pickled object, such as Transformer Engine's `_extra_state`."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Index:
    """The content of `.metadata`."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]

    def files(self) -> set[str]:
        return {chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks} | {
            stored.file for stored in self.objects.values()
        }


def parse_index(file: IO[bytes], where: str) -> Index:
    """Parse and check `.metadata`.

    Raises:
        CheckpointError: unsafe, damaged, a file name that leaves the folder, or chunks that do not cover a tensor.
    """
    root = load_inert(file, where)
    try:
        places = {}
        for index, info in root.state["storage_data"].items():
            fields = index.state
            offset = fields.get("offset")
            places[fields["fqn"], None if offset is None else ints(offset)] = (
                str(info.state["relative_path"]),
                int(info.state["offset"]),
                int(info.state["length"]),
            )
            if info.state.get("transform_descriptors"):
                raise CheckpointError(f"{where}: {fields['fqn']} is stored transformed, which is not supported")
        tensors, objects = {}, {}
        for key, stored in root.state["state_dict_metadata"].items():
            if stored.global_name.endswith("BytesStorageMetadata"):
                objects[key] = StoredObject(*places[key, None])
                continue
            chunks = tuple(
                Chunk(offset, ints(chunk.state["sizes"]), *places[key, offset])
                for chunk in stored.state["chunks"]
                for offset in [ints(chunk.state["offsets"])]
            )
            dtype = stored.state["properties"].state[0].global_name.removeprefix("torch.")
            tensors[key] = StoredTensor(dtype, ints(stored.state["size"]), chunks)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as err:
        raise CheckpointError(
            f"{where}: not the index of a distributed checkpoint ({err!r}). The file is damaged."
        ) from err
    index = Index(tensors, objects)
    for name in index.files():
        if "/" in name or "\\" in name or not name.endswith(".distcp"):
            raise CheckpointError(f"{where}: names the data file {name!r}, which is not a .distcp beside it. Refused.")
    for key, tensor in tensors.items():
        if sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(tensor.shape):
            raise CheckpointError(f"{where}: the chunks of {key} do not add up to its shape {list(tensor.shape)}")
    return index


def check_index(path: Path) -> None:
    """Check an index file and the pickle of every chunk and object it points to, in the folder where it lies."""
    with path.open("rb") as file:
        index = parse_index(file, str(path))
    check_chunks(index, lambda name: (path.parent / name).open("rb"), str(path.parent))


def check_chunks(index: Index, open_file: Callable[[str], IO[bytes]], where: str) -> None:
    """Check the pickle inside every chunk and object. Reads their zip directories, not their data."""
    for key, file, start, num_bytes in _places(index):
        name = f"{where}/{file}: {key}"
        try:
            with open_file(file) as stream:
                load_torch_file(io.BufferedReader(Slice(stream, start, num_bytes)), name)
        except OSError as err:
            raise CheckpointError(f"{name}: cannot be read: {err}") from err


def changed_chunks(index: Index, open_file: Callable[[str], IO[bytes]], where: str) -> Iterator[str]:
    """A line for every chunk and object whose bytes are not those of the CRC-32 that torch stored with them.

    Reads everything. torch itself never compares these sums when it loads.
    """
    for key, file, start, num_bytes in _places(index):
        try:
            with open_file(file) as stream, zipfile.ZipFile(Slice(stream, start, num_bytes)) as archive:
                changed = archive.testzip()
            if changed is not None:
                yield f"{where}/{file}: {key} is not what was written: its CRC-32 differs ({changed})"
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error) as err:
            yield f"{where}/{file}: {key} cannot be read: {err}"


def _places(index: Index) -> Iterator[tuple[str, str, int, int]]:
    for key, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            if not chunk.is_bare:
                yield key, chunk.file, chunk.start, chunk.num_bytes
    for key, stored in index.objects.items():
        yield key, stored.file, stored.start, stored.num_bytes


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor, or of one layer of it, that lie in a data file as they do in memory."""

    file: str
    start: int
    first: int
    count: int


def stored_rows(
    tensor: StoredTensor, leading: int | None, open_file: Callable[[str], IO[bytes]], where: str
) -> list[StoredRows] | None:
    """Where all rows of `read_slab`'s result lie, first to last, so that they can be copied without loading a tensor.

    None where that is not so: ranks have split the rows, or the storage is not plain.

    Raises:
        CheckpointError: a chunk is damaged.
    """
    found = []
    shape = tensor.shape if leading is None else tensor.shape[1:]
    for chunk in tensor.chunks:
        offset, sizes, skipped = chunk.offset, chunk.shape, 0
        if leading is not None:
            skipped = leading - offset[0]
            if not 0 <= skipped < sizes[0]:
                continue
            offset, sizes = offset[1:], sizes[1:]
        start = None if sizes[1:] != shape[1:] else _start_of_values(chunk, tensor.dtype, open_file, where)
        if start is None:
            return None
        start += skipped * math.prod(sizes) * ITEM_SIZE[tensor.dtype]
        found.append(StoredRows(chunk.file, start, offset[0], sizes[0]))
    found.sort(key=lambda rows: rows.first)
    ends = [0, *(rows.first + rows.count for rows in found)]
    return found if [*(rows.first for rows in found), shape[0]] == ends else None


def _start_of_values(chunk: Chunk, dtype: str, open_file: Callable[[str], IO[bytes]], where: str) -> int | None:
    """Where in its data file the values of a chunk begin, if they lie there contiguous and in this machine's order."""
    name = f"{where}/{chunk.file}"
    if chunk.is_bare or dtype not in STORAGES:
        return None
    try:
        with open_file(chunk.file) as stream, Slice(stream, chunk.start, chunk.num_bytes) as part:
            file = io.BufferedReader(part)
            tensor = pickled_tensor(load_torch_file(file, name))
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, chunk.shape) or not tensor.is_plain:
                return None
            records = Records(file)
            if not records.is_of_this_byte_order:
                return None
            start, num_bytes = records.place(tensor.record)
            if (tensor.first + math.prod(tensor.shape)) * ITEM_SIZE[dtype] > num_bytes:
                return None
            if start + num_bytes > chunk.num_bytes:
                return None
            return chunk.start + start + tensor.first * ITEM_SIZE[dtype]
    except (OSError, AttributeError, LookupError, TypeError, ValueError, struct.error, zipfile.BadZipFile) as err:
        raise CheckpointError(f"{name}: damaged ({type(err).__name__}: {str(err)[:200]})") from err


def read_slab(
    tensor: StoredTensor, leading: int | None, open_file: Callable[[str], IO[bytes]], where: str
) -> torch.Tensor:
    """A global tensor, or `tensor[leading]` where `leading` is given, assembled from its chunks.

    Holds the result and one chunk. torch reads the chunks with `weights_only`.

    Raises:
        CheckpointError: a chunk is damaged or has another shape or dtype than the index says.
    """
    import torch

    dtype = getattr(torch, tensor.dtype)
    shape = tensor.shape if leading is None else tensor.shape[1:]
    result: torch.Tensor | None = None
    for chunk in tensor.chunks:
        first, count = (chunk.offset[0], chunk.shape[0]) if chunk.shape else (0, 1)
        if leading is not None and not first <= leading < first + count:
            continue
        try:
            with open_file(chunk.file) as stream:
                source = io.BufferedReader(Slice(stream, chunk.start, chunk.num_bytes), 2**20)
                if chunk.is_bare:
                    loaded = torch.frombuffer(bytearray(source.read()), dtype=dtype).reshape(chunk.shape)
                else:
                    loaded = torch.load(source, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except Exception as err:  # torch raises many types for a damaged file
            raise CheckpointError(f"{where}/{chunk.file}: damaged ({type(err).__name__}: {str(err)[:200]})") from err
        if tuple(loaded.shape) != chunk.shape or loaded.dtype != dtype:
            raise CheckpointError(
                f"{where}/{chunk.file}: a chunk is {list(loaded.shape)} {loaded.dtype}, "
                f"the index says {list(chunk.shape)} {dtype}. The checkpoint is damaged."
            )
        offset, sizes = chunk.offset, chunk.shape
        if leading is not None:
            loaded, offset, sizes = loaded[leading - first], offset[1:], sizes[1:]
        if sizes == shape:
            return loaded
        if result is None:
            result = torch.empty(shape, dtype=dtype)
        result[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))] = loaded
    if result is None:
        raise CheckpointError(f"{where}: no chunk holds row {leading} of a tensor of shape {list(tensor.shape)}")
    return result


class TorchDistWriter:
    """Appends chunks to one data file; `index()` is then the content of `.metadata`.

    By hand, because torch.save wants whole tensors in memory and imports torch: a model of 1.1 GB is converted in 0.7 s
    and 41 MB instead of 19 s and 3.7 GB. Nothing but weights and empty states is written; the rest is torch's.

    Args:
        stream: receives the data file `__0_0.distcp`; only `write` is used.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = _Counting(stream)
        self._tensors: dict[str, Any] = {}
        self._chunks: dict[str, list[_Stored]] = {}
        self._places: dict[_Stored, _Stored] = {}

    def add(
        self,
        key: str,
        global_shape: tuple[int, ...],
        offset: Offset,
        shape: tuple[int, ...],
        dtype: str,
        data: Iterable[memoryview],
    ) -> None:
        """Write one chunk of the global tensor `key`: `shape` values of `dtype` (as torch spells it), rows first.

        `data` is its bytes in pieces; a piece is given to `stream.write` before the next is asked for.
        """
        if key not in self._tensors:
            self._chunks[key] = []
            properties = _Stored(f"{_METADATA} TensorProperties", state=_properties(dtype))
            self._tensors[key] = _Stored(
                f"{_METADATA} TensorStorageMetadata",
                state={"properties": properties, "size": _size(global_shape), "chunks": self._chunks[key]},
            )
        place = {"offsets": _size(offset), "sizes": _size(shape)}
        self._chunks[key].append(_Stored(f"{_METADATA} ChunkStorageMetadata", state=place))
        index = {"fqn": key, "index": None, "offset": _size(offset)}
        self._save(index, _tensor(shape, dtype), math.prod(shape) * ITEM_SIZE[dtype], data)

    def add_object(self, key: str, value: object) -> None:
        """Write an object as Megatron writes a `ShardedObject`; `key` ends in `/shard_<index>_<count>`."""
        self._tensors[key] = _Stored(f"{_METADATA} BytesStorageMetadata")
        self._save({"fqn": key, "index": None}, [value])

    def _save(self, index: dict[str, Any], value: object, num_bytes: int = 0, data: Iterable[memoryview] = ()) -> None:
        start = self._stream.num_bytes
        _write_torch_file(self._stream, value, num_bytes, data)
        place = {"relative_path": DATA_FILE, "offset": start, "length": self._stream.num_bytes - start}
        self._places[_Stored(f"{_METADATA} MetadataIndex", state=index)] = _Stored(
            "torch.distributed.checkpoint.filesystem _StorageInfo", state=place
        )

    def index(self) -> bytes:
        state: dict[str, Any] = {
            "state_dict_metadata": self._tensors,
            "planner_data": None,
            "storage_data": self._places,
            "storage_meta": None,
            "version": None,
            # Megatron looks here for the original shape of flattened optimizer tensors; weights have no entry.
            "mcore_data": {key: {} for key in self._chunks},
        }
        return _pickle_of(_Stored(f"{_METADATA} Metadata", state=state))


def _write_torch_file(stream: IO[bytes] | _Counting, value: object, num_bytes: int, data: Iterable[memoryview]) -> None:
    """What `torch.save` writes: a zip of a pickle, the bytes of the storage that it names, and a version.

    torch wants a whole tensor in memory, sums it up, and only then writes. Here pieces are summed up while others are
    read and written.
    """
    with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[call-overload]
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickle_of(value))
        if num_bytes:
            record = zipfile.ZipInfo("archive/data/0")
            record.file_size = num_bytes  # beyond 4 GiB it needs another header
            with archive.open(record, "w") as file:
                for piece in data:
                    file.write(piece)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _tensor(shape: tuple[int, ...], dtype: str) -> _Stored:
    """As torch pickles a contiguous tensor, its storage being record 0 of the zip."""
    storage = _Persistent(("storage", _Global(f"torch {STORAGES[dtype]}"), "0", "cpu", math.prod(shape)))
    hooks = _Stored("collections OrderedDict", args=())
    return _Stored("torch._utils _rebuild_tensor_v2", args=(storage, 0, shape, contiguous(shape), False, hooks))


# Pickles are written without the classes they name: torch takes a second to import, its checkpoint package another.

_METADATA = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, eq=False)
class _Stored:
    """An object of class `name` ("module class") made without arguments and given `state`, or a call with `args`."""

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Persistent:
    """Something outside the pickle, which the reader finds by `id`."""

    id: tuple[Any, ...]


def _size(shape: Iterable[int]) -> _Stored:
    return _Stored("torch Size", args=(tuple(shape),))


def _properties(dtype: str) -> tuple[Any, ...]:
    """The state of torch's TensorProperties: dtype, layout, requires_grad, memory format, pin_memory."""
    layout = _Stored("torch.serialization _get_layout", args=("torch.strided",))
    contiguous = _Stored(f"{_METADATA} _MEM_FORMAT_ENCODING", args=(0,))
    return (_Global(f"torch {dtype}"), layout, False, contiguous, False)


def _pickle_of(value: Any) -> bytes:
    return b"\x80\x02" + b"".join(_pickled(value)) + pickle.STOP


def _pickled(value: Any) -> Iterator[bytes]:
    """`value` in the opcodes of pickle protocol 2."""
    if isinstance(value, _Global):
        yield pickle.GLOBAL + value.name.replace(" ", "\n").encode() + b"\n"
    elif isinstance(value, _Stored):
        yield from _pickled(_Global(value.name))
        yield from _pickled(value.args or ())
        yield pickle.NEWOBJ if value.args is None else pickle.REDUCE
        if value.state is not None:
            yield from _pickled(value.state)
            yield pickle.BUILD
    elif isinstance(value, _Persistent):
        yield from _pickled(value.id)
        yield pickle.BINPERSID
    elif isinstance(value, (tuple, list)):
        yield pickle.MARK
        for item in value:
            yield from _pickled(item)
        yield pickle.TUPLE if isinstance(value, tuple) else pickle.LIST
    elif isinstance(value, dict):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, item in value.items():
            yield from _pickled(key)
            yield from _pickled(item)
        yield pickle.SETITEMS
    else:  # None, bool, int, str
        yield pickle.dumps(value, protocol=2)[2:-1]


class _Counting:
    """Counts what passes, so that a chunk's place is known on a stream that cannot tell."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def common_and_backend() -> tuple[bytes, bytes]:
    """The content of `common.pt` (nothing is unsharded) and of `metadata.json`."""
    common = io.BytesIO()
    _write_torch_file(common, {}, 0, ())
    return common.getvalue(), json.dumps(BACKEND).encode()
