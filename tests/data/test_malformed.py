"""Each class of malformed input in 1 % of the lines, through every step that reads data: no crash, nothing lost."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import malformed_lines, simple_tree

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.data.cleaning import Cleaner, clean_file
from steerlm_nemo.data.inspection import inspect_file
from steerlm_nemo.data.mask_view import views_of_lines
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import Accounting, dump_record
from steerlm_nemo.report.mask import terminal_text
from steerlm_nemo.template import ChatTemplate

NUM_OF_EACH = 3
GOOD = {
    "conversations": [
        {"value": "Hi", "from": "User", "label": None},
        {"value": "Yes.", "from": "Assistant", "label": "quality:3"},
    ],
    "system": "SYS.\n\n",
    "mask": "User",
    "type": "VALUE_TO_TEXT",
}
ANY_TEXT = st.text(st.characters(), max_size=20)  # lone surrogates and control characters too
ANY_TURN = st.fixed_dictionaries(
    {"value": ANY_TEXT, "from": st.sampled_from(["User", "Assistant"]) | ANY_TEXT},
    optional={"label": st.none() | st.sampled_from(["", "quality:4,lang:en"]) | ANY_TEXT},
)


def malformed_records():
    """As `malformed_lines`, for chat records: (class, line, kept by data_clean, accepted by training)."""

    def chat(text="Hi", label="quality:4,toxicity:0", role="Assistant", **fields):
        turns = [{"value": text, "from": "User", "label": None}, {"value": "Yes.", "from": role, "label": label}]
        return {"conversations": turns, "system": "SYS.\n\n", "mask": "User", "type": "VALUE_TO_TEXT", **fields}

    good = json.dumps(chat()).encode()
    unlabelled = chat()
    del unlabelled["conversations"][1]["label"]
    thread = chat()
    thread["conversations"] *= 250
    return [
        ("bad UTF-8", good.replace(b"Yes", b"\xff"), False, False),
        ("truncated JSON", good[:-20], False, False),
        ("carriage return", good + b"\r", True, True),
        ("missing label", json.dumps(unlabelled).encode(), True, True),
        ("null label", json.dumps(chat(label=None)).encode(), True, True),
        ("value out of range", json.dumps(chat(label="quality:9")).encode(), True, False),
        ("NaN value", json.dumps(chat(label="quality:nan")).encode(), False, False),
        ("NaN in JSON", json.dumps(chat(score=float("nan"))).encode(), False, False),
        ("unknown role", json.dumps(chat(role="Narrator")).encode(), True, True),
        ("role that is no text", json.dumps(chat(role=7)).encode(), False, False),
        ("empty text", json.dumps(chat(text="")).encode(), True, True),
        ("5 MB text", json.dumps(chat(text="long " * 1_000_000)).encode(), False, True),  # no target within the length
        ("500-turn thread", json.dumps(thread).encode(), True, True),
        ("duplicate id", json.dumps(chat(tree_id="0")).encode(), True, True),
        ("cyclic parent ids", json.dumps(chat(message_id="a", parent_id="a")).encode(), True, True),
        ("lone surrogate", json.dumps(chat(text="\ud800")).encode(), False, False),
        ("markers in a text", json.dumps(chat(text="\x11Assistant\n\x12quality:0\n")).encode(), True, True),
    ]


@settings(max_examples=40)
@given(st.lists(st.lists(ANY_TURN, max_size=4), max_size=4), ANY_TEXT)
def test_any_text_anywhere_in_a_record_is_cleaned_inspected_and_shown_or_rejected(
    tmp_path_factory, small_tokenizer, conversations, system
):
    folder = tmp_path_factory.mktemp("any")
    records = [GOOD] + [{**GOOD, "conversations": turns, "system": system} for turns in conversations]
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    accounting = Accounting.beside(folder / "clean.jsonl")
    clean_file(source, folder / "clean.jsonl", Cleaner(ChatTemplate(), small_tokenizer, 4096), accounting)
    assert accounting.counts.total() == len(records)
    rejected = rejected_lines(accounting)
    found = inspect_file(str(source), Options(), ChatTemplate(), small_tokenizer, "auto", folder)
    assert {int(where.rpartition(":")[2]) for where, _ in found.rejects} == rejected
    kept = [number for number in range(1, len(records) + 1) if number not in rejected]
    for view in views_of_lines(source, kept, ChatTemplate(), small_tokenizer, 4096):
        shown = terminal_text(view, colour=False)
        assert not [char for char in shown if not char.isprintable() and char != "\n"]
        rendered = ChatTemplate().render(view.conversation, small_tokenizer)
        assert tuple(token.id for token in view.tokens) == rendered.token_ids


def file_of(path, good_line, bad_lines):
    """100 lines per class and repetition, one of them malformed. Returns class -> line numbers."""
    lines = [good_line(number) for number in range(100 * NUM_OF_EACH - NUM_OF_EACH * len(bad_lines))]
    places = {}
    for number in range(NUM_OF_EACH * len(bad_lines)):
        lines.insert(5 * number, bad_lines[number % len(bad_lines)])
    for number in range(NUM_OF_EACH * len(bad_lines)):
        places.setdefault(number % len(bad_lines), []).append(5 * number + 1)
    # A byte order mark before all of it.
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    return places, len(lines)


def rejected_lines(accounting):
    if not accounting.counts["rejected"]:
        return set()
    rejects = [json.loads(line) for line in accounting.rejects_path.read_text().splitlines()]
    assert all(reject["reason"] and "raw" in reject for reject in rejects)
    return {int(reject["where"].rpartition(":")[2]) for reject in rejects}


def test_trees_through_preprocessing_and_inspection(tmp_path):
    classes = malformed_lines()
    source = tmp_path / "trees.jsonl"
    places, num_lines = file_of(
        source, lambda number: json.dumps(simple_tree(str(number))).encode(), [raw for _, raw, _ in classes]
    )
    expected = {line for i, (_, _, usable) in enumerate(classes) if not usable for line in places[i]}

    accounting = Accounting.beside(tmp_path / "out")
    preprocess(source, tmp_path / "out", split_ratio=0.9, seed=10, options=Options(), trees=accounting)
    assert dict(accounting.counts) == {"written": num_lines - len(expected), "rejected": len(expected)}
    assert rejected_lines(accounting) == expected

    found = inspect_file(str(source), Options(), ChatTemplate(), None, "auto", tmp_path)
    assert dict(found.records.counts) == dict(accounting.counts)
    assert {int(where.rpartition(":")[2]) for where, _ in found.rejects} == expected


def test_records_through_data_clean_training_and_inspection(tmp_path, small_tokenizer):
    from steerlm_nemo.training.datasets import chat as dataset

    classes = malformed_records()
    source = tmp_path / "records.jsonl"
    places, num_lines = file_of(source, lambda number: dump_record(GOOD).encode(), [raw for _, raw, _, _ in classes])
    unusable = {
        line for i, (name, _, kept, _) in enumerate(classes) if not kept and "5 MB" not in name for line in places[i]
    }
    untrainable = {line for i, (_, _, _, accepted) in enumerate(classes) if not accepted for line in places[i]}

    accounting = Accounting.beside(tmp_path / "clean.jsonl")
    clean_file(source, tmp_path / "clean.jsonl", Cleaner(ChatTemplate(), small_tokenizer, 4096), accounting)
    assert dict(accounting.counts) == {
        "written": num_lines - len(unusable) - NUM_OF_EACH,
        "filtered": NUM_OF_EACH,
        "rejected": len(unusable),
    }
    assert rejected_lines(accounting) == unusable

    def load(path):
        return dataset.ChatDataset(path, small_tokenizer, ChatTemplate(), 4096, 16, None, NEMO12_LANG)

    def refusal():
        with pytest.raises(InputError) as caught:
            load(source)
        return str(caught.value).split("\n  ")

    first, *named = refusal()
    assert f"{len(untrainable)} of {num_lines} records cannot be used" in first
    counts = [int(problem.split(" records: ")[0]) for problem in named]
    assert counts == [NUM_OF_EACH] * (len(untrainable) // NUM_OF_EACH)  # each reason once, with its first place
    found = {int(re.findall(rf"\(first: {re.escape(str(source))}:(\d+)", problem)[0]) for problem in named}
    assert found < untrainable and len(found) == len(named)
    with pytest.raises(InputError, match=f"{NUM_OF_EACH} of {num_lines - len(unusable) - NUM_OF_EACH} records"):
        load(tmp_path / "clean.jsonl")  # a grade out of range is for training to refuse: it alone knows the schema

    found = inspect_file(str(source), Options(), ChatTemplate(), small_tokenizer, "auto", tmp_path)
    assert dict(found.records.counts) == {"written": num_lines - len(unusable), "rejected": len(unusable)}
    assert {int(where.rpartition(":")[2]) for where, _ in found.rejects} == unusable
    assert found.turns[500] == NUM_OF_EACH
    assert found.num_with_markers == NUM_OF_EACH
