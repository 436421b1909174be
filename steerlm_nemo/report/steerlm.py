"""The figures of a run as `summary.json` and as one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.evaluation.grading import Grading
from steerlm_nemo.evaluation.steering_curves import Steered, Steering
from steerlm_nemo.records import atomic_output
from steerlm_nemo.report.charts import Line, heat_table, line_chart, page

MIN_EXACT_MATCH = 0.85
MIN_SPEARMAN = 0.8

EXACT_READER = "the toy world's exact reader of the text"
VALUE_MODEL_READER = "the value model's own grades of the responses"


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


def write_report(results: Results, folder: str | Path) -> None:
    """Write `summary.json` and `report.html` into `folder`."""
    with atomic_output(Path(folder) / "summary.json") as file:
        file.write(json.dumps(results.summary(), indent=1, allow_nan=False) + "\n")
    with atomic_output(Path(folder) / "report.html") as file:
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
    name = "Toy world" if results.toy else "SteerLM run"
    parts = [f"<h1>{name}: grading and steering, measured</h1>"]
    if results.toy:
        parts.append(
            '<p class="toy">TOY: a model of under a million parameters and made-up data in which every grade can be '
            "read off the text. It shows that the flow works, not how good a real model is.</p>"
        )
    missed = results.missed_bars()
    if results.toy:
        verdict = (
            "Every attribute reaches its bar." if not missed else "Below the bar: " + escape("; ".join(missed)) + "."
        )
        parts.append(
            f"<p>{verdict} Bars: exact match at least {MIN_EXACT_MATCH}, Spearman at least {MIN_SPEARMAN}.</p>"
        )
    parts += [_steering_section(results), _examples_section(results), _value_model_section(results)]
    if results.losses:
        curves = [Line(curve, [(x, y, None) for x, y in points]) for curve, points in results.losses.items()]
        parts.append("<h2>Training loss</h2>" + line_chart(curves, "step", "loss", width=620, height=260))
    if results.stages:
        total = sum(stage["seconds"] for stage in results.stages)
        rows = "".join(f"<tr><td>{escape(stage['name'])}<td class=n>{stage['seconds']:.1f}" for stage in results.stages)
        parts.append(f"<h2>Time</h2><table><tr><th>stage<th>seconds{rows}<tr><th>total<th class=n>{total:.1f}</table>")
    return page(name, parts)


def _steering_section(results: Results) -> str:
    names = results.schema.names
    charts = []
    for name, steering in results.steering.items():
        scale = next(attribute.values() for attribute in results.schema.attributes if attribute.name == name)
        points = [(value, mean, interval) for value, mean, interval, _ in steering.curve if mean is not None]
        interval = "" if steering.interval is None else f" ({steering.interval[0]:.2f} to {steering.interval[1]:.2f})"
        caption = (
            f"Spearman {_number(steering.spearman)}{interval}; exact {_number(steering.exact_match)}; "
            f"{steering.num_unreadable} of {steering.num_responses} unreadable"
        )
        chart = line_chart([Line("", points)], "requested", "read", limits=(scale[0], scale[-1]))
        charts.append(f"<figure><figcaption><b>{escape(name)}</b><br>{caption}</figcaption>{chart}</figure>")
    leakage = heat_table(
        list(results.steering), names, [[s.leakage[name] for name in names] for s in results.steering.values()], 1.0
    )
    return (
        f"<h2>Steering</h2><p>Each attribute was requested at each of its values on prompts kept out of training, the "
        f"other attributes taking all their values in balanced order. Read by {escape(results.measured_by)}. "
        f"Points are means, bars 95 % bootstrap intervals; the dashed line is perfect steering.</p>"
        f"<div class=charts>{''.join(charts)}</div>"
        f"<h3>Leakage</h3><p>Rank correlation of the value requested (row) with the grade read (column). "
        f"Off the diagonal it should be near 0.</p>{leakage}"
    )


def _examples_section(results: Results) -> str:
    """One prompt per attribute, its responses at every value."""
    tables = []
    for position, name in enumerate(results.steering):
        sweep = [one for one in results.steered if one.swept == name]
        numbers = sorted({one.prompt_number for one in sweep})
        number = numbers[position % len(numbers)]
        shown = sorted((one for one in sweep if one.prompt_number == number), key=lambda one: one.requested[name])
        rows = "".join(
            f"<tr><td class=n>{one.requested[name]}<td class=n>{_read(one.found[name])}"
            f"<td>{escape(one.response) or '<i>empty</i>'}<td class=small>{_mixture(one, name)}"
            for one in shown
        )
        tables.append(
            f"<h3>{escape(name)}: “{escape(shown[0].prompt)}”</h3><table><tr><th>requested<th>read<th>response"
            f"<th>others: requested → read{rows}</table>"
        )
    return "<h2>The same prompt at different grades</h2>" + "".join(tables)


def _mixture(one: Steered, swept: str) -> str:
    return ", ".join(
        f"{escape(key)} {value} → {_read(one.found[key])}"
        for key, value in one.requested.items()
        if key != swept and key in one.found
    )


def _value_model_section(results: Results) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}<td class=n>{g.num_turns}<td class=n>{g.exact_match:.3f}<td class=n>{g.within_one:.3f}"
        f"<td class=n>{g.mae:.3f}<td class=n>{_number(g.pearson)}"
        for name, g in results.value_model.items()
    )
    confusions = []
    for name, grading in results.value_model.items():
        scale = [str(value) for value in grading.values]
        table = heat_table(scale, scale, grading.confusion, max(map(max, grading.confusion)))
        confusions.append(f"<figure><figcaption><b>{escape(name)}</b></figcaption>{table}</figure>")
    return (
        "<h2>Value model</h2><p>Its grades of held-out turns against the grades these turns came with.</p>"
        "<table><tr><th>attribute<th>turns<th>exact match<th>within one<th>MAE<th>Pearson"
        f"{rows}</table><h3>Confusion</h3><p>Rows: human grade; columns: the model's.</p>"
        f"<div class=charts>{''.join(confusions)}</div>"
    )


def _read(grade: int | None) -> str:
    return "unreadable" if grade is None else str(grade)


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
