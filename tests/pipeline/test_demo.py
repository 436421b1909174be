"""The demo is a view of two flows: what people type, and that it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT

DEMO = ROOT / "scripts" / "demo.py"


def test_fresh_deletes_only_what_the_demo_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = subprocess.run([sys.executable, DEMO, "--fresh", "--output_dir", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and "--fresh would delete" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_started_in_the_background_can_be_stopped_and_resumed(number: int, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    argv = [sys.executable, str(DEMO), "--num_trees", "60", "--seed", "7", "--output_dir", str(out)]
    # Shells start background jobs with SIGINT ignored.
    first = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    deadline = time.monotonic() + 60
    while not (out / "convert").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(number)
    shown, err = first.communicate(timeout=90)
    assert first.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    manifest = json.loads((out / "manifest.json").read_text())
    stages = manifest["stages"]
    assert stages["world"]["done"] and stages["base"]["done"] and "[world]" in shown
    (command,) = stages["world"]["commands"]
    assert command == f"make_toy_world.py --output_dir={out}/world --num_trees=60 --seed=7"
    assert manifest["flow"] == "toy"


def test_data_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, DEMO, "--data", "missing.jsonl.gz", "--output_dir", tmp_path / "demo"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert result.returncode == 2 and "missing.jsonl.gz: no such file" in result.stderr
    assert not (tmp_path / "demo").exists()
