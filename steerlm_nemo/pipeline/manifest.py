"""manifest.json of a flow's folder: what each stage read, ran and wrote, and whether that still holds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm_nemo import __version__
from steerlm_nemo.compat.capabilities import PINS
from steerlm_nemo.errors import InputError
from steerlm_nemo.pipeline.flow import Stage
from steerlm_nemo.pipeline.launcher import SCRIPTS
from steerlm_nemo.records import atomic_output

MANIFEST = "manifest.json"


class Manifest:
    """Entries by stage: `done`, `commands`, `servers`, `inputs` and `outputs` with their hashes, `seconds`, `versions`.

    `files` remembers what was hashed, so that a file of the same inode, size and time is not read again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / MANIFEST
        self._content: dict[str, Any] = {"flow": "", "parameters": {}, "stages": {}, "files": {}}
        if self._path.is_file():
            try:
                self._content |= dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as err:
                raise InputError(
                    f"{self._path} is damaged: {err}. Move it away with its folder, and run again."
                ) from err

    def describe(self, flow: str, parameters: Mapping[str, Any]) -> None:
        self._content |= {"flow": flow, "parameters": dict(parameters)}

    def entry(self, stage: Stage) -> dict[str, Any] | None:
        return self._content["stages"].get(stage.name)

    def forget(self, stages: Sequence[Stage]) -> None:
        """Nothing these stages have done counts any more; their folders stay known as ours."""
        for stage in stages:
            if stage.name in self._content["stages"]:
                self._content["stages"][stage.name] = {"done": False, "commands": [], "seconds": {}}

    def begin(self, stage: Stage, goes_on: bool) -> dict[str, float]:
        """Save that the stage is under way; returns its seconds by part, to be added to."""
        entry = self._content["stages"].pop(stage.name, {})
        seconds: dict[str, float] = entry["seconds"] if goes_on else {}
        state = {"done": False, **self._state(stage), "outputs": {}, "seconds": seconds, "versions": versions()}
        self._content["stages"][stage.name] = state
        self.save()
        return seconds

    def finish(self, stage: Stage) -> None:
        entry = self._content["stages"][stage.name]
        entry |= {"done": True, "outputs": {str(path): self._hash(path) for path in stage.outputs}}
        self.save()

    def changes(self, stage: Stage) -> list[str]:
        """Why the stage cannot go on from what it has done: its commands or what they read is not the same."""
        entry = self._content["stages"][stage.name]
        state = self._state(stage)
        found = [f"other {key}" for key in ("commands", "servers") if entry.get(key) != state[key]]
        before = entry.get("inputs", {})
        return found + [f"{path} changed" for path, digest in state["inputs"].items() if before.get(path) != digest]

    def damage(self, stage: Stage) -> Iterator[tuple[Path, str]]:
        """Outputs that are not as the stage left them, and how."""
        for path, digest in self._content["stages"][stage.name].get("outputs", {}).items():
            if not Path(path).exists():
                yield Path(path), "is gone"
            elif self._hash(Path(path)) != digest:
                yield Path(path), "was changed by somebody else"

    def seconds(self, stages: Sequence[Stage]) -> dict[str, float]:
        """Of each part of these stages in order, attempts that were interrupted included."""
        entries = [self.entry(stage) for stage in stages]
        return {name: seconds for entry in entries if entry is not None for name, seconds in entry["seconds"].items()}

    def save(self) -> None:
        with atomic_output(self._path) as file:
            file.write(json.dumps(self._content, indent=1) + "\n")

    def _state(self, stage: Stage) -> dict[str, Any]:
        return {
            "commands": [shlex.join(command) for command in stage.commands],
            "servers": {server.name: shlex.join(server.command) for server in stage.servers},
            "inputs": {str(path): self._hash(path) for path in stage.inputs},
        }

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file's content, or of a folder's: names and hashes of the files in it."""
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            lines = "".join(f"{self._hash(file)} {file.relative_to(path)}\n" for file in inside)
            return hashlib.sha256(lines.encode()).hexdigest()
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        status = path.stat()
        identity = [status.st_ino, status.st_size, status.st_mtime_ns]
        known = self._content["files"].get(str(path))
        if known is None or known["identity"] != identity:
            known = {"identity": identity, "sha256": _sha256(path)}
            self._content["files"][str(path)] = known
        return known["sha256"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of this repository, Python and the pinned packages, as this process finds them."""
    found = {"steerlm_nemo": __version__, "python": platform.python_version()}
    if commit := _commit():
        found["commit"] = commit
    for name in ("torch", *PINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed here"
    return found


def _commit() -> str:
    """Of a checkout, with -dirty where it was edited; empty elsewhere."""
    if not (SCRIPTS.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(SCRIPTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    except OSError:
        return ""
    return result.stdout.strip()
