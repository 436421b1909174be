import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import (
    SYSTEM_PROMPT,
    Conversation,
    Pair,
    RecordRef,
    Response,
    ResponseGroup,
    Turn,
    to_lines,
)
from steerlm_nemo.errors import RecordError
from steerlm_nemo.records import dump_record

REF = RecordRef("train.jsonl", 7)
USER_TURN = {"value": "Hi", "from": "User", "label": None}
ASSISTANT_TURN = {"value": "Hello.", "from": "Assistant", "label": "quality:4,lang:en", "lang": "en"}
RECORD = {
    "conversations": [USER_TURN, ASSISTANT_TURN],
    "tree_id": "t1",
    "system": "SYS.",
    "mask": "User",
    "type": "VALUE_TO_TEXT",
}


def test_a_record_becomes_a_conversation():
    assert Conversation.from_record(RECORD, REF) == Conversation(
        system="SYS.",
        turns=(
            Turn("User", "Hi", None),
            Turn("Assistant", "Hello.", Attributes((("quality", 4), ("lang", "en"))), lang="en"),
        ),
        ref=REF,
        type="VALUE_TO_TEXT",
        mask="User",
        tree_id="t1",
    )


def test_without_mask_and_type_the_user_is_masked_and_nothing_is_conditioned():
    conversation = Conversation.from_record({"conversations": [USER_TURN], "system": ""}, REF)
    assert conversation.mask_roles == ("User",)
    assert conversation.type is None


def test_an_empty_label_is_an_empty_line_and_a_missing_one_is_ungraded():
    turns = [{"value": "a", "from": "User", "label": ""}, {"value": "b", "from": "Assistant"}]
    conversation = Conversation.from_record({**RECORD, "conversations": turns}, REF)
    assert [turn.attributes for turn in conversation.turns] == [Attributes(()), None]


def test_a_mask_may_list_several_roles():
    assert Conversation.from_record({**RECORD, "mask": "User, System"}, REF).mask_roles == ("User", "System")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "non-empty list"),
        ({"conversations": "Hi"}, "non-empty list"),
        ({"conversations": ["Hi"]}, "turn 0: a turn must be an object"),
        ({"conversations": [USER_TURN, {"from": "Assistant"}]}, "turn 1: 'value' must be a string"),
        ({"conversations": [{**USER_TURN, "from": 3}]}, "turn 0: 'from' must be a string"),
        ({"conversations": [{**USER_TURN, "label": 4}]}, "turn 0: 'label' must be a string"),
        (
            {"conversations": [{**USER_TURN, "label": "quality:high"}]},
            "turn 0: attribute quality has value 'high'",
        ),
        ({"system": None}, "'system' must be a string"),
        ({"mask": None}, "'mask' must be a role name"),
        ({"type": "FOO"}, "TEXT_TO_VALUE, VALUE_TO_TEXT or null"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_file_and_line(change, message):
    with pytest.raises(RecordError) as caught:
        Conversation.from_record({**RECORD, **change}, REF)
    assert str(caught.value).startswith("train.jsonl:7")
    assert message in str(caught.value)
    assert (caught.value.ref, message in caught.value.reason) == (REF, True)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # worker processes send it


def test_the_system_prompt_ends_with_the_two_newlines_of_the_reference():
    assert SYSTEM_PROMPT.startswith("A chat between a curious user and an artificial intelligence assistant. The ")
    assert SYSTEM_PROMPT.endswith("answers to the user's questions.\n\n")
    assert len(SYSTEM_PROMPT) == 156


# --- written again ---

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=6)
ANYTHING = st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT, max_size=2) | st.dictionaries(TEXT, TEXT)
LINE = st.sampled_from([None, "", "quality:4", "humor:0,quality:12,lang:pt"])
OPTIONAL = {"label": LINE, "gt_label": LINE, "lang": ANYTHING, "label_soft": ANYTHING, "message_id": ANYTHING}


@st.composite
def shuffled(draw, known, optional):
    """An object with these keys and some others, in any order."""
    made = draw(st.dictionaries(TEXT, ANYTHING, max_size=3)) | draw(st.fixed_dictionaries(known, optional=optional))
    return {key: made[key] for key in draw(st.permutations(list(made)))}


