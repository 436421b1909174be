"""`docs/reference-defects.md` is the list that every number in code, tests and documents refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "docs" / "reference-defects.md"
ROWS = {cells[0]: cells for cells in re.findall(r"^\| (D-\d+) \|(.*)\|(.*)\|(.*)\|(.*)\|$", LIST.read_text(), re.M)}
TEXTS = {".py", ".md", ".yaml", ".js", ".html", ".sh", ".sbatch", ""}


def cited_numbers(text: str) -> Iterator[str]:
    """Also the middle of `D-15 to D-17`."""
    for first, last in re.findall(r"\b(D-\d\d)(?: to (?:D-)?(\d\d))?", text):
        for number in range(int(first[2:]), int(last or first[2:]) + 1):
            yield f"D-{number:02d}"


def documents() -> Iterator[Path]:
    for name in ("steerlm_nemo", "scripts", "nemo_configs", "containers", "tests", "docs"):
        yield from (path for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix in TEXTS)
    yield from (ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile"))


def test_all_33_are_there_in_order() -> None:
    assert list(ROWS) == [f"D-{number:02d}" for number in range(1, 34)]


def test_every_number_cited_anywhere_is_in_the_list() -> None:
    cited = {
        number: path.relative_to(ROOT)
        for path in documents()
        if path not in (LIST, Path(__file__))
        for number in cited_numbers(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 20  # or the search finds nothing
    assert not {number: path for number, path in cited.items() if number not in ROWS}


@pytest.mark.parametrize("number", ROWS)
def test_the_places_and_tests_of_a_row_exist(number: str) -> None:
    _, defect, here, where, tests = ROWS[number]
    assert len(defect) > 40 and len(here) > 10
    files, names = re.findall("`([^`]+)`", where), re.findall("`([^`]+)`", tests)
    assert bool(files) == bool(names) != (here.strip() == "Not built yet.")
    assert [file for file in files if not (ROOT / file).is_file()] == []
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert [name for name in names if name not in defined] == []
