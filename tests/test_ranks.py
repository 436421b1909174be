"""Starting and ending the ranks of a job, with small programs for ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerlm_nemo.ranks import EXIT_RANK_FAILED

LAUNCH = "import sys; from steerlm_nemo.ranks import launch_ranks; sys.exit(launch_ranks(sys.argv[1:], 2))"


def write(folder: Path, body: str) -> Path:
    path = folder / "rank.py"
    path.write_text("import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
    return path


def launch(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LAUNCH, path], capture_output=True, text=True, timeout=60)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    except FileNotFoundError:
        return False


def test_every_rank_gets_its_place_and_only_rank_0_speaks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])\n"
        f"pathlib.Path({str(tmp_path)!r}, f'rank{{rank}}').write_text(os.environ['MASTER_PORT'])",
    )
    result = launch(path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0 2 0\n", "")
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


def test_a_rank_that_fails_ends_the_others_and_is_heard(tmp_path: Path) -> None:
    result = launch(write(tmp_path, "if rank == 1:\n    sys.exit('no memory left')\ntime.sleep(600)"))
    assert result.returncode == 1
    assert "rank 1 ended with exit code 1" in result.stderr and "no memory left" in result.stderr


def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path: Path) -> None:
    result = launch(write(tmp_path, "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"))
    assert result.returncode == 128 + 9
    assert "rank 1 was ended by signal 9" in result.stderr


def test_a_signal_reaches_every_rank_and_lets_it_finish(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def leave(number, frame):\n    time.sleep(0.3)\n    print('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        f"pathlib.Path({str(tmp_path)!r}, f'ready{{rank}}').write_text('')\ntime.sleep(600)",
    )
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, path], stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_while_the_ranks_are_started_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    """Python drops what a handler raises there."""
    path = write(tmp_path, "time.sleep(600)")
    program = f"import os\nos.register_at_fork(before=lambda: os.kill(os.getpid(), {int(number)}))\n{LAUNCH}"
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + number, result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_rank_that_is_stopped_is_named_continued_and_ended_when_another_gives_up(tmp_path: Path) -> None:
    here = f"pathlib.Path({str(tmp_path)!r}, 'continued')"
    path = write(
        tmp_path,
        f"if rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n    {here}.write_text('')\n    time.sleep(600)\n"
        f"time.sleep(0.5)\nassert not {here}.exists()\nsys.exit({EXIT_RANK_FAILED})",
    )
    result = launch(path)
    assert result.returncode == EXIT_RANK_FAILED
    assert re.search(r"rank 1, process \d+, had been stopped", result.stderr)
    assert (tmp_path / "continued").exists()


def test_after_a_signal_a_rank_that_lost_the_others_ends_them_all_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN if rank else lambda *_: os._exit({EXIT_RANK_FAILED}))\n"
        f"pathlib.Path({str(tmp_path)!r}, f'ready{{rank}}').write_text('')\ntime.sleep(600)",
    )
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, path])
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_RANK_FAILED


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"pathlib.Path({str(tmp_path)!r}, f'pid{{rank}}').write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, path])
    while len([p for p in tmp_path.glob("pid*") if p.read_text()]) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    pids = [int(p.read_text()) for p in tmp_path.glob("pid*")]
    assert all(is_running(pid) for pid in pids)  # the control
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)
