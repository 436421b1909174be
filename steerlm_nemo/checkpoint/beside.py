"""The small files beside the weights of a Hugging Face folder: read whole, or named with what keeps them from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.recognise import what_it_is
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import unreadable

MAX_DEPTH = 40  # of nested lists and objects; a config has four, and the config of a .nemo may have 50


def is_there(path: Path) -> bool:
    """Whether there is a file of that name.

    Raises:
        InputError: something else has it: a directory, a link to nothing, a special file.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: {what_it_is(path)}")
        if not path.exists():
            return False
        if not path.is_file():
            raise InputError(f"{path}: {'a directory' if path.is_dir() else 'a special file'}, where a file is needed")
    except OSError as err:
        raise unreadable(path, err) from err
    return True


def read_if_there(path: Path) -> bytes | None:
    """The content of a file; None where nothing has that name.

    Raises:
        InputError: what has it cannot be read.
    """
    if not is_there(path):
        return None
    try:
        return path.read_bytes()
    except OSError as err:
        raise unreadable(path, err) from err


def json_of(path: Path, data: bytes) -> dict[str, Any]:
    """Raises InputError: not a JSON object, or one that is nested beyond `MAX_DEPTH`."""
    try:
        content = json.loads(data)
    except ValueError as err:
        raise InputError(f"{path}: {what_it_is(path) or f'not valid JSON: {err}'}") from err
    except RecursionError:
        content = None
    if content is None or _depth_exceeds(content, MAX_DEPTH):
        raise InputError(f"{path}: not a configuration: null, or nested more than {MAX_DEPTH} deep")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def json_if_there(path: Path) -> dict[str, Any] | None:
    """Raises InputError: it cannot be read, or is not a JSON object."""
    data = read_if_there(path)
    return None if data is None else json_of(path, data)


def _depth_exceeds(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit):
        level = [
            value
            for container in level
            if isinstance(container, (dict, list))
            for value in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)
