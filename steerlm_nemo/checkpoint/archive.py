"""`.nemo` archives: opened without trusting them, written so that they appear whole or not at all.

A `.nemo` is a plain tar (gzip before NeMo 1.7), or a folder with the same content:
    ./                         the folder entry itself, so that `tar xf file.nemo .` works
    ./model_config.yaml        the resolved config; `tokenizer.model: nemo:NAME` points to the member NAME
    ./NAME                     the tokenizer: `<32 hex>_tokenizer.model` from NeMo, `tokenizer.model` from us
    ./model_weights/...        a distributed checkpoint (see torch_dist.py), or a legacy `model_weights.ckpt`
Every member is checked before the first byte is extracted, and extraction goes to a private folder only.

tarfile parses the headers, and nothing else of it is used: its `extractall` decides member by member, when those before
are written already; it follows links, takes any amount of members and bytes, and reads a model once more to skip it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import os
import posixpath
import secrets
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from steerlm_nemo.checkpoint.pickles import Slice, load_torch_file
from steerlm_nemo.checkpoint.recognise import by_content, what_it_is
from steerlm_nemo.checkpoint.safety import (
    CONFIG_NAME,
    ZARR_ARRAY,
    check_config,
    check_directory,
    is_index,
    is_pickle_file,
    parse_config,
    zarr_array,
)
from steerlm_nemo.checkpoint.streaming import EagerFile
from steerlm_nemo.checkpoint.torch_dist import check_chunks, parse_index
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.outputs import target_of

WEIGHTS_DIR = "model_weights"
MAX_MEMBERS = 100_000
# PAX records that tar writes by itself. `path`, `linkpath` and `GNU.sparse.*` would make a member another one than
# its header says.
_HARMLESS_PAX = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "size"}
_GZIP_MAX_RATIO, _GZIP_ALLOWANCE = 20, 64 * 2**20  # weights hardly compress; small files and padding do
_COPY_BYTES = 4 * 2**20
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass
class NemoFile:
    """An opened `.nemo` whose members have been checked. Lives as long as the `open_nemo` block."""

    path: Path
    members: dict[str, int]  # name without `./` -> size in bytes; files only
    _open: Callable[[str], IO[bytes]] = field(repr=False)
    _extract: Callable[[], Path] = field(repr=False)

    def open(self, name: str) -> IO[bytes]:
        """A member as a seekable file, without extracting anything where the archive is not compressed.

        Raises:
            CheckpointError: there is no such member, or it cannot be read.
        """
        if name not in self.members:
            raise CheckpointError(f"{self.path}: has no member {name}. Members: {', '.join(sorted(self.members)[:8])}")
        try:
            return self._open(name)
        except OSError as err:
            raise CheckpointError(f"{self.path}/{name}: cannot be read: {err.strerror or err}") from err

    def read(self, name: str) -> bytes:
        """A whole member. Raises CheckpointError if there is none of this name."""
        with self.open(name) as member:
            return member.read()

    @cached_property
    def config(self) -> dict[str, Any]:
        """`model_config.yaml`, checked."""
        return _read_config(self)

    @cached_property
    def dir(self) -> Path:
        """The whole content as a folder, every pickle in it checked: for NeMo, which only reads folders and tars."""
        return self._extract()

    def resolve(self, reference: str | None) -> str | None:
        """The member that a config value such as `nemo:tokenizer.model` names; None if it names none.

        A folder whose tokenizer was renamed after extraction (a documented step of the reference) still resolves.
        """
        if not reference or not str(reference).startswith("nemo:"):
            return None
        name = str(reference).removeprefix("nemo:")
        for candidate in (name, name.partition("_")[2]):
            if candidate in self.members:
                return candidate
        return None


def read_config(path: str | Path) -> dict[str, Any]:
    """The checked `model_config.yaml` of a `.nemo`, without extracting any weight."""
    with open_nemo(path) as nemo:
        return nemo.config


@contextmanager
def open_nemo(path: str | Path) -> Iterator[NemoFile]:
    """Open a `.nemo` file (tar or gzip) or folder; every member's name, type and size has been checked.

    Raises:
        CheckpointError: nothing there, not a `.nemo`, damaged or unsafe. The message names the member and the reason.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        opened = None
        try:
            if path.is_dir():
                _require_unpacked(path)
                opened = _open_folder(path)
        except OSError as err:
            raise CheckpointError(f"{err.filename or path}: cannot be read: {err.strerror or err}") from err
        if opened is not None:
            yield opened
            return
        try:
            # One handle for check and use: nobody can swap the file in between. Unbuffered, because each member that
            # is opened has a buffer of its own.
            file = stack.enter_context(path.open("rb", buffering=0))
        except OSError as err:
            raise CheckpointError(
                f"{path}: cannot be opened: {err.strerror}. Expected a .nemo file or folder."
            ) from err
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if is_gzip:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo-")))
            limit = os.fstat(file.fileno()).st_size * _GZIP_MAX_RATIO + _GZIP_ALLOWANCE
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))
            _extract_members(path, unpacked, _list_tar(path, unpacked, limit, compressed=True), folder)  # type: ignore[arg-type]
            opened = _open_folder(folder)
            yield NemoFile(path, opened.members, opened._open, opened._extract)
            return
        infos = _list_tar(path, file, os.fstat(file.fileno()).st_size)
        members = {_name_of(info): info for info in infos if info.isreg()}

        def open_member(name: str) -> IO[bytes]:
            return io.BufferedReader(Slice(file, members[name].offset_data, members[name].size), _COPY_BYTES)

        def extract() -> Path:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo-")))
            _extract_members(path, file, infos, folder)
            check_directory(folder)
            return folder

        yield NemoFile(path, {name: info.size for name, info in members.items()}, open_member, extract)


