"""Where an output goes: to a file beside its place, which takes the place when it is complete.

A rename replaces whatever has the name. So a name that is a link stands for what it links to: that is replaced, and the
link stays. What is no file, a device or a pipe, would be lost, and is refused; so are a folder that cannot be written
to and a circle of links, before any work is done.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steerlm_nemo.errors import InputError

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")
_MOST_LINKS = 40  # as Linux


def target_of(path: str | Path, *, folder: bool = False) -> Path:
    """What an output of this name is written to: a file, or a folder, or nothing yet. Of a link, what it leads to.

    Raises:
        InputError: something else is there, or the links lead nowhere.
    """
    path = Path(path)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        kind = None
    except OSError as err:
        raise _unwritable(path, err) from err
    wanted = stat.S_IFDIR if folder else stat.S_IFREG
    if kind == stat.S_IFDIR and not folder:
        raise InputError(f"{path} is a directory; name a file to write")
    links = _links(path)
    if kind not in (None, wanted) or any(_DESCRIPTORS.fullmatch(os.path.realpath(link.parent)) for link in links):
        found = "an open file of this process" if kind == wanted else _KINDS.get(kind or 0, "no file")
        raise InputError(
            f"{path} is {found}, which an output would replace: it gets its name when it is complete. "
            f"Name a {'folder' if folder else 'file'} to write."
        )
    target = Path(os.path.realpath(path)) if links else path
    if links and not target.parent.is_dir():
        raise InputError(f"{path} is a link to {target}, and there is no folder {target.parent}. Correct the link.")
    return target


def require_writable(path: str | Path) -> None:
    """Raise InputError unless a file can be written at this path: asked before work that would be lost.

    Folders that are missing are not made yet.
    """
    folder = target_of(path).absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as err:
        raise _unwritable(path, err) from err


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file that takes the place of the output when the block ends without an error, and vanishes otherwise.

    Raises:
        InputError: nothing can be written at this path.
    """
    target = target_of(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a process of this number that was killed
        partial.open("x").close()
    except OSError as err:
        raise _unwritable(path, err) from err
    try:
        yield partial
        if target_of(path) != target:
            raise InputError(f"{path} is a link to another place than when this began. Run the same command again.")
        try:
            partial.replace(target)
        except OSError as err:
            raise _unwritable(path, err) from err
    finally:
        partial.unlink(missing_ok=True)


def remove_earlier(path: str | Path) -> None:
    """Take away what an earlier run wrote under this name. Raises InputError if it is no file."""
    target_of(path).unlink(missing_ok=True)


def _links(path: Path) -> list[Path]:
    links: list[Path] = []
    while path.is_symlink() and len(links) < _MOST_LINKS:
        links.append(path)
        path = path.parent / path.readlink()
    return links


def _unwritable(path: str | Path, err: OSError) -> InputError:
    return InputError(f"{path}: cannot be written here: {err.strerror}. Choose another output path.")
