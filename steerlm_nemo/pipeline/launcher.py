"""How a command of a flow becomes a process: on this machine, or as a step of a Slurm job."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from steerlm_nemo.errors import InputError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@dataclass(frozen=True)
class Size:
    """What a command needs; on one machine the scripts start the tasks of a node themselves (`trainer.devices`)."""

    nodes: int = 1
    tasks_per_node: int = 1


ONE_TASK = Size()


class Launcher(Protocol):
    stop_signal: signal.Signals  # asks a process to save and end

    def argv(self, command: Sequence[str], size: Size) -> list[str]:
        """What to execute for a script and its arguments. Raises InputError if there is no such room here."""


class ThisMachine:
    stop_signal = signal.SIGINT

    def argv(self, command: Sequence[str], size: Size) -> list[str]:
        if size.nodes > 1:
            raise InputError(f"{command[0]} is to run on {size.nodes} nodes, which takes a Slurm job; set nodes=1")
        return [sys.executable, str(SCRIPTS / command[0]), *command[1:]]


class SlurmJob:
    """Each command a step of the job that this process runs in, on its first node, in the image's repository."""

    # The first SIGINT only makes srun list its tasks.
    stop_signal = signal.SIGTERM

    def __init__(self, options: Sequence[str]) -> None:
        """`options` go to every srun. Raises InputError outside a job."""
        self._options = list(options)
        self._first_node = os.environ.get("SLURMD_NODENAME", "")
        if not self._first_node:
            raise InputError("--srun needs a Slurm job around it (SLURMD_NODENAME is not set); start it with sbatch")

    def argv(self, command: Sequence[str], size: Size) -> list[str]:
        # Servers and their clients share the first node and its loopback. --ntasks every time: srun would take the
        # job's. A rank that fails leaves the others in a collective: they get a minute. Not --kill-on-bad-exit: at a
        # stop with exit code 75 the ranks leave one after the other.
        place = [f"--nodelist={self._first_node}"] if size.nodes == 1 else []
        tasks = [f"--ntasks={size.nodes * size.tasks_per_node}", f"--ntasks-per-node={size.tasks_per_node}"]
        ending = ["--overlap", "--kill-on-bad-exit=0", "--wait=60"]
        srun = ["srun", f"--nodes={size.nodes}", *place, *tasks, *ending, *self._options]
        return [*srun, "python", f"scripts/{command[0]}", *command[1:]]
