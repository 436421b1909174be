"""What texts of this repository (config headers, Dockerfiles, launchers) refer to, and whether it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
MAKE_VARIABLES = set(re.findall(r"^(\w+) *\?=", MAKEFILE, re.MULTILINE))

_PATH = re.compile(r"(?<![\w/])(?:scripts|nemo_configs|containers|steerlm_nemo|tests)/[\w./-]*\w")
# `make` on an indented line, in brackets, after a comma or another command, in a JSON list; not the verb of a sentence.
_MAKE = re.compile(r"(?:^#? {2,}|[(,;&] *|-cpu |\")make\"?,? +\"?([a-z-]+)(?:((?: +[A-Z]+=\S+)*))", re.MULTILINE)


def missing_references(text: str) -> Iterator[str]:
    """Paths, make targets, make variables and configs that `text` names and this repository does not have."""
    for path in _PATH.findall(text):
        if not (ROOT / path).exists():
            yield f"no file {path}"
    for target, variables in make_commands(text):
        if target not in MAKE_TARGETS:
            yield f"no make target {target}"
        for variable in variables:
            if variable not in MAKE_VARIABLES:
                yield f"no make variable {variable}"
    for name in config_names(text):
        if not (ROOT / "nemo_configs" / f"{name}.yaml").is_file():
            yield f"no config {name}"


def make_commands(text: str) -> list[tuple[str, list[str]]]:
    """(target, variables given) of every `make` in `text`."""
    return [(target, re.findall(r"([A-Z]+)=", rest)) for target, rest in _MAKE.findall(text)]


def config_names(text: str) -> list[str]:
    """Configs named by `--config-name=NAME` or make's `CONFIG=NAME`; the Slurm script's CONFIG is a family of two."""
    names = re.findall(r"--config-name=(\w+)", text)
    names += re.findall(r"\bmake [^\n]*\bCONFIG=(\w+)", text)
    families = re.findall(r"\bCONFIG=(\w+)[^\n]* sbatch\b", text) + re.findall(
        r"^CONFIG=\$\{CONFIG:-(\w+)\}", text, re.M
    )
    return names + [f"{family}_{kind}" for family in families for kind in ("value", "steerlm")]