def extract_nemo(path: str | Path, into: str | Path) -> Path:
    """Extract a checked `.nemo` into the empty or new folder `into`, pickles checked; return the folder.

    Raises:
        CheckpointError: as `open_nemo`; or `into` is not empty.
    """
    into = Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise CheckpointError(f"{into}: exists and is not an empty folder. Choose another one.")
    target = target_of(into, folder=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with open_nemo(path) as nemo:
            for name in nemo.members:
                with nemo.open(name) as member:
                    _write_new_file(staging / name, member)
        check_directory(staging)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return into


def check_nemo(path: str | Path) -> dict[str, Any]:
    """The config of a `.nemo` whose every pickle has been checked, without extracting it: to refuse before NeMo starts.

    Raises:
        CheckpointError: as `open_nemo`, or a pickle is unsafe.
    """
    with open_nemo(path) as nemo:
        config = nemo.config
        check_weights(nemo)
    return config


def check_weights(nemo: NemoFile) -> None:
    """Check every pickle and zarr array of an opened `.nemo` where it lies, without extracting it."""
    for name in sorted(nemo.members):
        where = f"{nemo.path}:{name}"
        if is_pickle_file(name):
            with nemo.open(name) as member:
                load_torch_file(member, where)
        elif posixpath.basename(name) == ZARR_ARRAY:
            zarr_array(nemo.read(name), where)
        elif is_index(name):
            folder = posixpath.dirname(name)
            with nemo.open(name) as member:
                index = parse_index(member, where)
            check_chunks(index, partial(_open_in, nemo, folder), f"{nemo.path}:{folder}")


def _open_in(nemo: NemoFile, folder: str, name: str) -> IO[bytes]:
    return nemo.open(posixpath.join(folder, name))


def _read_config(nemo: NemoFile) -> dict[str, Any]:
    if CONFIG_NAME not in nemo.members:
        inside = f"Members: {', '.join(sorted(nemo.members)[:8])}"
        raise CheckpointError(f"{nemo.path}: has no {CONFIG_NAME}, so it is not a .nemo. {inside}")
    return parse_config(nemo.read(CONFIG_NAME), f"{nemo.path}:{CONFIG_NAME}")


def _require_unpacked(folder: Path) -> None:
    """Name a folder that is a model of another form, before its members are looked at."""
    if (folder / CONFIG_NAME).exists():
        return
    if (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: a Hugging Face folder; scripts/convert_hf_llama_to_nemo.py makes a .nemo of it"
        )
    if (found := what_it_is(folder)) is not None:
        raise CheckpointError(f"{folder}: has no {CONFIG_NAME}, so it is not a .nemo: {found}")


def _raise(err: OSError) -> None:
    raise err


def _open_folder(folder: Path) -> NemoFile:
    members = {}
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in sorted([*folders, *files]):
            entry = Path(root, name)
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise CheckpointError(f"{entry}: a link or special file inside a checkpoint folder. Refused.")
        for name in files:
            entry = Path(root, name)
            members[entry.relative_to(folder).as_posix()] = entry.stat().st_size

    def checked() -> Path:
        check_directory(folder)
        return folder

    return NemoFile(folder, members, lambda name: (folder / name).open("rb"), checked)


class _HeaderReader(io.RawIOBase):
    """What `tarfile` reads while listing: headers. A header that asks for megabytes is an attack on memory."""

    def __init__(self, file: IO[bytes], where: Path) -> None:
        super().__init__()
        self._file, self._where = file, where

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > 2**20:
            raise CheckpointError(f"{self._where}: a tar header claims {size} bytes. Refused.")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _list_tar(path: Path, file: IO[bytes], limit: int, compressed: bool = False) -> list[tarfile.TarInfo]:
    """Every member, checked. `limit` is the size of the file, or how much a compressed one may hold."""
    infos: list[tarfile.TarInfo] = []
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=_HeaderReader(file, path), mode="r:") as tar:  # type: ignore[arg-type]
            # Checked as they come: to go on to the next header of a gzip, tarfile has to unpack this member.
            for info in tar:
                if tar.pax_headers:
                    raise CheckpointError(f"{path}: has a global PAX header, which renames members. Refused.")
                name = _check_member(path, info)
                if name in seen:
                    raise CheckpointError(
                        f"{path}: holds {info.name!r} twice; readers disagree about which counts. Refused."
                    )
                seen.add(name)
                if info.offset_data + info.size > limit:
                    if compressed:
                        raise CheckpointError(
                            f"{path}: {info.name!r} would unpack to {info.offset_data + info.size} bytes, more than "
                            f"{_GZIP_MAX_RATIO} times the file. Refused as a compression bomb."
                        )
                    raise CheckpointError(
                        f"{path}: {info.name!r} claims {info.size} bytes, but the file ends before. "
                        "It is cut off or forged; copy or download it again."
                    )
                infos.append(info)
                if len(infos) > MAX_MEMBERS:
                    raise CheckpointError(f"{path}: more than {MAX_MEMBERS} members. Refused.")
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as err:
        found = by_content(path)
        raise CheckpointError(
            f"{path}: {found or f'not a .nemo archive, or damaged ({err}). Expected a tar.'}"
        ) from err
    if not infos:
        raise CheckpointError(f"{path}: an empty archive. Expected {CONFIG_NAME} and weights.")
    return infos


