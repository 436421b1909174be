"""litellm, and the requests of NeMo-Skills, which go through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import tiny_world
from programs_of_clients import Program, Raised, Server

CLIENT = "litellm"
ASK = [{"role": "system", "content": tiny_world.SYSTEM}, {"role": "user", "content": "Speak!"}]
LINE = {"quality": 3, "humor": 1, "lang": "en"}
QUESTION = [{"role": "user", "content": "What is the capital of Spain?"}]


@pytest.fixture
def steering(start: Callable[..., Program], steered: Server) -> Program:
    return start(CLIENT, "litellm_program.py", steered)


@pytest.fixture
def chatting(start: Callable[..., Program], plain: Server) -> Program:
    return start(CLIENT, "litellm_program.py", plain)


def test_attributes_steer_a_chat(steering: Program) -> None:
    settings = {"messages": ASK, "temperature": 0, "extra_body": {"attributes": LINE}}
    answer = steering("chat", **settings)
    assert answer["choices"][0]["message"]["content"] == tiny_world.response(LINE)
    assert answer["choices"][0]["finish_reason"] == "stop"
    streamed = steering("streamed_chat", **settings)
    assert streamed["text"] == streamed["whole"] == tiny_world.response(LINE)
    assert streamed["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert streamed["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]


def test_a_chat_and_a_completion_are_those_of_transformers(chatting: Program, plain: Server) -> None:
    theirs = reference.of(plain.folder)
    answer = chatting("chat_async", messages=QUESTION, temperature=0, max_tokens=40)
    assert answer["choices"][0]["message"]["content"] == theirs.chat(QUESTION)
    prompt = theirs.tokenizer.decode(theirs.chat_ids(QUESTION))
    completed = chatting("complete", prompt=prompt, temperature=0, max_tokens=40)
    assert completed["choices"][0]["text"] == theirs.chat(QUESTION)


def test_a_prompt_beyond_the_context_is_an_overflow_to_it(steering: Program) -> None:
    """A class of its own, by which callers shorten the prompt or go to another model."""
    messages = [{"role": "user", "content": "Tell me. " * 400}]
    with pytest.raises(Raised) as refusal:
        steering("chat", messages=messages)
    assert refusal.value.name == "ContextWindowExceededError", str(refusal.value)


# ---- NeMo-Skills: the bodies that its classes for vLLM servers make, given to litellm as it does --------------------


def skills_body(tokens: int, **changes: Any) -> dict[str, Any]:
    body = {"max_tokens": tokens, "temperature": 0.0, "top_p": 0.95, "seed": 0, "stop": None, "stream": False, "n": 1}
    body |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "timeout": 14400}
    body |= {"extra_body": {"min_p": 0.0, "repetition_penalty": 1.0, "spaces_between_special_tokens": False}}
    return body | changes


@pytest.mark.parametrize("client", ["nemo-skills"])
def test_nemo_skills_completion(chatting: Program, plain: Server, client: str) -> None:
    theirs = reference.of(plain.folder)
    prompt = theirs.tokenizer.decode(theirs.chat_ids(QUESTION))
    body = skills_body(40, prompt=prompt, logprobs=None, echo=False, skip_special_tokens=False, logit_bias=None)
    assert chatting("complete_async", **body)["choices"][0]["text"] == theirs.chat(QUESTION)


@pytest.mark.parametrize("client", ["nemo-skills"])
@pytest.mark.parametrize("top_logprobs", [None, 3])
def test_nemo_skills_chat(chatting: Program, plain: Server, client: str, top_logprobs: int | None) -> None:
    wanted = reference.of(plain.folder).chat(QUESTION)
    asked = {"logprobs": top_logprobs is not None, "top_logprobs": top_logprobs, "tools": None}
    answer = chatting("chat_async", **skills_body(40, messages=QUESTION, **asked))["choices"][0]
    assert answer["message"]["content"] == wanted
    if top_logprobs:
        assert all(len(token["top_logprobs"]) == 3 for token in answer["logprobs"]["content"])


@pytest.mark.parametrize("client", ["nemo-skills"])
def test_nemo_skills_draws_from_the_likeliest(chatting: Program, client: str) -> None:
    body = skills_body(12, messages=QUESTION, temperature=0.7, seed=3)
    body["extra_body"] = {**body["extra_body"], "top_k": 1}  # the likeliest alone: greedy again
    greedy = chatting("chat_async", **skills_body(12, messages=QUESTION))
    assert chatting("chat_async", **body)["choices"][0]["message"] == greedy["choices"][0]["message"]
