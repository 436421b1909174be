"""The figures of a run as `summary.json` and as one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.errors import InputError
from steerlm_nemo.evaluation.grading import Grading
from steerlm_nemo.evaluation.steering_curves import Steered, Steering
from steerlm_nemo.records import atomic_output, read_json
from steerlm_nemo.report.charts import Line, line_chart
from steerlm_nemo.report.pages import render

MIN_EXACT_MATCH = 0.85
MIN_SPEARMAN = 0.8

EXACT_READER = "the toy world's exact reader of the text"
VALUE_MODEL_READER = "the value model's own attributes of the responses"


@dataclass(frozen=True)
class Results:
    """All that is reported. `measured_by` says who read the responses; bars apply to the toy world only."""

    toy: bool
    schema: AttributeSchema
    measured_by: str
    value_model: Mapping[str, Grading]
    steering: Mapping[str, Steering]
    steered: Sequence[Steered]
    stages: Sequence[Mapping[str, Any]] = ()  # {"name", "seconds"}
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # curve -> (step, loss)

    def missed_bars(self) -> list[str]:
        """What falls short in a toy run, in words; on other data nothing can."""
        if not self.toy:
            return []
        missed = [
            f"value model, {name}: exact match {grading.exact_match:.3f}, wanted {MIN_EXACT_MATCH}"
            for name, grading in self.value_model.items()
            if grading.exact_match < MIN_EXACT_MATCH
        ]
        for name, steering in self.steering.items():
            if steering.spearman is None or steering.spearman < MIN_SPEARMAN:
                missed.append(f"steering, {name}: Spearman {_number(steering.spearman)}, wanted {MIN_SPEARMAN}")
        for part, measured in (("value model", self.value_model), ("steering", self.steering)):
            missed += [f"{part}, {name}: not measured" for name in self.schema.names if name not in measured]
        return missed

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {
            "toy": self.toy,
            "schema": self.schema.name,
            "stages": [dict(stage) for stage in self.stages],
            "total_seconds": round(sum(stage["seconds"] for stage in self.stages), 1),
            "value_model": {name: _rounded(asdict(grading)) for name, grading in self.value_model.items()},
            "steering_measured_by": self.measured_by,
            "steering": {name: _rounded(asdict(steering)) for name, steering in self.steering.items()},
            "missed_bars": self.missed_bars(),
        }


FILES = ("summary.json", "report.html")


def write_report(results: Results, folder: str | Path) -> None:
    """Write `summary.json` and `report.html` into `folder`."""
    with atomic_output(Path(folder) / FILES[0]) as file:
        file.write(json.dumps(results.summary(), indent=1, allow_nan=False) + "\n")
    with atomic_output(Path(folder) / FILES[1]) as file:
        file.write(html_page(results))


def text_report(results: Results) -> str:
    """The two tables of figures for a terminal."""
    lines = [f"{'value model on held-out turns':<32}{'turns':>7}{'exact':>8}{'+-1':>8}{'MAE':>8}{'Pearson':>9}"]
    for name, grading in results.value_model.items():
        lines.append(
            f"  {name:<30}{grading.num_turns:>7}{grading.exact_match:>8.3f}{grading.within_one:>8.3f}"
            f"{grading.mae:>8.3f}{_number(grading.pearson):>9}"
        )
    lines.append(f"{'steering on held-out prompts':<32}{'asked':>7}{'exact':>8}{'unread':>8}{'':>8}{'Spearman':>9}")
    for name, steering in results.steering.items():
        lines.append(
            f"  {name:<30}{steering.num_responses:>7}{_number(steering.exact_match):>8}"
            f"{steering.num_unreadable:>8}{'':>8}{_number(steering.spearman):>9}"
        )
    lines.append(f"steering read by {results.measured_by}")
    return "\n".join(lines)


def html_page(results: Results) -> str:
    """The whole page, figures inlined."""
    curves = [Line(curve, [(x, y, None) for x, y in points]) for curve, points in results.losses.items()]
    return render(
        "steerlm",
        helpers={"number": _number, "readable": lambda value: "unreadable" if value is None else value},
        title="Toy world" if results.toy else "SteerLM run",
        results=results,
        missed=results.missed_bars(),
        min_exact_match=MIN_EXACT_MATCH,
        min_spearman=MIN_SPEARMAN,
        curves={name: _steering_curve(steering) for name, steering in results.steering.items()},
        leakage=[[s.leakage[name] for name in results.schema.names] for s in results.steering.values()],
        examples=_examples(results),
        losses=line_chart(curves, "step", "loss", width=620, height=260) if curves else None,
    )


def _steering_curve(steering: Steering) -> Markup:
    points = [(value, mean, interval) for value, mean, interval, _ in steering.curve if mean is not None]
    scale = [value for value, *_ in steering.curve]
    return line_chart([Line("", points)], "requested", "found", limits=(scale[0], scale[-1]))


def _examples(results: Results) -> dict[str, list[Steered]]:
    """One prompt per attribute, its responses at every value."""
    examples = {}
    for position, name in enumerate(results.steering):
        sweep = [one for one in results.steered if one.swept == name]
        numbers = sorted({one.prompt_number for one in sweep})
        number = numbers[position % len(numbers)]
        shown = [one for one in sweep if one.prompt_number == number]
        examples[name] = sorted(shown, key=lambda one: one.requested[one.swept])
    return examples


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 4)
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return data


def read_stages(path: str | Path) -> dict[str, float]:
    """Seconds by name of a stage, in order. Raises InputError for anything but a JSON object of numbers."""
    stages = read_json(path)
    if not isinstance(stages, dict) or not all(type(seconds) in (int, float) for seconds in stages.values()):
        raise InputError(f'{path}: a JSON object of stages and their seconds is needed, such as {{"clean": 1.5}}')
    return stages