def _name_of(info: tarfile.TarInfo) -> str:
    return posixpath.normpath(info.name)


def _check_member(path: Path, info: tarfile.TarInfo) -> str:
    """The member's normal name. Raises CheckpointError unless it is a file or folder inside the archive."""
    label = f"{path}: member {info.name!r}"
    if info.issparse():
        raise CheckpointError(f"{label} is a sparse file. Refused.")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        kind = _KINDS.get(info.type, f"of tar type {info.type!r}")
        raise CheckpointError(f"{label} is {kind}. A .nemo holds files and folders only. Refused.")
    if override := sorted(set(info.pax_headers) - _HARMLESS_PAX):
        raise CheckpointError(f"{label} has the PAX record {override[0]!r}, which overrides its header. Refused.")
    if info.name.startswith("/"):
        raise CheckpointError(f"{label} is an absolute path. Refused.")
    if ".." in info.name.split("/") or "\\" in info.name or "\0" in info.name:
        raise CheckpointError(f"{label} leads out of the archive. Refused.")
    return _name_of(info)


def _extract_members(path: Path, file: IO[bytes], infos: list[tarfile.TarInfo], folder: Path) -> None:
    needed, free = sum(info.size for info in infos), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{path}: unpacking needs {needed} bytes in {folder.parent}, which has {free}. "
            "Free some space, or set TMPDIR to a folder on a larger disk."
        )
    for info in infos:
        if info.isreg():
            _write_new_file(folder / _name_of(info), Slice(file, info.offset_data, info.size))


def _write_new_file(target: Path, source: IO[bytes] | Slice) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            shutil.copyfileobj(source, out, _COPY_BYTES)
    except (OSError, EOFError, zlib.error) as err:  # a full disk, a member below one that is a file, a broken gzip
        raise CheckpointError(f"{target}: cannot be unpacked: {err}") from err


