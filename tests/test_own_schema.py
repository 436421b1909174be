"""A schema of one's own, from a YAML file and with a scale that begins at 1, in every step that takes `--schema`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trees import labels

from steerlm_nemo.attributes import AttributeSchema, load_schema
from steerlm_nemo.records import dump_record

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SCHEMA = """\
name: own
attributes:
  - {name: quality, minimum: 1, maximum: 5, default: 5}
  - {name: humor, minimum: 1, maximum: 3}
languages: []
"""


def run(script: str, **flags: object) -> str:
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(dump_record(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def schema(schema_file: Path) -> AttributeSchema:
    return load_schema(str(schema_file))


@pytest.fixture
def records(tmp_path: Path, schema_file: Path, small_model: Path) -> list[dict[str, Any]]:
    """Five trees, their quality evenly from worst to best, through preprocessing and cleaning."""
    trees = [
        {
            "message_tree_id": str(i),
            "prompt": {
                "text": f"question {i}",
                "role": "prompter",
                "lang": "en",
                "replies": [
                    {
                        "text": f"answer {i}",
                        "role": "assistant",
                        "lang": "en",
                        "labels": labels(quality=i / 4, humor=i / 4),
                    }
                ],
            },
        }
        for i in range(5)
    ]
    source = write(tmp_path / "trees.jsonl", trees)
    run("preprocessing", input_file=source, output_file_prefix=tmp_path / "p", schema=schema_file, split_ratio=1.0)
    cleaned = tmp_path / "clean.jsonl"
    tokenizer = {"library": "sentencepiece", "model_file": small_model}
    run("data_clean", dataset_file=tmp_path / "p_train.jsonl", output_file=cleaned, **tokenizer)
    return read(cleaned)


def test_shares_are_spread_over_the_scale_from_its_minimum(records: list[dict[str, Any]]) -> None:
    found = {record["conversations"][1]["value"]: record["conversations"][1]["label"] for record in records}
    assert found == {
        "answer 0": "quality:1,humor:1",
        "answer 1": "quality:2,humor:1",  # 0.25 * 2 = 0.5, half to even
        "answer 2": "quality:3,humor:2",
        "answer 3": "quality:4,humor:3",
        "answer 4": "quality:5,humor:3",
    }


def test_a_line_for_steering_has_defaults_on_the_scale(schema: AttributeSchema) -> None:
    assert schema.complete({}).line == "quality:5,humor:1"


def test_ratings_below_the_minimum_are_rejected(tmp_path: Path, schema_file: Path) -> None:
    rows = [{"prompt": "?", "response": "!", "helpfulness": 0, "quality": value} for value in (0, 1, 5, 6)]
    source = write(tmp_path / "rows.jsonl", rows)
    prefix = tmp_path / "rated"
    run(
        "preprocessing",
        input_file=source,
        output_file_prefix=prefix,
        schema=schema_file,
        split_ratio=1.0,
    )
    kept = [record["conversations"][-1]["label"] for record in read(tmp_path / "rated_train.jsonl")]
    assert sorted(kept) == ["quality:1", "quality:5"]
    assert {reject["reason"] for reject in read(tmp_path / "rated.rejects.jsonl")} == {
        f"bad label: attribute quality is {value}, but it must be 1 to 5" for value in (0, 6)
    }


def test_grading_plan_and_report_have_every_value_of_the_scale_and_no_other(
    tmp_path: Path, records: list[dict[str, Any]], schema: AttributeSchema, schema_file: Path
) -> None:
    for record in records:  # as an annotator with a perfect value model leaves it
        record["conversations"][1]["gt_label"] = record["conversations"][1]["label"]
    graded = write(tmp_path / "graded.jsonl", records)

    requests = tmp_path / "requests.jsonl"
    run("plan_steering", prompts_file=graded, schema=schema_file, output_file=requests, num_prompts=3)
    asked = read(requests)
    for attribute in schema.attributes:
        swept = [one["attributes"][attribute.name] for one in asked if one["swept"] == attribute.name]
        assert {value: swept.count(value) for value in swept} == dict.fromkeys(attribute.values(), 3)

    answers = write(tmp_path / "answers.jsonl", [{**one, "response": "x"} for one in asked])
    to_grade = tmp_path / "to_grade.jsonl"
    run("plan_steering", responses_file=answers, output_file=to_grade)
    obeyed = read(to_grade)
    for record in obeyed:
        record["conversations"][1]["label"] = schema.order(record["attributes"]).line
    flags = {"graded_file": graded, "graded_responses_file": write(tmp_path / "obeyed.jsonl", obeyed)}
    run("report", **flags, schema=schema_file, output_dir=tmp_path / "out")

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["schema"] == "own"
    quality = summary["value_model"]["quality"]
    assert quality["values"] == [1, 2, 3, 4, 5]
    assert quality["confusion"] == [[int(i == j) for j in range(5)] for i in range(5)]
    curve = summary["steering"]["humor"]["curve"]
    assert [(value, mean) for value, mean, *_ in curve] == [(1, 1), (2, 2), (3, 3)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<th>5") == 2 and "<th>0" not in page  # a row and a column of the confusion of quality
