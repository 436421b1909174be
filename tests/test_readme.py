"""The README's commands are run, and what it points to exists."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_nemo.pipeline.flow import load_flow
from steerlm_nemo.pipeline.launcher import SCRIPTS, ThisMachine
from steerlm_nemo.pipeline.shell import shell_script

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Enough to show that the step works; what a full training reaches is measured by `make demo`, and its bars are missed.
HURRY = {
    "train_gpt_sft.py": " trainer.sft.max_steps=30 trainer.sft.val_check_interval=15",
    "report.py": " || test $? -eq 1",
}


def text_of(block: str) -> str:
    """What the README has between ```BLOCK and ```."""
    found = re.search(rf"^```{block}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no block {block}"
    return found[1]


def commands(block: str) -> list[str]:
    return [line for line in text_of(block).splitlines() if line and not line.startswith("#")]


def test_paths_and_targets_it_names_exist() -> None:
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## What is where")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", tree, re.MULTILINE)
    assert len(cells) > 5
    for cell in cells:
        folder = ROOT
        for name in re.findall(r"[\w./]+", cell):
            path = ROOT / name if (ROOT / name).exists() else folder / name
            assert path.exists(), cell
            folder = path if path.is_dir() and "/" in name else path.parent
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets


def test_make_help_lists_every_target() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert re.search(rf"^  {target} ", result.stdout, re.MULTILINE), target


def test_its_list_of_commands_is_what_the_flow_runs() -> None:
    dry_run, really = (shlex.split(command) for command in commands("sh run"))
    assert dry_run == [*really, "--dry-run"]
    program, verb, path, *settings = really[1:]
    assert (program, verb, path) == ("$SCRIPTS/flow.py", "run", "$SCRIPTS/../nemo_configs/flows/toy.yaml")
    flow = load_flow(ROOT / "nemo_configs" / "flows" / "toy.yaml", settings)
    printed = shell_script(flow.stages, ThisMachine())
    assert text_of("sh flow") == printed.replace(f"{sys.executable} {SCRIPTS}/", "python $SCRIPTS/") + "\n"


def test_a_flow_is_printed_and_run_as_it_says(tmp_path: Path) -> None:
    dry_run, really = commands("sh run")
    printed = run(dry_run, tmp_path, environment())
    assert printed.replace(f"{sys.executable} {SCRIPTS}/", "python $SCRIPTS/") == text_of("sh flow")
    run(f"{really} --only=world", tmp_path, environment())
    assert [path.name for path in (tmp_path / "world").glob("*.gz")] == ["trees.jsonl.gz"]


def environment() -> dict[str, str]:
    """The environment active, as the README has it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "SCRIPTS": str(ROOT / "scripts"), "PATH": path, "OMP_NUM_THREADS": "1"}


def on_free_ports(text: str, ports: dict[str, int]) -> str:
    for printed, free in ports.items():
        text = text.replace(printed, str(free))
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: str, folder: Path, env: dict[str, str]) -> str:
    """Run by bash; when it ends, so has all it started."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{command}\n{out[-2000:]}\n{err[-3000:]}"
    return out


def in_a_hurry(script: str) -> str:
    extra = {name: addition for name, addition in HURRY.items() if name in script}
    assert set(extra) == set(HURRY)
    return "\n".join(
        line + next((addition for name, addition in extra.items() if f"/{name} " in line), "")
        for line in script.splitlines()
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_flow_runs_as_printed(tmp_path: Path) -> None:
    """Both models trained on two ranks, both servers, the clients and the way back to Hugging Face."""
    pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")
    env = environment()
    ports = {printed: free_port() for printed in ("1424", "1427")}  # somebody may be using those
    run(on_free_ports(in_a_hurry(text_of("sh flow")), ports), tmp_path, env)
    assert "<svg" in (tmp_path / "report.html").read_text()
    records = [json.loads(line) for line in (tmp_path / "annotate" / "v2t_train.jsonl").read_text().splitlines()]
    assert records and all(record["type"] == "VALUE_TO_TEXT" for record in records)
    run(text_of("sh look"), tmp_path, env)
    assert (tmp_path / "steerlm-hf" / "config.json").is_file()
    assert "<svg" in (tmp_path / "data.html").read_text()

    servers: list[subprocess.Popen[bytes]] = []
    try:
        for printed in commands("sh ask"):
            command = on_free_ports(printed, ports)
            if not command.endswith("&"):
                assert run(command, tmp_path, env).strip()
                continue
            with (tmp_path / f"server{len(servers)}.log").open("wb") as file:
                server = subprocess.Popen(
                    ["bash", "-c", f"exec {command.removesuffix('&')}"], cwd=tmp_path, env=env, stdout=file, stderr=file
                )
            servers.append(server)
        assert len(servers) == 2
        generated, served, chat, graded = (
            json.loads(run(on_free_ports(command, ports), tmp_path, env)) for command in commands("sh server")
        )
        assert generated["sentences"][0].startswith("Hello")
        assert served["kind"] == "steerlm"
        assert chat["choices"][0]["message"]["role"] == "assistant"
        assert graded["model"] and graded["model"] != served["identity"]
        grades = graded["conversations"][0]["messages"][1]["attributes"]
        assert len(grades) == 6 and all(0 <= grade <= 4 for grade in grades.values())
        (tmp_path / "client.py").write_text(on_free_ports(text_of("python"), ports))
        assert run("python client.py", tmp_path, env).strip()
    finally:
        for server in servers:
            server.terminate()
        codes = [server.wait(timeout=90) for server in servers]
    assert codes == [0, 0]
