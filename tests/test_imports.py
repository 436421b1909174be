"""Imports point one way: from a room of the package to rooms below it, never back, never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "steerlm_nemo"

# From the ground up. A room (a folder, or a file beside the folders) may import rooms that stand above it in this list.
ORDER = (
    # what every step speaks
    *(
        "errors",
        "outputs",
        "flags",
        "accepted_keys",
        "config",
        "attributes",
        "conversation",
        "records",
        "record_report",
        "messages",
        "template",
        "tokenizer",
    ),
    "correlation",  # numbers that both data and evaluation state
    "own_template",  # how a model that others trained is asked
    "model_kind",  # what a model answers, and how it is trained
    "ranks",  # processes of one job
    "workers",  # processes that share work
    "compat",  # the pinned stack on this machine
    "checkpoint",  # .nemo and Hugging Face folders
    "data",  # dataset file -> Conversation -> record -> cleaned record
    "toy",  # a world and a Llama that need no download
    "models",  # a .nemo as a model that runs
    "evaluation",  # numbers
    "report",  # numbers as pages and charts
    "training",  # records -> tokens and masks -> .nemo
    "engine",  # generate and score, apart from HTTP
    "client",  # asking a server
    "annotation",  # grading the turns of a file
    "steering",  # asking for responses at attributes
    "serving",  # all of it over HTTP
    "pipeline",  # a flow of all steps
)


def modules(package: Path) -> dict[str, Path]:
    """Dotted name, without the package's own, -> file; `__init__.py` is its folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path], package: str) -> Iterator[str]:
    """The package's modules that a file imports, inside functions too; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([package, *folder[: len(folder) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names] + [base]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            inside = target.removeprefix(f"{package}.")
            if target != inside and inside in known:
                yield inside


def graph(package: Path) -> dict[str, set[str]]:
    known = modules(package)
    return {name: set(imports(name, path, known, package.name)) - {name} for name, path in known.items()}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle, first and last the same; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node in done:
            return []
        for target in sorted(arrows.get(node, ())):
            if found := walk(target, [*above, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


def room(module: str) -> str:
    return module.split(".")[0]


def between_rooms(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for source, targets in arrows.items():
        rooms.setdefault(room(source), set()).update({room(target) for target in targets} - {room(source)})
    return rooms


def test_every_room_is_in_the_order() -> None:
    assert {room(name) for name in modules(PACKAGE)} - {"model_kind"} == {*ORDER} - {"model_kind"}


def test_no_arrow_points_up() -> None:
    upwards = [
        f"{source} imports {target}"
        for source, targets in graph(PACKAGE).items()
        for target in sorted(targets)
        if ORDER.index(room(target)) > ORDER.index(room(source))
    ]
    assert not upwards, "\n".join(upwards)


def test_there_is_no_circle_of_rooms_or_of_files() -> None:
    arrows = graph(PACKAGE)
    assert not circle(between_rooms(arrows))
    assert not circle(arrows)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("from made.beta import x", "def f():\n    from made.alpha import y"),
        ("import made.beta", "from . import alpha"),
        ("from . import beta", "from .alpha import y"),
    ],
)
def test_a_circle_is_found_however_it_is_spelled(tmp_path: Path, one: str, other: str) -> None:
    package = tmp_path / "made"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "alpha.py").write_text(one)
    (package / "beta.py").write_text(other)
    assert circle(graph(package)) == ["alpha", "beta", "alpha"]


def test_what_only_type_checkers_import_is_no_arrow(tmp_path: Path) -> None:
    package = tmp_path / "made"
    package.mkdir()
    (package / "alpha.py").write_text("from made.beta import x")
    (package / "beta.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made import alpha")
    assert circle(graph(package)) == []
