import json
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_nemo.data.regression import process_to_regression_format, vector_of
from steerlm_nemo.data.statistics import AttributeStatistics
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def record(*labels, **fields):
    texts = ["Hi, what is 2+2?", "It is 4.", "Sure?", "Yes."]
    turns = [
        {"value": text, "from": role, "label": label}
        for text, role, label in zip(texts, ["User", "Assistant"] * 2, labels, strict=False)
    ]
    return {"conversations": turns, "system": "ignored\n\n", "mask": "User", "type": "VALUE_TO_TEXT", **fields}


def run(tmp_path, *lines, strict=False):
    source = tmp_path / "in.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    records, statistics = Accounting.beside(tmp_path / "out.jsonl", strict=strict), AttributeStatistics()
    others = process_to_regression_format(source, tmp_path / "out.jsonl", records, statistics)
    return (tmp_path / "out.jsonl").read_text(encoding="utf-8"), records, others, statistics


def test_the_line_of_the_reference_comes_out_byte_for_byte(tmp_path):
    text, *_ = run(tmp_path, record(None, "quality:4,toxicity:0,humor:2,creativity:2"))
    assert text == (
        f'{{"text": "<extra_id_0>System\\n{SYSTEM}\\n<extra_id_1>User\\nHi, what is 2+2?\\n'
        '<extra_id_1>Assistant\\nIt is 4.\\n<extra_id_2>", '
        '"label": [4.0, 0.0, 2.0, 2.0, -100.0, -100.0, -100.0, -100.0, -100.0]}\n'
    )


def test_helpsteer_grades_take_the_last_five_places():
    label = "helpfulness:3,correctness:4,coherence:4,complexity:2,verbosity:1"
    assert vector_of(label) == ([-100.0] * 4 + [3.0, 4.0, 4.0, 2.0, 1.0], [])
    assert vector_of("quality:-3")[0][0] == -3.0
    assert vector_of(" quality: 4 , toxicity:0.5, lang: en,") == ([4.0, 0.5] + [-100.0] * 7, ["lang"])


def test_one_line_per_graded_turn_and_no_labels_in_the_history(tmp_path):
    text, records, others, _ = run(tmp_path, record(None, "quality:4,lang:en", "", "quality:1,violence:0"))
    first, second = map(json.loads, text.splitlines())
    assert (first["label"][0], second["label"][0]) == (4.0, 1.0)
    assert second["text"].startswith(first["text"].removesuffix("<extra_id_2>"))
    assert second["text"].endswith("<extra_id_1>User\nSure?\n<extra_id_1>Assistant\nYes.\n<extra_id_2>")
    assert "quality" not in second["text"]
    assert dict(others) == {"lang": 1, "violence": 1}
    assert dict(records.counts) == {"written": 1}


@pytest.mark.parametrize(
    ("label", "culprit"),
    [("quality", "'quality'"), ("quality:high", "'high'"), ("quality:1,quality:2", "'quality:2'"), (",", "''")],
)
def test_an_invalid_sample_is_rejected_naming_turn_and_item(tmp_path, label, culprit):
    text, records, *_ = run(tmp_path, record(None, "quality:4"), record(None, label))
    assert len(text.splitlines()) == 1
    assert dict(records.counts) == {"written": 1, "rejected": 1}
    (reject,) = map(json.loads, records.rejects_path.read_text().splitlines())
    assert reject["where"].endswith("in.jsonl:2")
    assert reject["reason"].startswith("invalid sample: turn 1: ") and culprit in reject["reason"]
    with pytest.raises(RecordError, match=r"in\.jsonl:2: invalid sample"):
        run(tmp_path, record(None, "quality:4"), record(None, label), strict=True)


def test_every_record_is_accounted_for(tmp_path):
    _, records, *_ = run(
        tmp_path,
        record(None, "quality:4"),
        record(None, None),
        record(None, "lang:en"),
        "{",
        {"conversations": 3},
        {"conversations": [{"from": "Bob", "value": "x"}]},
        {
            "conversations": [
                {"from": "User", "value": "\ud800"},
                {"from": "Assistant", "value": "", "label": "humor:1"},
            ]
        },
    )
    assert records.summary().startswith("7 read = 1 written + 2 filtered + 4 rejected")


def test_nothing_graded_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(InputError, match="no graded turn to write. Records: 1 read"):
        run(tmp_path, record(None, None))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_script_prints_sums_and_statistics(tmp_path):
    run(tmp_path, record(None, "quality:4,violence:1"), record(None, "quality:1"), record(None, "quality:1"))
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "process_to_regression_format.py"),
            *("--input-file", tmp_path / "in.jsonl", "--output-file", tmp_path / "again.jsonl", "-v"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert "records: 3 read = 3 written + 0 filtered + 0 rejected" in done.stdout
    assert "quality                   3   2.000     1     4  1:2  4:1" in done.stdout
    assert "attributes without a place in the vector, with their turns: violence: 1" in done.stderr


def test_genuine_helpsteer_gives_the_vectors_of_its_ratings(shared_data, tmp_path):
    """Preprocessed, made into regression lines, read back as conversations: the ratings of the file."""
    import gzip

    from steerlm_nemo.data.preprocessing import Options, preprocess

    source = shared_data / "helpsteer-sample" / "helpsteer.jsonl.gz"
    trees = Accounting.beside(tmp_path / "hs")
    preprocess(source, tmp_path / "hs", split_ratio=1.0, seed=10, options=Options(), trees=trees)
    records, statistics = Accounting.beside(tmp_path / "reg"), AttributeStatistics()
    process_to_regression_format(tmp_path / "hs_train.jsonl", tmp_path / "reg.jsonl", records, statistics)
    lines = [json.loads(line) for line in (tmp_path / "reg.jsonl").read_text(encoding="utf-8").splitlines()]
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    keys = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    expected = sorted([*(float(row[key]) for key in keys)] for row in rows)
    assert sorted(line["label"][4:] for line in lines) == expected
    # The counts that the sample's own description states.
    assert dict(statistics.counts["helpfulness"]) == {0: 6, 1: 16, 2: 66, 3: 151, 4: 78}
