import gzip
import json

import pytest

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG, Attributes
from steerlm_nemo.data.attribute_source import AttributeSource, completed
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting

LISTS = {"name": ["spam", "quality", "humor"], "value": [0.0, 0.875, 0.5]}


def run(source, prefix, **options):
    files = {key: options.pop(key) for key in ("labels_from",) if key in options}
    records = Accounting.beside(prefix)
    tally = preprocess(source, prefix, split_ratio=1.0, seed=10, options=Options(**options), trees=records, **files)
    with open(f"{prefix}_train.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file], tally, records


def original(path):
    rows = [
        {"message_id": "m1", "text": "Hi", "role": "prompter", "lang": "en", "labels": LISTS},
        {"message_id": "m2", "parent_id": "m1", "text": "Yo", "role": "assistant", "lang": "en", "labels": LISTS},
        {"message_id": "m3", "parent_id": "m1", "text": "Ha", "role": "assistant", "lang": "en", "labels": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_translation_gets_the_grades_of_the_original_by_message_id(tmp_path):
    translated = {
        "ID": "oasst1-1",
        "messages": [
            {"role": "system", "content": "日本語で答えなさい。"},
            {"role": "user", "content": "こんにちは", "message_id": "m1"},
            {"role": "assistant", "content": "やあ", "message_id": "m2"},
            {"role": "user", "content": "元気?", "message_id": "m9"},
        ],
    }
    (tmp_path / "ja.json").write_text(json.dumps([translated], ensure_ascii=False), encoding="utf-8")
    (record,), tally, _ = run(
        tmp_path / "ja.json", tmp_path / "out", labels_from=original(tmp_path / "en.jsonl"), record_type="VALUE_TO_TEXT"
    )
    assert record["system"] == "日本語で答えなさい。"
    assert [(turn["value"], turn["label"]) for turn in record["conversations"]] == [
        ("こんにちは", None),
        ("やあ", "quality:4,humor:2"),
        ("元気?", None),
    ]
    assert dict(tally.joined) == {"matched": 2, "unmatched": 1}
    assert "messages joined to labels: matched: 2; unmatched: 1" in tally.summary(Accounting.beside("x"))


def test_a_grade_that_is_there_is_never_overwritten(tmp_path):
    tree = {
        "message_tree_id": "m1",
        "prompt": {
            **{"message_id": "m1", "text": "q", "role": "prompter"},
            "replies": [
                {"message_id": "m2", "text": "a", "role": "assistant", "labels": {"quality": {"value": 0.25}}},
                {"message_id": "m3", "text": "b", "role": "assistant"},
            ],
        },
    }
    (tmp_path / "trees.jsonl").write_text(json.dumps(tree) + "\n")
    records, tally, _ = run(
        tmp_path / "trees.jsonl", tmp_path / "out", labels_from=original(tmp_path / "en.jsonl"),
        fill=Attributes.parse("quality:0,violence:0"),
    )  # fmt: skip
    (question, graded), (_, ungraded) = (record["conversations"] for record in records)
    assert question["label"] == "quality:4,humor:2"
    # quality is the message's own, humor from the second file, violence from the defaults; the order is the schema's.
    assert graded["label"] == "quality:1,humor:2,violence:0"
    # Nobody graded this one: defaults would be grades out of thin air.
    assert "label" not in ungraded
    assert tally.num_filled == 2 + 2


def test_completion_fills_what_lacks_in_schema_order_and_lang_stays_last():
    own, other = Attributes.parse("humor:1,lang:ja"), Attributes.parse("quality:4,humor:3")
    assert completed(own, other, NEMO12_LANG).line == "quality:4,humor:1,lang:ja"
    assert completed(None, other, None) == other
    assert completed(own, None, None) is own


@pytest.mark.parametrize("form", ["lists", "maps"])
def test_labels_may_come_as_one_object_by_id(tmp_path, form):
    labels = LISTS if form == "lists" else {"quality": {"value": 0.875}, "humor": {"value": 0.5}}
    (tmp_path / "id2label.json").write_text(json.dumps({"m1": labels, "m2": None}, indent=2))
    source = AttributeSource(tmp_path / "id2label.json", NEMO12_LANG, tmp_path)
    assert (source.get("m1").line, source.get("m2"), source.get(None)) == ("quality:4,humor:2", None, None)
    assert len(source) == 1


def test_a_file_without_usable_labels_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing in it has a message_id .* labels of helpsteer5"):
        AttributeSource(original(tmp_path / "en.jsonl"), HELPSTEER5, tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(InputError, match="labels are taken from oasst-trees, oasst-messages, chat"):
        AttributeSource(tmp_path / "rows.jsonl", NEMO12_LANG, tmp_path)
    twice = [
        {"message_id": "m", "text": "", "role": "assistant", "labels": {"quality": {"value": value}}}
        for value in (0, 1)
    ]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    with pytest.raises(RecordError, match="twice.jsonl:2: duplicate message_id: m has other labels"):
        AttributeSource(tmp_path / "twice.jsonl", NEMO12_LANG, tmp_path)


def test_grades_of_people_are_completed_with_those_of_a_model_turn_by_turn(tmp_path):
    def chat(*labels):
        texts = ("Hi", "Yes", "Sure?", "Yes")
        turns = [
            {"value": text, "from": role, "label": label}
            for text, role, label in zip(texts, ("User", "Assistant") * 2, labels, strict=True)
        ]
        return json.dumps({"conversations": turns, "system": "", "mask": "User"}) + "\n"

    (tmp_path / "people.jsonl").write_text(chat(None, "quality:4", None, None))
    (tmp_path / "model.jsonl").write_text(chat(None, "quality:1,humor:2", None, "quality:3,humor:0,lang:en"))
    (record,), tally, _ = run(tmp_path / "people.jsonl", tmp_path / "out", labels_from=tmp_path / "model.jsonl")
    labels = [turn["label"] for turn in record["conversations"]]
    # The two answers read alike; what was said before tells them apart.
    assert labels == [None, "quality:4,humor:2", None, "quality:3,humor:0"]
    assert dict(tally.joined) == {"matched": 2, "unmatched": 2}


def test_genuine_messages_stripped_of_their_labels_get_them_back(shared_data, tmp_path):
    """The pseudo-translation: same ids, other texts, no labels."""
    folder = shared_data / "oasst1-en-validation"
    with gzip.open(folder / "messages.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    stripped = [{**row, "text": f"訳 {row['text']}", "labels": None, "lang": "ja"} for row in rows]
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stripped))
    translated, tally, records = run(tmp_path / "ja.jsonl", tmp_path / "ja", labels_from=folder / "trees.jsonl.gz")
    expected, _, _ = run(folder / "trees.jsonl.gz", tmp_path / "en")
    assert len(translated) == len(expected) == 683
    for ours, theirs in zip(translated, expected, strict=True):
        for turn, other in zip(ours["conversations"], theirs["conversations"], strict=True):
            assert turn["value"] == f"訳 {other['value']}"
            assert turn["label"] == other["label"].replace("lang:en", "lang:ja")
    # Four messages of the original carry no labels at all, six only ones that no schema keeps (spam and the like).
    assert dict(tally.joined) == {"matched": 1351, "unmatched": 10}
    assert dict(records.counts) == {"written": 1361, "rejected": 2}


@pytest.mark.parametrize(
    ("label", "outcome"),
    [
        ("quality:4, humor:1,", "quality:4,humor:1"),
        ("quality: 4,verbosity:1", "quality:4"),  # of another schema
        ("Quality:4", "'Quality' is not known, but 'quality' is"),
        ("quality:4,humour:1", "'humour' is not known, but 'humor' is"),
    ],
)
def test_a_label_of_a_chat_is_read_however_it_is_spaced_and_loses_no_misspelt_grade(tmp_path, label, outcome):
    turns = [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Yo", "label": label}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversations": turns, "system": "", "mask": "User"}) + "\n")
    if " is not known" in outcome:
        with pytest.raises(RecordError, match=outcome):
            AttributeSource(tmp_path / "in.jsonl", NEMO12_LANG, tmp_path)
        with pytest.raises(InputError, match=outcome):  # nothing is left to write
            run(tmp_path / "in.jsonl", tmp_path / "out", schema=NEMO12_LANG)
    else:
        assert len(AttributeSource(tmp_path / "in.jsonl", NEMO12_LANG, tmp_path)) == 1
        (written,), _, _ = run(tmp_path / "in.jsonl", tmp_path / "out", schema=NEMO12_LANG)
        assert written["conversations"][1]["label"] == outcome
