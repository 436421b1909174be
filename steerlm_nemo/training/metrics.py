"""What a run measured, where people and programs find it without TensorBoard: JSON lines, and a chart of the loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_nemo.records import atomic_output
from steerlm_nemo.report.charts import Line, line_chart

# A folder, since NeMo moves the files of a log folder out of the way whenever its run goes on.
FOLDER = "metrics"
_MOST_POINTS = 500  # of a line in the chart


class MetricsFile:
    """A logger beside Lightning's: `metrics/metrics.jsonl` and `metrics/loss.svg` of a log folder.

    A line is `{"step": 12, "time": <seconds since 1970>, "train/loss": 1.25, ...}`. `train/` figures are of the step
    after `step` ones, `val/` figures of the weights after `step` steps, as in TensorBoard. What is no finite number is
    null. `first_step` is where the run goes on: lines of later steps, which are trained again, are removed.
    """

    def __init__(self, log_dir: Path, first_step: int) -> None:
        folder = log_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._chart = folder / "loss.svg"
        path = folder / "metrics.jsonl"
        self._losses: dict[str, dict[int, float]] = {"train/loss": {}, "val/loss": {}}
        kept = [line for line in _read(path) if _stays(line, first_step)]
        for line in kept:
            self._note(line)
        with atomic_output(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = path.open("a", buffering=1)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        figures = {name: _number(value) for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **figures}
        self._file.write(json.dumps(line) + "\n")
        self._note(line)
        if "val/loss" in line:
            self._draw()

    def finalize(self, status: str) -> None:
        self._draw()
        self._file.close()

    def _note(self, line: Mapping[str, Any]) -> None:
        for name, points in self._losses.items():
            if line.get(name) is not None:
                points[line["step"]] = line[name]

    def _draw(self) -> None:
        lines = [Line(name, [(x, y, None) for x, y in _thinned(points)]) for name, points in self._losses.items()]
        with atomic_output(self._chart) as file:
            file.write(line_chart(lines, "steps", "loss", width=720, height=360))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may have been cut by a kill


def _stays(line: Mapping[str, Any], first_step: int) -> bool:
    return line["step"] < first_step or (line["step"] == first_step and "val/loss" in line)


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _thinned(points: Mapping[int, float]) -> list[tuple[int, float]]:
    """At most `_MOST_POINTS` means of neighbours."""
    every = -(-len(points) // _MOST_POINTS) or 1
    items = list(points.items())
    groups = [items[start : start + every] for start in range(0, len(items), every)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
