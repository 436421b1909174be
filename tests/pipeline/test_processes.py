"""Commands as processes; stages and flows of them are tests/pipeline/test_runner.py's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A signal that arrives while a process is being started: Python drops what its handler raises there.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from steerlm_nemo.pipeline.launcher import Size
from steerlm_nemo.pipeline.processes import Processes, stop_like_ctrl_c

class Here:
    stop_signal = signal.SIGINT
    def argv(self, command, size):
        return list(command)

stop_like_ctrl_c()
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    Processes(Path(sys.argv[1]), Here(), sys.stdout).run(["sleep", "600"], Size(), {}, "sleep")
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_that_arrives_while_a_process_is_started_is_not_lost(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "stopped\n"
    assert "Exception ignored in" in result.stderr  # the handler's own interruption was dropped
