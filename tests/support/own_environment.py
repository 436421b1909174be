"""Environments beside this one, for programs that cannot live in it: of pinned versions, made when first asked for.

They stay in `.cache/` of the repository, which git ignores; removing it is all it takes to begin again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from repository import ROOT

CACHE = ROOT / ".cache"
TORCH = "torch==2.13.0"  # to be installed before what needs it: that would pull a build with several GB of CUDA
TORCH_INDEX = os.environ.get("TORCH_INDEX")  # as for `make setup`


class NotMade(Exception):
    """A command failed that fetches or builds; the message is one for people."""


def built(path: Path, recipe: str, make: Callable[[Path], None]) -> Path:
    """`path`, a folder made by `make`; made again only where it is missing, was not finished, or its recipe changed."""
    done = path / "made-by.txt"
    if not done.is_file() or done.read_text() != recipe:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        make(path)
        done.write_text(recipe)
    return path


def python_with(name: str, installs: Sequence[str]) -> Path:
    """The interpreter of environment `name`, after `pip install` with each of `installs` in turn.

    Raises NotMade: pip's last words.
    """

    def make(folder: Path) -> None:
        run([sys.executable, "-m", "venv", str(folder)], f"environment {name}")
        for requirements in installs:
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            index = ["--index-url", TORCH_INDEX] if TORCH_INDEX and requirements == TORCH else []
            run([*pip, *index, *requirements.split()], f"environment {name}")

    return built(CACHE / name, "\n".join(installs), make) / "bin/python"


def run(command: Sequence[str], what: str) -> str:
    """What a command printed. Raises NotMade: the last words of one that failed."""
    ended = subprocess.run(command, capture_output=True, text=True, env=environment())
    if ended.returncode:
        said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        raise NotMade(f"{what}: {' '.join(command[:5])} ... ended with exit code {ended.returncode}: {said[-1:]}")
    return ended.stdout


def environment() -> dict[str, str]:
    """Ours without what would make another environment's Python find our packages, or anything ask a hub."""
    mine = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**mine, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
