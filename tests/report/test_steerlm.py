import functools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from steerlm_nemo.attributes import TOY6
from steerlm_nemo.errors import InputError
from steerlm_nemo.evaluation.grading import Grading
from steerlm_nemo.evaluation.losses import read_losses
from steerlm_nemo.evaluation.steering_curves import measure, plan, read_with
from steerlm_nemo.records import dump_record
from steerlm_nemo.report.charts import Line, line_chart
from steerlm_nemo.report.steerlm import EXACT_READER, Results, html_page, read_stages, write_report
from steerlm_nemo.toy.world import draw_attributes, held_out_prompts, read_attributes, write_response

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def toy_responses(obedient=True):
    rng = random.Random(0)
    prompts = [(record["conversations"][0]["value"], record["system"]) for record in held_out_prompts(1)]
    return [
        {**r, "response": write_response(r["prompt"], r["attributes"] if obedient else draw_attributes(rng), rng)}
        for r in plan(prompts, TOY6, seed=1)
    ]


@functools.cache
def toy_results(wrong_share=0.0, obedient=True, toy=True):
    rng = random.Random(1)
    pairs = Counter((value % 5, (value + (rng.random() < wrong_share)) % 5) for value in range(300))
    steered = read_with(read_attributes, toy_responses(obedient))
    return Results(
        toy=toy,
        schema=TOY6,
        measured_by=EXACT_READER,
        value_model={attribute.name: Grading.of(pairs, attribute) for attribute in TOY6.attributes},
        steering=measure(steered, TOY6),
        steered=steered,
        stages=[{"name": "world", "seconds": 1.5}, {"name": "train-value", "seconds": 100.0}],
        losses={"value model": [(1, 2.0), (2, 1.0)]},
    )


class Page(HTMLParser):
    """Collects what a page would fetch, its text and its drawings."""

    def __init__(self, html):
        super().__init__()
        self.links, self.text = [], ""
        self.drawings = re.findall(r"<svg.*?</svg>", html, re.S)
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href") or tag in ("script", "link", "img")]

    def handle_data(self, data):
        self.text += data


def test_the_summary_has_the_promised_keys(tmp_path):
    write_report(toy_results(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["stages"] == [{"name": "world", "seconds": 1.5}, {"name": "train-value", "seconds": 100.0}]
    assert summary["total_seconds"] == 101.5
    assert set(summary["value_model"]) == set(summary["steering"]) == set(TOY6.names)
    for name in TOY6.names:
        assert {"exact_match", "mae"} <= set(summary["value_model"][name])
        assert summary["steering"][name]["spearman"] == 1.0
    assert summary["toy"] is True and summary["missed_bars"] == []


def test_the_page_needs_no_network_and_says_it_is_a_toy():
    html = html_page(toy_results())
    page = Page(html)
    assert page.links == []
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "") and "@import" not in html
    assert "TOY" in page.text
    assert "TOY" not in Page(html_page(toy_results(toy=False))).text
    assert len(page.drawings) == len(TOY6.names) + 1  # the steering curves and the losses
    for drawing in page.drawings:
        ElementTree.fromstring(drawing)


def test_the_page_shows_one_prompt_at_every_grade_of_an_attribute():
    results = toy_results()
    text = Page(html_page(results)).text
    shown = [one for one in results.steered if one.swept == "quality" and one.prompt_number == 0]
    assert len(shown) == 5
    assert all(one.response in text for one in shown)


def test_text_of_a_model_cannot_become_markup():
    results = toy_results()
    evil = [
        type(one)(**{**vars(one), "response": "<script>alert(1)</script>", "prompt": "<b>"}) for one in results.steered
    ]
    html = html_page(Results(**{**vars(results), "steered": evil}))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_bars_are_for_the_toy_world_alone():
    assert toy_results().missed_bars() == []
    missed = toy_results(wrong_share=0.3).missed_bars()
    assert len(missed) == 6 and all("exact match" in line for line in missed)
    assert len(toy_results(obedient=False).missed_bars()) == 6
    assert toy_results(wrong_share=0.3, obedient=False, toy=False).missed_bars() == []


def test_an_attribute_nobody_measured_misses_its_bar():
    results = toy_results()
    partial = {name: grading for name, grading in results.value_model.items() if name != "humor"}
    missed = Results(**{**vars(results), "value_model": partial}).missed_bars()
    assert missed == ["value model, humor: not measured"]


def test_a_chart_puts_points_where_they_belong():
    svg = ElementTree.fromstring(line_chart([Line("", [(0, 0, None), (4, 4, (3, 4))])], "x", "y", limits=(0, 4)))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("{http://www.w3.org/2000/svg}circle")]
    (left, bottom), (right, top) = circles
    assert left < right and bottom > top  # y grows downwards in SVG


