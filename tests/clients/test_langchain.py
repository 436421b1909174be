"""langchain-openai: models, streams, batches, chains."""

from __future__ import annotations

from collections.abc import Callable

import made_models
import pytest
import reference
import tiny_world
from programs_of_clients import Program, Raised, Server

CLIENT = "langchain"
LINE = {"quality": 1, "humor": 0, "lang": "de"}
QUESTIONS = list(made_models.DIALOGUES)


@pytest.fixture
def steering(start: Callable[..., Program], steered: Server) -> Program:
    return start(CLIENT, "langchain_program.py", steered)


@pytest.fixture
def chatting(start: Callable[..., Program], plain: Server) -> Program:
    return start(CLIENT, "langchain_program.py", plain)


def test_attributes_steer_a_chain(steering: Program) -> None:
    wanted = tiny_world.response(LINE)
    assert steering("chain", system=tiny_world.SYSTEM, question="Speak!", extra_body={"attributes": LINE}) == wanted


def test_invoke_and_stream_are_what_transformers_says(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    answer = chatting("invoke", question=QUESTIONS[0], max_tokens=40)
    assert answer["text"] == theirs.chat(messages)
    assert answer["usage"]["input_tokens"] == len(theirs.chat_ids(messages))
    assert answer["about"]["finish_reason"] == "stop" and answer["about"]["model_name"] == plain.model
    streamed = chatting("stream", question=QUESTIONS[0], max_tokens=40, stream_usage=True)
    assert streamed["text"] == answer["text"] and streamed["num_pieces"] > 3
    assert streamed["usage"]["total_tokens"] == answer["usage"]["total_tokens"]


def test_a_batch_keeps_its_order(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    wanted = [theirs.chat([{"role": "user", "content": question}], 24) for question in QUESTIONS]
    assert chatting("batch", questions=QUESTIONS, max_tokens=24) == wanted


def test_messages_of_its_own_classes(chatting: Program, plain: Server) -> None:
    turns = [("system", "Be brief."), ("user", QUESTIONS[0]), ("assistant", "Paris."), ("user", QUESTIONS[1])]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert chatting("history", turns=turns, max_tokens=24) == reference.of(plain.folder).chat(messages, 24)


def test_its_model_for_completions(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    ids = theirs.chat_ids([{"role": "user", "content": QUESTIONS[2]}])
    wanted = theirs.text(theirs.greedy(ids, 24))
    assert chatting("complete", prompt=theirs.tokenizer.decode(ids), max_tokens=24) == wanted


def test_tools_are_refused_by_name(steering: Program) -> None:
    with pytest.raises(Raised, match="tools") as refusal:
        steering("call_tools", question="What is the weather in Paris?")
    assert refusal.value.name == "OpenAIInvalidRequestError"


def test_a_prompt_beyond_the_context_is_an_overflow_to_it(steering: Program) -> None:
    with pytest.raises(Raised) as refusal:
        steering("invoke", question="Tell me. " * 400)
    assert refusal.value.name == "OpenAIContextOverflowError", str(refusal.value)
