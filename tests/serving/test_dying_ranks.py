"""What becomes of a server of two ranks when one of them dies or fails: an end with a reason, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import live
import pytest

pytest.importorskip("nemo", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    convert = [
        sys.executable,
        ROOT / "scripts/convert_hf_llama_to_nemo.py",
        "--no_check",
        "--out-file",
        folder / "tiny.nemo",
    ]
    subprocess.run([*convert, "--in-file", live.model_folder(None)], check=True, capture_output=True)
    return folder / "tiny.nemo"


def ask(port):
    body = {"sentences": ["Tell me."], "tokens_to_generate": 120, "greedy": True, "end_strings": []}
    try:
        return httpx.put(
            f"http://127.0.0.1:{port}/generate", json=body, timeout=PATIENCE_S, trust_env=False
        ).status_code
    except httpx.TransportError as err:
        return type(err).__name__


def ask_for_a_stream(port):
    """ "done", or how the stream broke off."""
    body = {"prompt": "Tell me.", "max_tokens": 200, "temperature": 0, "stream": True}
    try:
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=PATIENCE_S, trust_env=False
        ) as answer:
            return "done" if "data: [DONE]" in list(answer.iter_lines()) else "no end"
    except httpx.TransportError as err:
        return type(err).__name__


def started_ranks(process):
    """The processes of the ranks, rank 0 first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return [pid for rank in (b"RANK=0", b"RANK=1") for pid, environment in environments.items() if rank in environment]


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False], ids=["under load", "idle"])
def test_a_killed_rank_ends_the_server_with_its_number(nemo, busy, tmp_path):
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts/megatron_gpt_eval.py", f"gpt_model_file={nemo}", "server=True"]
    with (tmp_path / "log").open("w+") as log, ThreadPoolExecutor(4) as pool:
        arguments = [f"port={port}", "trainer.devices=2"]
        server = subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            while ask(port) != 200:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            stop = time.monotonic() + PATIENCE_S
            asked = (ask, ask_for_a_stream)
            answers = [pool.submit(asked[number % 2], port) for number in range(40 if busy else 0)]
            time.sleep(0.5)
            os.kill(started_ranks(server)[1], signal.SIGKILL)
            assert server.wait(timeout=PATIENCE_S) != 0
            assert time.monotonic() < stop
            # Every client hears of it: none waits for an answer that cannot come.
            statuses = [answer.result(timeout=PATIENCE_S) for answer in answers]
        finally:
            server.kill()
            server.wait()
        said = (tmp_path / "log").read_text()
    assert not busy or all(any(status not in (200, "done") for status in statuses[kind::2]) for kind in (0, 1))
    assert "rank 1 was ended by signal 9" in said or "lost another rank; the server ends" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failure_inside_the_model_ends_both_ranks_with_its_reason(nemo, failing_rank):
    program = "import sys; from steerlm_nemo.ranks import launch_ranks; sys.exit(launch_ranks(sys.argv[1:], 2))"
    script = ROOT / "tests/support/failing_rank.py"
    command = [sys.executable, "-c", program, script, nemo, str(failing_rank)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 70
    assert "failed inside the model" in run.stderr and "out of memory, say" in run.stderr


@pytest.mark.slow
def test_alone_a_failure_inside_the_model_costs_the_rows_under_way_only(nemo):
    environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with live.open_listener(0) as free:
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    script = ROOT / "tests/support/failing_rank.py"
    run = subprocess.run([sys.executable, script, nemo, "0"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("given up: out of memory, say; then 4 rows completed")
