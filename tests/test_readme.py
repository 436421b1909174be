"""The README's commands are run, and what it points to exists."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Enough to show that the step works; what a full training reaches is measured by `make demo`.
SHORT_TRAINING = " trainer.sft.max_steps=30 trainer.sft.val_check_interval=15"
HURRY = {"train_gpt_sft.py": SHORT_TRAINING}


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


def on_free_ports(text: str, ports: dict[str, int]) -> str:
    for printed, free in ports.items():
        text = text.replace(printed, str(free))
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: str, folder: Path, env: dict[str, str]) -> str:
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_flow_runs_as_printed(tmp_path: Path) -> None:
    """Both models trained on two ranks, both servers, the clients and the way back to Hugging Face."""
    pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")
    env = {
        **os.environ,
        "SCRIPTS": str(ROOT / "scripts"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    ports = {printed: free_port() for printed in ("1424", "1427")}  # somebody may be using those
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for printed in commands("sh flow"):
            command = on_free_ports(printed, ports)
            command += next((extra for script, extra in HURRY.items() if script in command), "")
            if not command.endswith("&"):
                run(command, tmp_path, env)
                continue
            port = int(re.search(r"port=(\d+)", command)[1])  # type: ignore[index]
            log = tmp_path / f"server{port}.log"
            with log.open("wb") as file:
                server = subprocess.Popen(
                    ["bash", "-c", f"exec {command.removesuffix('&')}"], cwd=tmp_path, env=env, stdout=file, stderr=file
                )
            servers.append(server)
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
    assert (tmp_path / "steerlm-hf" / "config.json").is_file()
    records = [json.loads(line) for line in (tmp_path / "v2t_train.jsonl").read_text().splitlines()]
    assert records and all(record["type"] == "VALUE_TO_TEXT" for record in records)
    assert "<svg" in (tmp_path / "data.html").read_text()
