"""What a step knows of its records, the next does not ask again: the report beside them tells."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import run_script
from trees import simple_tree

from steerlm_nemo.attributes import COMBINED9, HELPSTEER5, NEMO12, NEMO12_LANG, TOY6, AttributeSchema, load_schema
from steerlm_nemo.config import load_config
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.record_report import report_beside, told_schema
from steerlm_nemo.training.config import choose_schema, read_schema
from steerlm_nemo.training.methods.sft import SFT

RATED = [
    {"prompt": f"What is {i}?", "response": "A number.", **dict.fromkeys(HELPSTEER5.names, i % 5)} for i in range(8)
]
OWN = "name: own\nattributes: [{name: quality, minimum: 1, maximum: 5}]\nlanguages: []\n"


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ok(script: str, *arguments: object) -> None:
    ended = run_script(script, *arguments)
    assert ended.code == 0, ended.said


def training(train: Path, validation: Path, *further: str) -> object:
    files = [f"model.data.train_ds.file_path={train}", f"model.data.validation_ds.file_path={validation}"]
    return load_config([*files, "model.encoder_seq_length=256", *further], "gpt_sft")


@pytest.fixture
def preprocessed(tmp_path: Path) -> Callable[..., Path]:
    """A prefix of records made of a source of a shape, by `preprocessing.py` with these flags."""

    def make(source: list[dict[str, object]], *flags: str) -> Path:
        path = write(tmp_path / "source.jsonl", source)
        prefix = tmp_path / "p"
        ok("preprocessing", f"--input_file={path}", f"--output_file_prefix={prefix}", "--split_ratio=0.5", *flags)
        return prefix

    return make


@pytest.mark.parametrize(
    ("source", "flags", "schema"),
    [
        (RATED, [], HELPSTEER5),
        (RATED, ["--schema=combined9"], COMBINED9),
        ([simple_tree(str(i)) for i in range(4)], [], NEMO12_LANG),
        ([simple_tree(str(i)) for i in range(4)], ["--schema=toy6"], TOY6),
        (RATED, ["--schema={own}"], None),  # a file
    ],
)
def test_the_schema_is_carried_from_preprocessing_to_training(
    preprocessed, tmp_path: Path, small_model: Path, source, flags: list[str], schema: AttributeSchema | None
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    if schema is None:
        source = [{**row, "quality": 1 + row["helpfulness"]} for row in source]
        schema = load_schema(str(own))
    prefix = preprocessed(source, *(flag.format(own=own) for flag in flags))
    train, val = Path(f"{prefix}_train.jsonl"), Path(f"{prefix}_val.jsonl")
    assert choose_schema(training(train, val)) == (schema, f"as {prefix}.report.json tells")
    own.unlink()  # the report has all of it, not its name

    cleaned = tmp_path / "cleaned.jsonl"
    tokenizer = ["--library=sentencepiece", f"--model_file={small_model}", f"--report={tmp_path}/elsewhere.json"]
    ok("data_clean", f"--dataset_file={train}", f"--output_file={cleaned}", *tokenizer)
    built = tmp_path / "built.jsonl"
    ok("build_sft_data", f"--input_file={cleaned}", f"--output_file={built}")
    again = tmp_path / "again"
    ok("preprocessing", f"--input_file={built}", f"--output_file_prefix={again}", "--split_ratio=0.5")
    packed = tmp_path / "built.jsonl.gz"
    packed.write_bytes(gzip.compress(built.read_bytes()))
    for records in (cleaned, built, Path(f"{again}_train.jsonl"), packed):
        assert told_schema(records) == schema, records
        assert read_schema(training(records, val)) == schema
        assert not [*SFT.warnings(training(records, val), {})]


def test_what_is_set_goes_before_what_is_told_and_both_are_named(preprocessed) -> None:
    prefix = preprocessed(RATED)
    cfg = training(Path(f"{prefix}_train.jsonl"), Path(f"{prefix}_val.jsonl"), "model.data.attribute_schema=nemo12")
    assert choose_schema(cfg) == (NEMO12, "as model.data.attribute_schema says")
    (warning,) = SFT.warnings(cfg, {})
    assert (
        "attribute_schema is schema nemo12 (" in warning and f"{prefix}.report.json tells schema helpsteer5" in warning
    )


def test_two_files_that_tell_different_schemas_are_refused_by_name(preprocessed, tmp_path: Path) -> None:
    train = Path(f"{preprocessed(RATED)}_train.jsonl")
    val = write(tmp_path / "val.jsonl", [])
    Path(f"{val}.report.json").write_text(json.dumps({"attribute_schema": TOY6.to_dict()}))
    with pytest.raises(ConfigError, match=r"p.report.json tells schema helpsteer5.*val.jsonl.report.json tells.*toy6"):
        choose_schema(training(train, val))
    assert read_schema(training(train, val, "model.data.attribute_schema=helpsteer5")) == HELPSTEER5


@pytest.mark.parametrize("facts", [None, {}, {"written": 3}, {"attribute_schema": None}])
def test_records_that_tell_nothing_are_of_the_default(tmp_path: Path, facts: dict[str, object] | None) -> None:
    """Of another program, or of an earlier version of this one."""
    records = write(tmp_path / "old_train.jsonl", [])
    if facts is not None:
        (tmp_path / "old.report.json").write_text(json.dumps(facts))
    schema, why = choose_schema(training(records, records))
    assert schema == NEMO12_LANG and "default" in why


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '{"attribute_schema": 7}',
        '{"attribute_schema": {"name": "x"}}',
        '{"a":' * 100_000,
        "\0\ud800",
    ],
)
def test_a_report_that_cannot_be_read_is_refused_and_not_passed_over(tmp_path: Path, content: str) -> None:
    records = write(tmp_path / "x.jsonl", [])
    report = tmp_path / "x.jsonl.report.json"
    report.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="x.jsonl.report.json.*name the schema yourself"):
        told_schema(records)


def test_a_report_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.report.json").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        report_beside(tmp_path / "x.jsonl")


def test_markers_of_the_cleaning_are_compared_with_those_of_training(
    preprocessed, tmp_path: Path, small_model: Path
) -> None:
    cleaned = tmp_path / "c.jsonl"
    source = f"--dataset_file={preprocessed(RATED)}_train.jsonl"
    tokenizer = ["--library=sentencepiece", f"--model_file={small_model}"]
    ok("data_clean", source, f"--output_file={cleaned}", *tokenizer, "--compat=nemo1.23")
    warnings = [*SFT.warnings(training(cleaned, cleaned), {})]
    assert len(warnings) == 1 and "turn_start '<extra_id_1>'" in warnings[0]
