import json

import pytest

from steerlm_nemo.data.sft_data import build_sft_data
from steerlm_nemo.data.statistics import AttributeStatistics
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import Accounting


def record(*turns, **fields):
    conversations = [{"value": value, "from": role, "label": label} for role, value, label in turns]
    return {"conversations": conversations, "tree_id": "t", "system": "S.\n\n", "mask": "User", **fields}


def run(tmp_path, *lines, messages=True):
    source = tmp_path / "in.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    records, statistics = Accounting.beside(tmp_path / "out.jsonl"), AttributeStatistics()
    build_sft_data(
        source, tmp_path / "out.jsonl", records, statistics, tmp_path / "messages.jsonl" if messages else None
    )
    read = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else None
        for path in (tmp_path / "out.jsonl", tmp_path / "messages.jsonl")
    ]
    return *read, records, statistics


GRADED = record(
    ("User", "Hi", "quality:2"), ("Assistant", "Hello.", "quality:4,lang:en"), ("User", "Bye", None),
    ("Assistant", "Ciao.", "quality:1"), type="TEXT_TO_VALUE",
)  # fmt: skip


def test_predicted_attributes_make_value_to_text_records_and_plain_messages(tmp_path):
    (sft,), (messages,), records, statistics = run(tmp_path, GRADED)
    assert sft["type"] == "VALUE_TO_TEXT"
    assert [turn["label"] for turn in sft["conversations"]] == [None, "quality:4,lang:en", None, "quality:1"]
    assert list(sft) == ["conversations", "tree_id", "system", "mask", "type"]
    assert messages == {
        "messages": [
            {"role": "system", "content": "S."},
            {"role": "user", "content": "Hi\nquality:4,lang:en"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Bye\nquality:1"},
            {"role": "assistant", "content": "Ciao."},
        ]
    }
    assert dict(records.counts) == {"written": 1}
    assert dict(statistics.counts["quality"]) == {4: 1, 1: 1}


def test_every_record_is_accounted_for(tmp_path):
    _, messages, records, _ = run(
        tmp_path,
        GRADED,
        record(("User", "Hi", None), ("Assistant", "Hello.", None)),
        record(("User", "Hi", None), ("Assistant", "Hello.", "lang:en")),
        record(("User", "Hi", None), ("User", "Hi?", None)),
        record(("Assistant", "Hello.", "quality:4"), ("User", "Hi", None)),
        record(("User", "\ud800", None), ("Assistant", "Hello.", "quality:4")),
        record(("User", "Hi", None), ("Assistant", "Hello.", "quality")),
        "{",
    )
    assert len(messages) == 1
    assert records.summary().startswith("8 read = 1 written + 3 filtered + 4 rejected")
    assert records.reasons["a response without attributes"] == 2
    assert records.reasons["no question"] == 1


def test_messages_are_written_only_when_asked_for(tmp_path):
    _, messages, _, _ = run(tmp_path, GRADED, messages=False)
    assert messages is None


def test_nothing_to_write_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(InputError, match="no record to write"):
        run(tmp_path, record(("User", "Hi", None), ("Assistant", "Hello.", None)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
