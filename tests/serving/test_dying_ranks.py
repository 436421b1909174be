"""What becomes of a server of two ranks when one of them dies or fails: an end with a reason, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import live
import pytest

from steerlm_nemo.ranks import EXIT_RANK_FAILED

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
    """ "done", "error event", or how the stream broke off."""
    body = {"prompt": "Tell me.", "max_tokens": 200, "temperature": 0, "stream": True}
    try:
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=PATIENCE_S, trust_env=False
        ) as answer:
            last = [line for line in answer.iter_lines() if line][-1:]
            return {"data: [DONE]": "done", 'data: {"error"': "error event"}.get("".join(last)[:14].strip(), "no end")
    except httpx.TransportError as err:
        return type(err).__name__


def started_ranks(process):
    """The processes of the ranks, rank 0 first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return [pid for rank in (b"RANK=0", b"RANK=1") for pid, environment in environments.items() if rank in environment]


@contextmanager
def served(nemo, log, *settings):
    """A server of two ranks that answers, its port, and the processes of its ranks; what it says goes to `log`."""
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts/megatron_gpt_eval.py", f"gpt_model_file={nemo}", "server=True"]
    command += [f"port={port}", "trainer.devices=2", *settings]
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        while ask(port) != 200:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield server, port, started_ranks(server)
    finally:
        server.kill()
        server.wait()


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False], ids=["under load", "idle"])
def test_a_killed_rank_ends_the_server_with_its_number(nemo, busy, tmp_path):
    log = tmp_path / "log"
    with served(nemo, log) as (server, port, ranks), ThreadPoolExecutor(4) as pool:
        stop = time.monotonic() + PATIENCE_S
        asked = (ask, ask_for_a_stream)
        answers = [pool.submit(asked[number % 2], port) for number in range(40 if busy else 0)]
        time.sleep(0.5)
        os.kill(ranks[1], signal.SIGKILL)
        assert server.wait(timeout=PATIENCE_S) != 0
        assert time.monotonic() < stop
        # Every client hears of it: none waits for an answer that cannot come.
        statuses = [answer.result(timeout=PATIENCE_S) for answer in answers]
    said = log.read_text()
    assert not busy or all(any(status not in (200, "done") for status in statuses[kind::2]) for kind in (0, 1))
    assert not busy or {503, "error event"} <= {*statuses}, statuses
    assert "rank 1 was ended by signal 9" in said or "lost another rank; the server ends" in said, said


@pytest.mark.slow
def test_a_rank_that_hangs_makes_the_server_unready_and_then_ends_it_with_answers_for_all(nemo, tmp_path):
    log = tmp_path / "log"
    settings = ("engine.stall_s=1", "engine.give_up_s=4", "--served_model_name=org/tiny")
    with served(nemo, log, *settings) as (server, port, ranks), ThreadPoolExecutor(4) as pool:

        def status(path):
            return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S, trust_env=False).status_code

        os.kill(ranks[1], signal.SIGSTOP)
        answers = [pool.submit(asked, port) for asked in (ask, ask_for_a_stream)]
        while status("/ready") == 200:
            time.sleep(0.1)
        assert status("/health") == 503 and server.poll() is None
        os.kill(ranks[1], signal.SIGCONT)
        assert [answer.result(timeout=PATIENCE_S) for answer in answers] == [200, "done"]
        assert (status("/ready"), status("/health")) == (200, 200)
        os.kill(ranks[1], signal.SIGSTOP)
        answers = [pool.submit(asked, port) for asked in (ask, ask_for_a_stream) * 2]
        assert server.wait(timeout=PATIENCE_S) == EXIT_RANK_FAILED
        assert [answer.result(timeout=PATIENCE_S) for answer in answers] == [503, "error event"] * 2
        assert all(map(is_gone, ranks))
    said = log.read_text()
    assert f"rank 1, process {ranks[1]}, had been stopped" in said
    assert "error: stopped serving org/tiny: the engine died: no forward pass has ended for" in said
    assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_rank_0_that_hangs_is_ended_by_the_others_and_answers_before(nemo, tmp_path):
    log = tmp_path / "log"
    bounds = ("engine.stall_s=1", "engine.give_up_s=2")
    with served(nemo, log, *bounds) as (server, port, ranks), ThreadPoolExecutor(2) as pool:
        os.kill(ranks[0], signal.SIGSTOP)
        answers = [pool.submit(asked, port) for asked in (ask, ask_for_a_stream)]
        assert server.wait(timeout=PATIENCE_S) == EXIT_RANK_FAILED
        assert [answer.result(timeout=PATIENCE_S) for answer in answers] == [503, "error event"]
        assert all(map(is_gone, ranks))
    said = log.read_text()
    assert f"rank 0, process {ranks[0]}, had been stopped" in said
    assert "rank 1: rank 0 has been silent for" in said


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
