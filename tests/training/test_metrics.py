"""The figures of a run as JSON lines and as a chart, over kills and resumptions."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from steerlm_nemo.training.metrics import MetricsFile


def lines(log_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_dir / "metrics/metrics.jsonl").read_text().splitlines()]


def train(metrics: MetricsFile, first: int, last: int, loss: float) -> None:
    for step in range(first, last):
        metrics.log_metrics({"train/loss": loss - step / 100, "train/lr": 0.1}, step)


def test_a_run_that_was_killed_goes_on_with_one_line_per_step(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    train(metrics, 0, 4, loss=3.0)
    metrics.log_metrics({"val/loss": 2.5}, 4)  # saved here
    train(metrics, 4, 7, loss=3.0)  # killed here, in the middle of a line
    with (tmp_path / "metrics/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tr')
    metrics = MetricsFile(tmp_path, 4)
    train(metrics, 4, 8, loss=2.0)
    metrics.log_metrics({"val/loss": 1.5}, 8)
    metrics.finalize("success")
    assert [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines(tmp_path)] == [
        *[(step, 3.0 - step / 100, None) for step in range(4)],
        (4, None, 2.5),
        *[(step, 2.0 - step / 100, None) for step in range(4, 8)],
        (8, None, 1.5),
    ]
    drawn = ET.parse(tmp_path / "metrics/loss.svg")
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"train/loss", "val/loss", "steps"} <= set(texts)


def test_what_is_no_finite_number_is_null_and_a_long_run_is_thinned(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.log_metrics({"train/loss": math.nan, "train/grad_norm": math.inf}, 0)
    assert lines(tmp_path)[0]["train/loss"] is None and lines(tmp_path)[0]["train/grad_norm"] is None
    train(metrics, 1, 3001, loss=100.0)
    metrics.finalize("success")
    (path, *_) = (
        element.attrib["d"]
        for element in ET.parse(tmp_path / "metrics/loss.svg").iter("{http://www.w3.org/2000/svg}path")
        if element.attrib.get("fill") == "none" and "L" in element.attrib["d"]
    )
    assert 400 < path.count("L") < 500