TURNS = st.lists(shuffled({"from": TEXT, "value": TEXT}, OPTIONAL), min_size=1, max_size=4)
TYPES = st.sampled_from([None, "TEXT_TO_VALUE", "VALUE_TO_TEXT"])
RECORDS = shuffled(
    {"conversations": TURNS, "system": TEXT}, {"mask": TEXT, "type": TYPES, "tree_id": ANYTHING, "further": ANYTHING}
)


@given(RECORDS)
def test_what_is_read_and_not_changed_is_written_byte_for_byte(record):
    conversation = Conversation.from_record(record, REF)
    assert json.dumps(conversation.to_record()) == json.dumps(record)
    assert to_lines([conversation]) == [dump_record(record)]


@given(RECORDS, TYPES, st.sampled_from([None, "humor:1"]))
def test_what_is_changed_is_all_that_changes(record, kind, line):
    read = Conversation.from_record(record, REF)
    attributes = None if line is None else Attributes.parse(line)
    first, *others = read.turns
    changed = replace(read, type=kind, turns=(replace(first, attributes=attributes), *others[:1])).to_record()
    assert changed.get("type") == kind and changed["conversations"][0].get("label") == line
    before = {**record, "type": kind, "conversations": record["conversations"][:2]}
    before["conversations"][0] = {**before["conversations"][0], "label": line}
    known = {"type", "label", *OPTIONAL}

    def others_of(mapping):
        return [(key, value) for key, value in mapping.items() if key not in known]

    assert others_of(changed | {"conversations": 0}) == others_of(before | {"conversations": 0})
    for turn, wanted in zip(changed["conversations"], before["conversations"], strict=True):
        assert others_of(turn) == others_of(wanted)
        assert all(turn.get(key) == wanted.get(key) for key in known)


def test_new_attributes_stand_where_the_annotator_of_the_reference_writes_them():
    turn = {"value": "a", "from": "Assistant", "lang": "en", "label_soft": {}, "gt_label": "humor:1", "note": 1}
    (read,) = Conversation.from_record({**RECORD, "conversations": [turn]}, REF).turns
    graded = replace(read, attributes=Attributes.parse("humor:2"), beliefs={"humor": {}})
    (written,) = Conversation("", (graded,), REF).to_record()["conversations"]
    assert json.dumps(written) == json.dumps(
        {"value": "a", "from": "Assistant", "lang": "en", "note": 1, "label": "humor:2"}
        | {"label_soft": {"humor": {}}, "gt_label": "humor:1"}
    )


MADE_TURNS = st.builds(
    Turn,
    TEXT,
    TEXT,
    st.sampled_from([None, Attributes(()), Attributes.parse("quality:4,lang:en")]),
    st.none() | TEXT,
    says_null=st.booleans(),
)


@given(st.lists(MADE_TURNS, min_size=1), st.lists(st.lists(st.integers(0, 9)), max_size=4), st.none() | TEXT, ANYTHING)
def test_turns_that_conversations_share_are_written_as_if_each_were_alone(turns, picks, tree_id, kept):
    made = [
        Conversation(SYSTEM_PROMPT, tuple(turns[i % len(turns)] for i in pick), REF, None, "User", tree_id, further)
        for pick in picks
        for further in ({}, {"k": 1}, {"k": True}, {"k": kept}, {})
    ]
    assert to_lines(made) == [dump_record(conversation.to_record()) for conversation in made]


def test_what_json_cannot_carry_is_refused_with_its_place():
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    for value in (deep, float("inf")):
        with pytest.raises(RecordError, match="train.jsonl:7: cannot be written as JSON"):
            to_lines([Conversation.from_record({**RECORD, "note": value}, REF)])


def test_a_pair_is_two_conversations_and_says_which_is_better():
    context = Conversation("S", (Turn("User", "2+2?"),), REF, "TEXT_TO_VALUE", further={"id": 1})
    responses = tuple(Response((Turn("Assistant", text),), further={"kind": text}) for text in ("4", "5"))
    first, second = Pair(context, responses, chosen=1, margin=2.0).conversations()
    assert [turn.text for turn in first.turns] == ["2+2?", "4"] and second.turns[0] is context.turns[0]
    assert list(first.further.items()) == [("preference", "rejected"), ("id", 1), ("kind", "4")]
    assert second.further["preference"] == "chosen"
    for neither in (Pair(context, responses), ResponseGroup(context, responses)):
        assert [one.further for one in neither.conversations()] == [{"id": 1, "kind": "4"}, {"id": 1, "kind": "5"}]
