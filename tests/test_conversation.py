import pytest

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import SYSTEM_PROMPT, Conversation, RecordRef, Turn
from steerlm_nemo.errors import RecordError

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
            Turn("Assistant", "Hello.", Attributes((("quality", 4), ("lang", "en")))),
        ),
        ref=REF,
        type="VALUE_TO_TEXT",
        mask_roles=("User",),
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
        ({"conversations": [{**USER_TURN, "label": "quality:high"}]}, "turn 0: attribute quality has value 'high'"),
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


def test_the_system_prompt_ends_with_the_two_newlines_of_the_reference():
    assert SYSTEM_PROMPT.startswith("A chat between a curious user and an artificial intelligence assistant. The ")
    assert SYSTEM_PROMPT.endswith("answers to the user's questions.\n\n")
    assert len(SYSTEM_PROMPT) == 156
