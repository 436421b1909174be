"""Pickles and files of torch.save parsed without building anything that they name.

Loading a checkpoint unpickles: `common.pt`, `.metadata`, `*.ckpt`, the byte objects inside `*.distcp`. Here the same
bytes are read by `InertUnpickler`, which turns every pickled class and call into a passive `Inert`, and refuses names
that are not on the list. Pickle's own format has no reader that does not import; `pickletools` only lists opcodes.

What is refused is a `CheckpointError`; a damaged file that cannot be parsed is one too.
"""

from __future__ import annotations

import _compat_pickle
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable
from typing import IO, Any

from steerlm_nemo.errors import CheckpointError

_DTYPES = "float64 float32 float16 bfloat16 uint8 int8 int16 int32 int64 bool float8_e4m3fn float8_e5m2"
_STORAGES = "Double Float Half BFloat16 Byte Char Short Int Long Bool"
_BUILTINS = "bytearray complex dict float frozenset int list set slice str tuple"
_DCP = "torch.distributed.checkpoint"
ALLOWED_GLOBALS = frozenset(
    [
        # tensors
        *(f"torch.{name}" for name in _DTYPES.split()),
        *(f"torch.{name}Storage" for name in _STORAGES.split()),
        *("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.Size", "torch.device"),
        *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
        *("torch.serialization._get_layout", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.ByteTensor"),
        # the index of a distributed checkpoint, as torch and Megatron write it
        *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Tensor", "Bytes", "Chunk")),
        f"{_DCP}.metadata.TensorProperties",
        *(f"{_DCP}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
        *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),
        # plain containers and numbers
        *("collections.OrderedDict", "collections.defaultdict", "argparse.Namespace", "_io.BytesIO", "_codecs.encode"),
        *(f"builtins.{name}" for name in _BUILTINS.split()),
        *(f"numpy.{name}" for name in ("ndarray", "dtype")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        # resolved configs inside training checkpoints
        *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"),
        *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any"),
        # Transformer Engine's FP8 scaling state
        *(f"transformer_engine.common.recipe.{name}" for name in ("DelayedScaling", "Format", "_FormatHelper")),
    ]
)
_ZIP_MAGIC = b"PK\x03\x04"


class Inert:
    """Stands for anything a pickle builds: keeps the name, the arguments and the state, and does nothing."""

    global_name = ""

    args: tuple[Any, ...]
    state: Any
    entries: list[Any]

    def __new__(cls, *args: Any) -> Inert:  # a pickle may build an object without calling __init__
        self = super().__new__(cls)
        self.args, self.state, self.entries = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, value: Any) -> None:
        self.entries.append(value)

    add = append

    def extend(self, values: Iterable[Any]) -> None:
        self.entries.extend(values)


class InertUnpickler(pickle.Unpickler):
    """Parses a pickle into `Inert` objects, `builtins` containers and numbers. Nothing that it names is imported."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file)
        self._where = where
        self.byte_buffers: list[bytes] = []

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes protocol 2, in which Python 3 spells its own names as Python 2 did.
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        full = f"{module}.{name}"
        if full not in ALLOWED_GLOBALS:
            raise CheckpointError(
                f"{self._where}: its pickle asks for {full}, which is not needed to rebuild tensors and could run "
                "code. Refused; get the checkpoint from a source you trust, as safetensors if possible."
            )
        if full == "_codecs.encode":  # how protocol 2 spells bytes
            return _latin1
        buffers = self.byte_buffers

        class Named(Inert):
            global_name = full

            def __setstate__(self, state: Any) -> None:
                super().__setstate__(state)
                if full == "_io.BytesIO" and isinstance(state, tuple) and state and isinstance(state[0], bytes):
                    buffers.append(state[0])

        return Named

    def persistent_load(self, pid: Any) -> Any:
        return Inert(pid)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes spelled in {encoding!r}")
    return text.encode("latin1")


def load_inert(file: IO[bytes], where: str) -> Any:
    """Parse one pickle. Buffers inside it (Transformer Engine keeps a whole saved file in one) are checked too.

    Raises:
        CheckpointError: a name is not allowed, or the bytes are not a pickle.
    """
    unpickler = InertUnpickler(file, where)
    try:
        result = unpickler.load()
    except CheckpointError:
        raise
    except Exception as err:  # a malformed pickle can raise nearly anything
        raise CheckpointError(
            f"{where}: not a readable pickle ({type(err).__name__}: {err}). The file is damaged."
        ) from err
    for buffer in unpickler.byte_buffers:
        check_pickled_bytes(buffer, where)
    return result


def check_pickled_bytes(data: bytes, where: str) -> None:
    """Check bytes that a library would unpickle: nothing at all, a torch file or a bare pickle."""
    if data.startswith(_ZIP_MAGIC):
        load_torch_file(io.BytesIO(data), where)
    elif data:
        load_inert(io.BytesIO(data), where)


def load_torch_file(file: IO[bytes], where: str) -> Any:
    """Parse a file of `torch.save` (torch 1.6 or later) without its tensor data.

    torch finds its records with another zip reader than ours, so anything on which two readers could disagree
    (two directories, names that differ in case only, two top folders) is refused.

    Raises:
        CheckpointError: not such a file, or its pickle names something that is not allowed.
    """
    file.seek(0)
    if file.read(4) != _ZIP_MAGIC:
        raise CheckpointError(
            f"{where}: not a file of torch.save from torch 1.6 or later. Refused. "
            "If you trust it, load it with torch and save it again."
        )
    try:
        _require_one_directory(file, where)
        with zipfile.ZipFile(file) as archive:
            names = [info.orig_filename for info in archive.infolist()]
            folded = {name.casefold() for name in names}
            if len(folded) < len(names) or len({name.split("/")[0] for name in names}) != 1:
                raise CheckpointError(
                    f"{where}: the zip inside has doubtful record names {sorted(names)[:4]}. Refused."
                )
            if any(name.split("/")[1:2] in (["constants.pkl"], ["code"]) for name in folded):
                raise CheckpointError(f"{where}: a TorchScript program, not a checkpoint. Refused.")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise CheckpointError(f"{where}: has compressed records, which torch never writes. Refused.")
            pickles = [name for name in names if name.casefold().endswith(".pkl")]
            if len(pickles) != 1 or not pickles[0].endswith("/data.pkl") or pickles[0].count("/") != 1:
                raise CheckpointError(f"{where}: expected one data.pkl inside, found {pickles}. The file is damaged.")
            result = load_inert(io.BytesIO(archive.read(pickles[0])), where)
            if "_extra_state" in where:
                # Transformer Engine unpickles the bytes of a uint8 tensor.
                for name in names:
                    if "/data/" in name:
                        check_pickled_bytes(archive.read(name), where)
            return result
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as err:
        raise CheckpointError(f"{where}: damaged: {err}") from err


def _require_one_directory(file: IO[bytes], where: str) -> None:
    """Refuse a zip whose end does not follow its directory at the place that it names.

    Python takes the directory that lies before the end, torch the one that the end points to: with other data in
    between (a second archive appended to the first is enough) they read different files.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end = struct.unpack("<4s4H2LH", tail[-22:])
    directory, start_of_end = end[5] + end[6], size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # the 64-bit end, which torch always writes
        if struct.unpack("<Q", tail[-34:-26])[0] != size - 98 or tail[:4] != b"PK\x06\x06":
            directory = -1
        else:
            directory, start_of_end = sum(struct.unpack("<2Q", tail[40:56])), size - 98
    if end[0] != b"PK\x05\x06" or end[7] or directory != start_of_end:
        raise CheckpointError(
            f"{where}: its zip does not end where its directory does, so two readers could read different files in it. "
            "Refused; it is damaged, or two archives in one."
        )
    file.seek(0)


class Slice(io.RawIOBase):
    """A window of an open file that reads like a file of its own. Closing it leaves the file open."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count
