"""The `openai` package, three major versions of it."""

from __future__ import annotations

from collections.abc import Callable

import made_models
import pytest
import reference
import tiny_world
from programs_of_clients import Program, Raised, Server

VERSIONS = ["openai-1", "openai-2", "openai-3"]
ASK = [{"role": "system", "content": tiny_world.SYSTEM}, {"role": "user", "content": "Speak!"}]
LINES = [
    {"quality": 0, "humor": 2, "lang": "de"},
    {"quality": 3, "humor": 1, "lang": "en"},
]


@pytest.fixture(params=VERSIONS)
def client(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def steering(client: str, start: Callable[..., Program], steered: Server) -> Program:
    return start(client, "openai_program.py", steered)


@pytest.fixture
def chatting(client: str, start: Callable[..., Program], plain: Server) -> Program:
    return start(client, "openai_program.py", plain)


def at(line: dict[str, object], **settings: object) -> dict[str, object]:
    return {"messages": ASK, "temperature": 0, "extra_body": {"attributes": line}, **settings}


def test_it_is_the_version_that_it_is_called(client: str, steering: Program, steered: Server) -> None:
    assert steering("version").startswith(f"{client[-1]}.")
    assert steering("models") == [[steered.model], steered.model]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_attributes_steer_a_chat(steering: Program, line: dict[str, object]) -> None:
    answer = steering("chat", **at(line))
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == tiny_world.response(line)
    assert choice["finish_reason"] == "stop" and answer["attributes"] == line
    streamed = steering("streamed_chat", **at(line, stream_options={"include_usage": True}))
    assert streamed["texts"] == {"0": tiny_world.response(line)} and streamed["ends"] == {"0": "stop"}
    assert streamed["usage"]["total_tokens"] == answer["usage"]["total_tokens"]
    helped = steering("chat_by_the_helper_for_streams", **at(line))
    assert helped["pieces"] == helped["whole"] == tiny_world.response(line)


def test_several_choices_stream_each_with_its_end(steering: Program) -> None:
    settings = at(LINES[0], n=3, temperature=1.2, seed=5, max_completion_tokens=20)
    whole = steering("chat", **settings)["choices"]
    streamed = steering("streamed_chat", **settings)
    assert streamed["texts"] == {str(choice["index"]): choice["message"]["content"] for choice in whole}
    assert streamed["ends"] == {str(choice["index"]): choice["finish_reason"] for choice in whole}


@pytest.mark.parametrize(
    "neutral",
    [
        {"response_format": {"type": "text"}},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}},
        {"tool_choice": "none", "parallel_tool_calls": True, "user": "me", "store": False},
        {"metadata": {"a": "b"}, "modalities": ["text"], "service_tier": "auto"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_else_changes_nothing(steering: Program, neutral: dict[str, object]) -> None:
    answer = steering("chat", **at(LINES[1], **neutral))
    assert answer["choices"][0]["message"]["content"] == tiny_world.response(LINES[1])


def test_what_cannot_be_had_is_refused_by_name_in_its_own_exception(steering: Program) -> None:
    with pytest.raises(Raised, match="response_format.*json_schema") as refusal:
        steering("ask_for_an_object", **at(LINES[0]))
    assert refusal.value.name == "BadRequestError"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(Raised, match="tools") as refusal:
        steering("chat", **at(LINES[0], tools=tools))
    assert refusal.value.name == "BadRequestError"
    with pytest.raises(Raised, match="'gpt-4o' is not served here; this server has") as refusal:
        steering("ask_another_model", messages=ASK)
    assert refusal.value.name == "NotFoundError"
    with pytest.raises(Raised, match="humour.*humor"):
        steering("chat", **at({"humour": 1}))


def test_log_probabilities_of_a_chat_come_with_the_likeliest_tokens(steering: Program) -> None:
    answer = steering("chat", **at(LINES[0], logprobs=True, top_logprobs=2))["choices"][0]
    tokens = answer["logprobs"]["content"]
    spelled = b"".join(bytes(token["bytes"]) for token in tokens)
    assert spelled.decode().startswith(answer["message"]["content"])
    for token in tokens:
        best = token["top_logprobs"]
        assert len(best) == 2 and best[0]["logprob"] == token["logprob"] > best[1]["logprob"]  # greedy


# ---- a model without attributes ------------------------------------------------------------------------------------


def test_a_model_without_attributes_answers_as_transformers_does(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    for question in list(made_models.DIALOGUES)[:3]:
        messages = [{"role": "user", "content": question}]
        answer = chatting("chat", messages=messages, temperature=0, max_tokens=40)
        assert answer["choices"][0]["message"]["content"] == theirs.chat(messages)
        assert answer["usage"]["prompt_tokens"] == len(theirs.chat_ids(messages))
        streamed = chatting("streamed_chat", messages=messages, temperature=0, max_tokens=40)
        assert streamed["texts"] == {"0": theirs.chat(messages)}


def test_a_conversation_goes_on_with_the_answers_that_it_got(chatting: Program, plain: Server) -> None:
    questions = list(made_models.DIALOGUES)[:2]
    theirs, messages = reference.of(plain.folder), []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": theirs.chat(messages)})
    answers = chatting("history", questions=questions, temperature=0, max_tokens=40)
    assert answers == [message["content"] for message in messages[1::2]]


def test_chats_at_once_get_what_each_gets_alone(chatting: Program, plain: Server) -> None:
    questions = list(made_models.DIALOGUES)
    theirs = reference.of(plain.folder)
    wanted = [theirs.chat([{"role": "user", "content": question}], 24) for question in questions]
    assert chatting("chats_at_once", questions=questions, temperature=0, max_tokens=24) == wanted


# ---- completions ---------------------------------------------------------------------------------------------------


def test_completions_of_texts_and_of_token_ids(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    ids = theirs.chat_ids([{"role": "user", "content": "What is two plus two?"}])
    wanted = theirs.text(theirs.greedy(ids, 24))
    prompt = theirs.tokenizer.decode(ids)
    for given in (prompt, ids):
        answer = chatting("complete", prompt=given, temperature=0, max_tokens=24)
        assert answer["choices"][0]["text"] == wanted
        assert answer["usage"]["prompt_tokens"] == len(ids)
    assert chatting("streamed_completion", prompt=prompt, temperature=0, max_tokens=24)["text"] == wanted
    cut = chatting("complete", prompt=ids, temperature=0, max_tokens=24, stop=[wanted[8:11]])
    assert cut["choices"][0]["text"] == wanted[: wanted.index(wanted[8:11])]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_a_prompt_is_scored_as_transformers_scores_it(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    ids = theirs.ids("The capital of France is Madrid.")
    for settings in ({"max_tokens": 1}, {"max_tokens": 0}):
        choice = chatting("complete", prompt=[ids], temperature=0, echo=True, logprobs=2, **settings)["choices"][0]
        scores = choice["logprobs"]
        assert scores["token_logprobs"][0] is None
        assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(theirs.logprobs(ids), abs=1e-3)
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(ids) + settings["max_tokens"]
        assert "".join(scores["tokens"][: len(ids)]) == "The capital of France is Madrid."


def test_exactly_so_many_tokens_can_be_asked_for(chatting: Program) -> None:
    ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    for forced in ({"ignore_eos": True}, {"min_tokens": 33}):
        answer = chatting("chat", **ask, max_tokens=33, extra_body=forced)
        assert answer["usage"]["completion_tokens"] == 33 and answer["choices"][0]["finish_reason"] == "length"
    assert chatting("chat", **ask, max_tokens=33)["usage"]["completion_tokens"] < 33  # the control
