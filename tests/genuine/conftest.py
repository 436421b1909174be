"""A genuine model, fetched once, and all that is made of it; what was measured is told at the end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nemo_server import served
from own_environment import NotMade, built, python_with, run
from smollm2 import FIGURES, HERE, INSTALLS, NEMO, PLACE, QUESTIONS, VLLM_INSTALLS, Reference, script

_figures: dict[str, str] = {}


@pytest.fixture(scope="session")
def figure() -> Callable[[str, object], None]:
    """Keeps a number for the table at the end of the run."""

    def keep(name: str, value: object) -> None:
        _figures[name] = str(value)

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _figures:
        return
    FIGURES.write_text(json.dumps(_figures, indent=2, ensure_ascii=False) + "\n")
    terminalreporter.section("SmolLM2-135M-Instruct")
    for name, value in _figures.items():
        terminalreporter.write_line(f"| {name} | {value} |")
    terminalreporter.write_line(f"(also in {FIGURES})")


@pytest.fixture(scope="session")
def transformers5() -> Path:
    """The Python of an environment with transformers 5, and with the model's file in it."""
    try:
        return python_with("genuine/venv", INSTALLS)
    except NotMade as err:
        pytest.exit(f"the genuine model cannot be had: {err}", returncode=1)


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The Python of an environment with vLLM for CPUs; where that cannot be had, only what asks for it fails."""
    try:
        return python_with("genuine/vllm", VLLM_INSTALLS)
    except NotMade as err:
        pytest.fail(str(err), pytrace=False)


def _make(what: str, recipe: Path, name: str, *command: object) -> Path:
    """The folder below `PLACE` that a program writes which is given the folder last."""

    def make(folder: Path) -> None:
        run([*map(str, command), str(folder)], what)

    try:
        return built(PLACE / name, recipe.read_text() + QUESTIONS.read_text() + "\n".join(INSTALLS), make)
    except NotMade as err:
        pytest.exit(str(err), returncode=1)


@pytest.fixture(scope="session")
def hf_folder(transformers5: Path) -> Path:
    """The model as transformers 5 saves it, in fp32."""
    (gguf,) = transformers5.parents[1].rglob("SmolLM2-135M-Instruct.Q4_1.gguf")
    program = HERE / "dequantise.py"
    return _make("dequantising", program, "smollm2", transformers5, program, gguf)


@pytest.fixture(scope="session")
def reference(hf_folder: Path, transformers5: Path) -> Reference:
    """Of the folder itself, by transformers 5."""
    program = HERE / "reference.py"
    return Reference.read(_make("the reference", program, "reference", transformers5, program, hf_folder, QUESTIONS))


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder for large files, gone at the end."""
    folder = PLACE / "scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def converted(hf_folder: Path) -> str:
    """What the converter said; NEMO is there. Converted anew in every run: it is ours that is tested."""
    ended = script("convert_hf_llama_to_nemo.py", "--in-file", hf_folder, "--out-file", NEMO)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def exported(converted: str, scratch: Path) -> Path:
    folder = scratch / "exported"
    ended = script("convert_nemo_to_hf_llama.py", "--in-file", NEMO, "--out-file", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="session")
def server(converted: str, figure: Callable[[str, object], None]) -> Iterator[str]:
    """The address of the served model, on one rank with all the threads of this machine."""
    started = time.monotonic()
    with served(NEMO) as url:
        figure("server ready after", f"{time.monotonic() - started:.0f} s")
        yield url