def test_the_page_says_where_it_knows_nothing():
    results = toy_results()
    blind = [type(one)(**{**vars(one), "found": {**one.found, "humor": None}}) for one in results.steered]
    html = html_page(Results(**{**vars(results), "steered": blind, "steering": measure(blind, TOY6)}))
    text = Page(html).text
    assert "Spearman n/a; exact n/a; 60 of 60 unreadable" in " ".join(text.split())
    assert text.count("unreadable") > 5 and html.count("<td>n/a") == 6  # nobody could leak into humor
    assert "unreadable" not in Page(html_page(results)).text.replace("0 of 60 unreadable", "")


def test_losses_come_from_the_tensorboard_files_of_a_run_and_its_resumption(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for first, losses in ((0, [3.0, 2.0, 9.0]), (2, [1.0, 0.5])):
        with tensorboard.SummaryWriter(str(tmp_path / "run"), filename_suffix=str(first)) as writer:
            for step, loss in enumerate(losses, first):
                writer.add_scalar("train/loss", loss, step)
    assert read_losses(tmp_path / "run") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no TensorBoard file"):
        read_losses(tmp_path / "empty")


# --- the scripts ----------------------------------------------------------------------------------------------------


def run(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)


def write(path, records):
    path.write_text("".join(dump_record(record) + "\n" for record in records), encoding="utf-8")
    return path


def graded_file(path, offset):
    """Five turns, every attribute `offset` away from its human grade."""

    def line(grade):
        return ",".join(f"{name}:{grade % 5}" for name in TOY6.names)

    turns = [
        {"value": "!", "from": "Assistant", "label": line(grade + offset), "gt_label": line(grade)}
        for grade in range(5)
    ]
    return write(path, [{"conversations": [turn], "system": ""} for turn in turns])


def test_the_script_reports_a_toy_run_and_fails_when_a_bar_is_missed(tmp_path):
    responses = write(tmp_path / "responses.jsonl", toy_responses())
    stages = tmp_path / "stages.json"
    stages.write_text('{"world": 1.0}', encoding="utf-8")
    flags = ["--responses_file", responses, "--schema", "toy6", "--stages_file", stages]
    flags += ["--output_dir", tmp_path / "out"]
    good = run(SCRIPTS / "report.py", "--graded_file", graded_file(tmp_path / "good.jsonl", 0), *flags)
    assert good.returncode == 0, good.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in summary["stages"]] == ["world", "report"]
    bad = run(SCRIPTS / "report.py", "--graded_file", graded_file(tmp_path / "bad.jsonl", 1), *flags)
    assert bad.returncode == 1 and "BELOW THE BAR" in bad.stderr and "Traceback" not in bad.stderr


def test_the_scripts_plan_a_measurement_and_read_it_with_a_value_model(tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", held_out_prompts(1))
    requests = tmp_path / "requests.jsonl"
    flags = ["--schema", "toy6", "--num_prompts", 5, "--output_file", requests]
    planned = run(SCRIPTS / "plan_steering.py", "--prompts_file", prompts, *flags)
    assert planned.returncode == 0, planned.stderr
    assert len(requests.read_text(encoding="utf-8").splitlines()) == 6 * 5 * 5
    responses = write(tmp_path / "responses.jsonl", toy_responses())
    flags = ["--responses_file", responses, "--output_file", tmp_path / "to_grade.jsonl"]
    again = run(SCRIPTS / "plan_steering.py", *flags)
    assert again.returncode == 0, again.stderr
    records = [json.loads(line) for line in (tmp_path / "to_grade.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["conversations"][1]["label"] = ",".join(f"{name}:2" for name in TOY6.names)
    graded = write(tmp_path / "graded.jsonl", records)
    val = graded_file(tmp_path / "val.jsonl", 1)
    flags = ["--graded_responses_file", graded, "--schema", "toy6", "--output_dir", tmp_path / "out"]
    result = run(SCRIPTS / "report.py", "--graded_file", val, *flags)
    assert result.returncode == 0, result.stderr  # no bar without an exact reader
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["toy"] is False and "value model" in summary["steering_measured_by"]
    assert summary["steering"]["quality"]["spearman"] is None  # a reader that always says 2 finds no steering


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--graded_file", "missing.jsonl", "--responses_file", "missing.jsonl"], "no such file"),
        (["--graded_file", "x", "--responses_file", "x", "--schema", "nemo12+lang"], "knows --schema toy6 only"),
        (["--graded_file", "x"], "give either"),
    ],
)
def test_unusable_flags_are_told_and_nothing_is_written(flags, message, tmp_path):
    flags = flags if "--schema" in flags else [*flags, "--schema", "toy6"]
    result = run(SCRIPTS / "report.py", *flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", "a JSON object of stages and their seconds is needed"),
        ('{"clean": "fast"}', "a JSON object of stages and their seconds is needed"),
    ],
)
def test_a_wrong_file_of_stages_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "stages.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_stages(path)
    path.write_text('{"clean": 1.5, "train": 2}')
    assert read_stages(path) == {"clean": 1.5, "train": 2}
