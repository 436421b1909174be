"""The chat template that travels with a checkpoint: Jinja source, read here and rendered elsewhere.

Hugging Face keeps it in one of two places, and so does a `.nemo`, which holds the same files: `chat_template.jinja`, or
`chat_template` of `tokenizer_config.json`, a text or a list such as
    [{"name": "default", "template": "..."}, {"name": "tool_use", "template": "..."}]
The file wins where both are there, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.errors import CheckpointError

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_CHARACTERS = 2**20  # the longest seen in the wild has some 30,000
_MAX_CONFIG_BYTES = 64 * 2**20  # a tokenizer_config.json may list every added token


def read_chat_template(path: str | Path) -> str | None:
    """The chat template of a `.nemo` file or unpacked folder; None where it has none, or several and no default.

    Raises:
        CheckpointError: not a `.nemo`, or what stands in the template's place is no text of at most `MAX_CHARACTERS`.
    """
    with open_nemo(path) as nemo:
        limits = {CHAT_TEMPLATE: 4 * MAX_CHARACTERS, TOKENIZER_CONFIG: _MAX_CONFIG_BYTES}
        for name, limit in limits.items():
            if nemo.members.get(name, 0) > limit:
                raise CheckpointError(f"{path}:{name}: has {nemo.members[name]} bytes; at most {limit} are read")
        return chat_template_of({name: nemo.read(name) for name in limits if name in nemo.members}, f"{path}:")


def chat_template_of(files: Mapping[str, bytes], where: str) -> str | None:
    """The same, of tokenizer files by name; `where` precedes a name in messages."""
    if CHAT_TEMPLATE in files:
        return _checked(_text(files[CHAT_TEMPLATE], f"{where}{CHAT_TEMPLATE}"), f"{where}{CHAT_TEMPLATE}")
    if TOKENIZER_CONFIG not in files:
        return None
    try:
        config = json.loads(_text(files[TOKENIZER_CONFIG], f"{where}{TOKENIZER_CONFIG}"))
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{where}{TOKENIZER_CONFIG}: not valid JSON: {err}") from err
    found = config.get("chat_template") if isinstance(config, dict) else None
    where = f"{where}{TOKENIZER_CONFIG}: chat_template"
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (KeyError, TypeError) as err:
            raise CheckpointError(f"{where} is a list, but not one of names and templates") from err
    return _checked(found.get("default") if isinstance(found, dict) else found, where)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{where}: not UTF-8: {err}") from err


def _checked(template: Any, where: str) -> str | None:
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where} is {type(template).__name__}, not a text")
    if template is not None and template.startswith("version https://git-lfs"):
        raise CheckpointError(f"{where}: a pointer of git-lfs, not the template itself; run `git lfs pull`")
    if template is not None and len(template) > MAX_CHARACTERS:
        raise CheckpointError(f"{where}: has {len(template)} characters; at most {MAX_CHARACTERS} are read")
    return template if template and template.strip() else None
