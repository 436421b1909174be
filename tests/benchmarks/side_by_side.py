"""Contestants measured in turns in one run: ABAB, medians, spread, peak memory. Every bench of `make bench` uses it.

Machines are shared and noisy, so a figure alone says little. A ratio of medians of interleaved runs says more, and
the limit the machine sets to the same work says how far there is to go.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path("results/bench")


@dataclass(frozen=True)
class Run:
    """One run of one contestant. `peak_rss_bytes` is None where it ran inside this process."""

    seconds: float
    peak_rss_bytes: int | None = None


@dataclass
class Contestant:
    """All runs of one contestant."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_rss_bytes(self) -> int | None:
        """Worst."""
        peaks = [run.peak_rss_bytes for run in self.runs if run.peak_rss_bytes is not None]
        return max(peaks, default=None)

    def spread(self) -> tuple[float, float]:
        """Fastest and slowest, in seconds."""
        seconds = [run.seconds for run in self.runs]
        return min(seconds), max(seconds)


def in_turns(contestants: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, Contestant]:
    """Each contestant `repeats` times, one after the other, so that a slow minute of the machine hits all alike.

    Every turn begins one further down the list: who comes after the heaviest writer pays for it on some disks.
    """
    results = {name: Contestant(name) for name in contestants}
    names = list(contestants)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            run = contestants[name]()
            results[name].runs.append(run)
            print(f"  {name} [{repeat + 1}/{repeats}]: {run.seconds:.3f} s", file=sys.stderr, flush=True)
    return results


def timed(call: Callable[[], object]) -> Run:
    """Run `call` in this process."""
    start = time.perf_counter()
    call()
    return Run(time.perf_counter() - start)


# A process's peak counts from its fork on, when it still is a copy of its parent; so a small one starts it.
_STARTER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    print(time.perf_counter() - start, usage.ru_maxrss * 1024, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured_process(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command: wall seconds and peak resident memory of that process (not of its children).

    Raises:
        RuntimeError: it did not exit with 0; its output is in the message.
    """
    with tempfile.NamedTemporaryFile("r") as measured:
        starter = [sys.executable, "-S", "-c", _STARTER, measured.name]
        process = subprocess.run([*starter, *argv], capture_output=True, text=True, env={**os.environ, **(env or {})})
        if process.returncode != 0:
            output = (process.stdout + process.stderr)[-4000:]
            raise RuntimeError(f"{argv} exited with {process.returncode}:\n{output}")
        seconds, peak = measured.read().split()
    return Run(float(seconds), int(peak))


def report(name: str, contestants: Mapping[str, Contestant], figures: Mapping[str, Any]) -> Path:
    """Print the runs and the figures that the bench is about; save both to results/bench/<name>.json."""
    print(f"\n{name}")
    for contestant in contestants.values():
        low, high = contestant.spread()
        rss = contestant.peak_rss_bytes
        memory = f", peak {rss / 2**20:.0f} MB" if rss is not None else ""
        runs = len(contestant.runs)
        print(f"  {contestant.name:32s} {contestant.seconds:9.3f} s (of {runs}: {low:.3f} to {high:.3f}){memory}")
    for key, value in figures.items():
        print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    runs_of = {contestant.name: [asdict(run) for run in contestant.runs] for contestant in contestants.values()}
    path.write_text(json.dumps({"figures": dict(figures), "runs": runs_of}, indent=1) + "\n", encoding="utf-8")
    return path
