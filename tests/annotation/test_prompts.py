"""The bytes and tokens a model is asked with are those it was trained on (D-02, D-08, D-31)."""

import pytest
import tiny_world
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.conversation import SYSTEM_PROMPT, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, RecordRef, Turn
from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

LINE = NEMO12_LANG.complete({"quality": 3})
# Texts that begin or end with what a tokenizer likes to merge or drop, and texts with markers inside.
texts = st.lists(
    st.sampled_from(["\n", " ", "a", "Hi there", ">", "<", "<extra_id_1>", "\x11", "é", "日", "quality:4", "\t"]),
    max_size=5,
).map("".join)


@pytest.fixture(scope="module", params=["tiny", "llama2-tokenizer.model", "sentencepiece-test_model.model"])
def tokenizer(request, tmp_path_factory):
    if request.param == "tiny":
        return tiny_world.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return SentencePieceTokenizer(request.getfixturevalue("genuine_data") / "tokenizers" / request.param)


def conversation(record_type, system, contents):
    turns = [
        Turn("User", content, LINE if record_type == TEXT_TO_VALUE else None)
        if index % 2 == 0
        else Turn("Assistant", content, LINE)
        for index, content in enumerate(contents)
    ]
    return Conversation(system, tuple(turns), RecordRef("test", 1), record_type)


def steering_prompt_of_last(template, whole):
    """The prompt our client sends for the last turn of a training conversation."""
    from steerlm_nemo.messages import conversation_of

    messages = [
        {"role": turn.role.lower(), "content": turn.text}
        | ({"attributes": turn.attributes.as_dict()} if turn.attributes else {})
        for turn in whole.turns[:-1]
    ]
    served = SteerLMFormat(template, NEMO12_LANG, STEERLM)
    history = conversation_of(messages, LINE, served.schema, whole.system)
    return template.steering_prompt(history, "Assistant", LINE.line)


@pytest.mark.parametrize("template", [ChatTemplate(), EXTRA_ID_TEMPLATE], ids=["bytes", "extra_id"])
@pytest.mark.parametrize("record_type", [TEXT_TO_VALUE, VALUE_TO_TEXT])
@settings(max_examples=60, deadline=None)
@given(system=st.just(SYSTEM_PROMPT) | texts, contents=st.lists(texts, min_size=4, max_size=4))
def test_a_prompt_is_a_prefix_of_its_training_text_in_bytes_and_in_tokens(
    tokenizer, template, record_type, system, contents
):
    whole = conversation(record_type, system, contents)
    training_text = "".join(segment.text for segment in template.segments(whole))
    training_ids = list(template.render(whole, tokenizer).token_ids)
    if record_type == TEXT_TO_VALUE:
        prompt, answer = template.annotation_prompt(whole, 3), LINE.line + "\n"
    else:
        prompt, answer = steering_prompt_of_last(template, whole), template.sanitise(contents[-1])[0] + "\n"
    assert training_text == prompt + answer + template.turn_start
    prompt_ids = template.encode_prompt(prompt, tokenizer)
    assert training_ids[: len(prompt_ids)] == prompt_ids


def test_the_prompts_bytes_are_these():
    """Spelled out, so that the comparison above cannot agree with itself about something wrong."""
    whole = conversation(TEXT_TO_VALUE, "SYS.\n\n", ["Hi?", "It is 4."])
    assert ChatTemplate().annotation_prompt(whole, 1) == (
        f"\x00System\nSYS.\n\n\n\x11User\nHi?\n\x12{LINE.line}\n\x11Assistant\nIt is 4.\n\x12"
    )
    whole = conversation(VALUE_TO_TEXT, "SYS.\n\n", ["Hi?", "It is 4.", "So?", "Yes."])
    assert steering_prompt_of_last(ChatTemplate(), whole) == (
        f"\x00System\nSYS.\n\n\n\x11User\nHi?\n\x11Assistant\n\x12{LINE.line}\nIt is 4.\n"
        f"\x11User\nSo?\n\x11Assistant\n\x12{LINE.line}\n"
    )
