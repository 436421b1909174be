"""Dockerfiles and launchers: linted, pinned to what was tested, and pointing to things that exist.

No image is built here.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from repository import MAKEFILE, ROOT, config_names, make_commands, missing_references

from steerlm_nemo.compat.capabilities import PINS

CONTAINERS = ROOT / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("Dockerfile*"))
LAUNCHERS = sorted(CONTAINERS.glob("slurm/*"))
TEXTS = sorted(path for path in CONTAINERS.rglob("*") if path.is_file() and path.suffix != ".pyc")
DOCKER_WORDS = {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD", "LABEL", "SHELL", "ENTRYPOINT"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile; continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def pip_installs(text: str) -> Iterator[list[str]]:
    """Words of every `pip install` in a Dockerfile, a Makefile or a shell script, after the word install."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line for line in joined.splitlines() if not line.lstrip().startswith("#"))
    for command in re.split(r"&&|\|\||;|\n", "\n".join(lines)):
        if match := re.search(r"\bpip3?\b.*?\binstall\b(.*)", command):
            yield shlex.split(match[1].replace("$(", "("), comments=True)


def problems(text: str) -> Iterator[str]:
    """What no file of ours may do when it installs packages."""
    for words in pip_installs(text):
        packages = {re.split(r"[=<>!~\[ ]", word)[0].lower() for word in words if not word.startswith("-")}
        if "apex" in packages:
            yield "installs apex from PyPI, where that name is an unrelated package"
        if packages & set(PINS) and "--no-deps" not in words:
            yield "installs the pinned packages with their dependencies, which replaces the base image's torch"
    for word, rest in instructions(text):
        if word in ("ENV", "ARG") and re.search(r"(?i)token|password|secret|api_?key", rest):
            yield f"keeps a secret in the image: {rest}"


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_there_is_an_image_for_each_kind_of_machine_and_a_launcher() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]
    assert [path.name for path in LAUNCHERS] == ["steerlm_flow.sbatch"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_path_target_and_config_that_is_named_exists(path: Path) -> None:
    assert list(missing_references(path.read_text())) == []


def test_references_are_found_and_missing_ones_are_caught() -> None:
    """Control of the test above, and of the config headers' test."""
    slurm = (CONTAINERS / "slurm" / "steerlm_flow.sbatch").read_text()
    assert {"llama2_7b_value", "llama2_70b_steerlm"} <= set(config_names(slurm))
    assert make_commands((CONTAINERS / "Dockerfile.cpu").read_text()) == [("demo", []), ("help", [])]
    bad = (
        "RUN python scripts/nowhere.py\n"
        'CMD ["make", "nothing"]\n'
        "#   make convert WHERE=there\n"
        "#   python scripts/train_gpt_sft.py --config-name=llama3_1b_value\n"
        "CONFIG=llama2_1b sbatch containers/slurm/steerlm_flow.sbatch\n"
    )
    assert sorted(missing_references(bad)) == [
        "no config llama2_1b_steerlm",
        "no config llama2_1b_value",
        "no config llama3_1b_value",
        "no file scripts/nowhere.py",
        "no make target nothing",
        "no make variable WHERE",
    ]


@pytest.mark.parametrize("path", [*TEXTS, ROOT / "Makefile", ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_nothing_installs_the_other_apex_or_keeps_a_secret(path: Path) -> None:
    assert list(problems(path.read_text())) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RUN pip install apex", "apex"),
        ("RUN python -m pip install --no-cache-dir \\\n      einops apex==0.1 \\\n && true", "apex"),
        ("RUN true && uv pip install 'Apex>=0.9'", "apex"),
        ("RUN pip install nemo-aligner==0.7.0", "with their dependencies"),
        ("ENV WANDB_API_KEY=abc", "secret"),
        ("ARG HF_TOKEN", "secret"),
    ],
)
def test_a_bad_dockerfile_is_caught(text: str, expected: str) -> None:
    """Control of the test above."""
    assert [expected in problem for problem in problems(f"FROM scratch\n{text}\n")] == [True]


def test_no_extra_of_the_package_asks_for_apex() -> None:
    names = {Requirement(text).name.lower() for text in importlib.metadata.requires("steerlm-nemo") or ()}
    assert "megatron-core" in names and "apex" not in names


def test_pins_are_the_same_everywhere() -> None:
    def pins_in(text: str) -> dict[str, str]:
        return dict(re.findall(rf"\b({'|'.join(PINS)})==([\w.]+)", text))

    assert pins_in((CONTAINERS / "Dockerfile").read_text()) == PINS
    for extra in ("cpu", "gpu"):
        requirements = map(Requirement, importlib.metadata.requires("steerlm-nemo") or ())
        pinned = {
            r.name: str(r.specifier).removeprefix("==")
            for r in requirements
            if r.name in PINS and r.marker is not None and r.marker.evaluate({"extra": extra})
        }
        assert pinned == PINS, extra


def test_the_cpu_image_installs_the_torch_that_make_setup_installs() -> None:
    wanted = re.search(r"\btorch==[\w.]+", MAKEFILE)
    assert wanted is not None
    first = next(pip_installs((CONTAINERS / "Dockerfile.cpu").read_text()))
    assert wanted[0] in first and "--index-url" in first  # torch before anything that asks for it


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_ends_with_the_check_of_its_environment(path: Path) -> None:
    parsed = instructions(path.read_text())
    assert {word for word, _ in parsed} <= DOCKER_WORDS
    runs = [rest for word, rest in parsed if word == "RUN"]
    assert "python containers/check_image.py" in runs[-1]
    assert not [rest for rest in runs[:-1] if "check_image" in rest]


def test_the_launchers_working_folder_is_the_images() -> None:
    folders = {rest for path in DOCKERFILES for word, rest in instructions(path.read_text()) if word == "WORKDIR"}
    launched = set(re.findall(r"--container-workdir=(\S+)", LAUNCHERS[0].read_text()))
    assert folders == launched and len(folders) == 1


def test_sbatch_reads_the_options_it_needs_to_stop_and_go_on() -> None:
    options = re.findall(r"^#SBATCH (\S+)", LAUNCHERS[0].read_text(), re.MULTILINE)
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_is_sound_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_shellcheck_has_no_remark(path: Path) -> None:
    result = subprocess.run([tool("shellcheck"), path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_no_remark(path: Path) -> None:
    result = subprocess.run([tool("hadolint"), path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def check_image(pythonpath: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CONTAINERS / "check_image.py"],
        env={**os.environ, "PYTHONPATH": str(pythonpath)},
        capture_output=True,
        text=True,
    )


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_tested_environment_passes_its_own_check(tmp_path: Path) -> None:
    pytest.importorskip("nemo_aligner.package_info", reason="needs the training stack")
    result = check_image(tmp_path)
    assert result.returncode == 0, result.stderr


def test_another_environment_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "nemo_aligner").mkdir()
    (tmp_path / "nemo_aligner" / "__init__.py").touch()  # as a source tree on PYTHONPATH
    distribution(tmp_path, "megatron-core", "0.11.0")
    distribution(tmp_path, "apex", "0.9.10")
    distribution(tmp_path, "uvicorn", "0.1")
    result = check_image(tmp_path)
    assert result.returncode == 1
    errors = "\n".join(sorted(result.stderr.splitlines()))
    for expected in (
        "error: apex without its CUDA extension",
        "error: megatron-core is 0.11.0, tested is 0.12.3; install megatron-core==0.12.3 with --no-deps",
        f"error: nemo_aligner is imported from {tmp_path}/nemo_aligner/__init__.py",
        "error: uvicorn is 0.1, needed is uvicorn<0.55,>=0.30",
    ):
        assert expected in errors
    assert "Traceback" not in errors


def test_what_the_build_leaves_out_is_nothing_an_image_needs() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {".git", ".venv", "results", "**/*.nemo", "**/.env"} <= set(ignored)
    for needed in ("steerlm_nemo", "scripts", "nemo_configs", "containers", "tests", "Makefile", "pyproject.toml"):
        assert needed not in ignored and (ROOT / needed).exists()
