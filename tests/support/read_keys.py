"""Which keys of a config are read one by one: by us, NeMo, Aligner or Lightning.

    python read_keys.py OUT.json SCRIPT [ARG...]     runs a script of ours and writes the keys down

Copying a section, going through all of it, or looking for what is missing, reads nothing. A copy remembers what it is a
copy of.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Configs that NeMo builds anew from ours are known by what they hold.
_SECTIONS = {"model": {"restore_from_path", "optim", "peft"}, "exp_manager": {"explicit_log_dir", "resume_if_exists"}}


def full_key(config: Any) -> str:
    """Where a config stands in the one that was loaded."""
    if (origin := config.__dict__.get("_origin")) is not None:
        return str(origin)
    parent = config._get_parent()
    if parent is None:
        return next((name for name, keys in _SECTIONS.items() if keys <= set(config.keys())), "")
    above, key = full_key(parent), str(config._key())
    return f"{above}.{key}" if above else key


@contextmanager
def recording() -> Iterator[set[str]]:
    """The full keys read until the block ends."""
    read: set[str] = set()
    off = 0
    get, deepcopy, items = DictConfig._get_impl, DictConfig.__deepcopy__, DictConfig.items_ex
    missing_keys = OmegaConf.missing_keys

    def recording_get(self: DictConfig, key: Any, *args: Any, **kwargs: Any) -> Any:
        if not off:
            prefix = full_key(self)
            read.add(f"{prefix}.{key}" if prefix else str(key))
        return get(self, key, *args, **kwargs)

    def unrecorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal off
            off += 1
            try:
                return original(*args, **kwargs)
            finally:
                off -= 1

        return call

    @unrecorded
    def remembering_copy(self: DictConfig, memo: dict[int, Any]) -> DictConfig:
        copied = deepcopy(self, memo)
        if self._get_parent() is not None or "_origin" in self.__dict__:
            copied.__dict__["_origin"] = full_key(self)
        return copied

    replaced = {"_get_impl": recording_get, "__deepcopy__": remembering_copy, "items_ex": unrecorded(items)}
    for name, function in replaced.items():
        setattr(DictConfig, name, function)
    OmegaConf.missing_keys = staticmethod(unrecorded(missing_keys))  # type: ignore[assignment]
    try:
        yield read
    finally:
        for name, function in {"_get_impl": get, "__deepcopy__": deepcopy, "items_ex": items}.items():
            setattr(DictConfig, name, function)
        OmegaConf.missing_keys = staticmethod(missing_keys)  # type: ignore[assignment]


def main() -> None:
    out, script, *sys.argv = sys.argv[1:3] + sys.argv[2:]
    os._exit = sys.exit  # type: ignore[assignment]  # a server leaves by it, and nothing would be written down
    with recording() as read:
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            Path(out).write_text(json.dumps(sorted(read), indent=1))


if __name__ == "__main__":
    main()