class NemoWriter:
    """Writes a `.nemo` in one pass beside its final name, and renames it when it is complete and on disk.

        with NemoWriter(path) as archive:
            archive.add("model_config.yaml", data)
            with archive.member("model_weights/__0_0.distcp") as stream:
                ...

    An exception removes the partial file. A killed process leaves it, under a hidden name; the next writer of the
    same target removes it. Nothing else in the folder is read or touched, a `model_weights/` there least of all
    (D-33: NeMo up to 1.23 would pack that in place of the new weights).
    """

    def __init__(self, path: str | Path, approve: Callable[[Path], None] | None = None) -> None:
        """`approve` is called with the complete file before it is renamed, and raises if it is not to be."""
        self.path = Path(path)
        self._approve = approve
        self._mtime = int(time.time())

    def __enter__(self) -> NemoWriter:
        try:
            if self.path.is_dir():
                raise CheckpointError(f"{self.path}: is a folder; give the name of the .nemo file to write")
            self._target = target_of(self.path)
            folder = self._target.parent  # `.` for a bare filename
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder, self._target.name)
            self._partial = folder / f".{self._target.name}.{secrets.token_hex(8)}.partial"
            self._file = EagerFile(self._partial)
        except OSError as err:
            raise CheckpointError(f"{self.path}: cannot be written: {err.strerror}") from err
        fcntl.flock(self._file, fcntl.LOCK_EX)  # tells `remove_stale` that somebody still writes it
        self._folders: set[str] = set()
        self._add_folder(".")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        try:
            if error is None:
                self._file.write(bytes(2 * tarfile.BLOCKSIZE))
                self._pad(tarfile.RECORDSIZE)
                self._file.sync()
                if self._approve is not None:
                    self._approve(self._partial)
                os.replace(self._partial, self._target)
                _fsync_folder(self._target.parent)
        except OSError as err:
            raise CheckpointError(f"{self.path}: writing failed: {err.strerror}. Nothing was left there.") from err
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.path}: writing failed: {error.strerror}. Nothing was left there.") from error

    def add(self, name: str, data: bytes) -> None:
        """Add a small member."""
        with self.member(name) as stream:
            stream.write(data)

    @contextmanager
    def member(self, name: str) -> Iterator[IO[bytes]]:
        """Add a member whose size is known only once it has been written."""
        for parent in reversed(Path(name).parents):
            self._add_folder(parent.as_posix())
        start = self._file.tell()
        self._header(name, 0, tarfile.REGTYPE)
        yield self._file
        end = self._file.tell()
        self._file.seek(start)
        self._header(name, end - start - tarfile.BLOCKSIZE, tarfile.REGTYPE)
        self._file.seek(end)
        self._pad(tarfile.BLOCKSIZE)

    def _add_folder(self, name: str) -> None:
        if name not in self._folders:
            self._folders.add(name)
            self._header(name, 0, tarfile.DIRTYPE)

    def _header(self, name: str, size: int, kind: bytes) -> None:
        info = tarfile.TarInfo("." if name == "." else f"./{name}")
        info.size, info.type, info.mtime = size, kind, self._mtime
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        # GNU format: a member over 8 GiB still has a header of one block, so its size can be filled in afterwards.
        header = info.tobuf(tarfile.GNU_FORMAT)
        if len(header) != tarfile.BLOCKSIZE:
            raise CheckpointError(f"{self.path}: member name {name!r} is too long for a tar header")
        self._file.write(header)

    def _pad(self, block: int) -> None:
        self._file.write(bytes(-self._file.tell() % block))


def write_nemo(staged_dir: str | Path, out_path: str | Path) -> None:
    """Pack a folder that holds `model_config.yaml`, weights and tokenizer into the `.nemo` `out_path`.

    The old file, or none, stays under that name until the new one is complete. The config goes first, so that
    `read_config` need not look far.

    Raises:
        CheckpointError: no config in the folder, a link in it, or the target cannot be written.
    """
    staged = _open_folder(Path(staged_dir))
    check_config(staged.config, str(staged_dir))
    with NemoWriter(out_path) as archive:
        for name in sorted(staged.members, key=lambda name: (name != CONFIG_NAME, "/" in name, name)):
            with staged.open(name) as source, archive.member(name) as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)


def remove_stale(folder: Path, name: str) -> None:
    """Remove what killed writers of `name` left behind: files, or folders. A writer that is alive holds a lock."""
    for left in folder.glob(f".{name}.*.partial"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
