"""Starting the ranks of a job on one machine.

`trainer.devices=2` is enough: the script starts itself once per rank. Under torchrun or Slurm the ranks exist
already and nothing is started.

Not torchrun itself: it ends with 1 whatever a rank ended with (75 asks to be run again), kills ranks 30 s after a
SIGTERM though saving a large model takes longer, lets all ranks talk at once, and needs torch, a second, to start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAUNCHED_HERE = "STEERLM_RANK_OF_LAUNCHER"  # set for ranks whose launcher has checked the config and warned already
EXIT_RANK_FAILED = 70  # of a rank that failed by itself, or that lost one that did
FAILURE_GRACE_S = 5.0  # time the others get to end by themselves when one has failed


def ranks_exist() -> bool:
    """Has somebody (torchrun, Slurm, or this module) started one process per rank already?"""
    if os.environ.get("LOCAL_RANK") is not None:
        return True
    return os.environ.get("SLURM_PROCID") is not None and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def this_rank() -> int:
    """The number of this process in its job: 0 alone, otherwise what torchrun, Slurm or this module says."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def should_warn() -> bool:
    """Is this the one process of a job that shows warnings about the config?"""
    return this_rank() == 0 and LAUNCHED_HERE not in os.environ


def launch_ranks(argv: Sequence[str], num_ranks: int) -> int:
    """Run `python argv` once per rank and wait. Returns the exit code of the rank that failed first, or 0.

    When one rank fails the others are ended: a collective without its partner would wait for ever. SIGINT and
    SIGTERM are passed on, and the ranks may save for as long as it takes; a second signal ends them after 5 s. Rank 0
    has the terminal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_WORLD_SIZE": str(num_ranks),
        LAUNCHED_HERE: "1",
        # Threads of several ranks on the same cores only wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks))),
    }
    with contextlib.ExitStack() as stack:
        # Rank 0 speaks for all; what the others said is shown if one of them fails by itself.
        logs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, num_ranks))]
        ranks = stack.enter_context(_Ranks())
        for rank, log in enumerate(logs):
            ranks.start([sys.executable, *argv], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
        if ranks.signals:
            # They have begun nothing, and Python while it starts would answer with a traceback.
            return 128 + ranks.signals[0]
        first = ranks.wait()
        if first is None:
            return 0
        code = ranks.processes[first].returncode
        log = logs[first]
        # Otherwise rank 0 has said why itself; not if all it knows is that it lost its partner.
        if log is not None and (ranks.processes[0].returncode <= 0 or code == EXIT_RANK_FAILED):
            log.seek(0)
            said = log.read().decode(errors="replace")[-4000:]
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            print(f"rank {first} {how}; the others were stopped. Its last words:\n{said}", file=sys.stderr)
    return code if code > 0 else 128 - code


def die_with_parent() -> None:
    """Run in a child before its program: SIGTERM it when the parent dies, however that happens (Linux only)."""
    # Without it a killed launcher leaves ranks that hold the port and wait for each other.
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class _Ranks:
    """Processes that get this one's signals and do not outlive the block.

    Signals are counted from before the first one is started, and the handler raises nothing: what it raised while a
    process is being started would be dropped by Python, and the signal lost.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []
        self._num_sent = 0

    def __enter__(self) -> _Ranks:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str], log: Any) -> None:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.processes.append(process)

    def wait(self) -> int | None:
        """Wait for all; the number of the rank that failed first, or None."""
        first_failed: int | None = None
        deadline = None
        while any(process.poll() is None for process in self.processes):
            self._pass_signals_on()
            if first_failed is None and (first_failed := self._failed()) is not None:
                self._tell_of_stopped()
                for process in self._running():
                    process.send_signal(signal.SIGCONT)  # one that was stopped may still have something to say
            if deadline is None and self._is_hopeless(first_failed):
                deadline = time.monotonic() + FAILURE_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                for process in self._running():
                    process.kill()
            time.sleep(0.05)
        return self._failed() if first_failed is None else first_failed

    def _remember(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def _pass_signals_on(self) -> None:
        while self._num_sent < len(self.signals):
            for process in self._running():
                process.send_signal(self.signals[self._num_sent])
            self._num_sent += 1

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def _failed(self) -> int | None:
        return next((rank for rank, process in enumerate(self.processes) if process.poll()), None)

    def _is_hopeless(self, first_failed: int | None) -> bool:
        """Is nothing worth waiting for?

        A failed rank leaves the others in a collective. After a signal they may save for as long as it takes, unless
        one has lost the others; whoever cannot wait signals again.
        """
        if first_failed is None:
            return len(self.signals) > 1
        return len(self.signals) != 1 or self.processes[first_failed].returncode == EXIT_RANK_FAILED

    def _tell_of_stopped(self) -> None:
        """Why a rank hangs, where that can be seen (Linux only)."""
        for rank, process in enumerate(self.processes):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{process.pid}/stat").read_text()
                if stat.rpartition(") ")[2][:1] in ("T", "t"):
                    print(f"rank {rank}, process {process.pid}, had been stopped, by SIGSTOP perhaps", file=sys.stderr)
