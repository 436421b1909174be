"""NeMo's own clients of PUT /generate: its page's functions, and the bodies that NeMo-Skills sends to NeMo's server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import reference
from programs_of_clients import Program, Server

CLIENT = "nemo"
QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def nemo(start: Callable[..., Program], plain: Server) -> Program:
    return start(CLIENT, "nemo_program.py", plain)


@pytest.fixture
def prompt(plain: Server) -> str:
    theirs = reference.of(plain.folder)
    return theirs.tokenizer.decode(theirs.chat_ids(QUESTION))  # type: ignore[no-any-return]


def test_its_function_for_a_text(nemo: Program, plain: Server, prompt: str) -> None:
    theirs = reference.of(plain.folder)
    wanted = theirs.greedy(theirs.ids(prompt), 24)
    answer = nemo("generate", sentences=[prompt, "The capital"], tokens_to_generate=24, greedy=True)
    assert answer["token_ids"][0] == theirs.ids(prompt) + wanted
    assert answer["sentences"][0].endswith(theirs.text(wanted)) and len(answer["sentences"]) == 2


def test_its_page(nemo: Program, plain: Server) -> None:
    """It cuts the prompt off by its length, so one without special tokens."""
    theirs = reference.of(plain.folder)
    settings = {"greedy": True, "add_BOS": False, "token_to_gen": 12, "min_tokens": 1, "temp": 0.75, "top_p": 0.95}
    settings |= {"top_k": 50, "repetition": 1.0, "end_strings": "<extra_id_1>,"}
    text = nemo("page", prompt="The capital of France is", **settings)
    assert text == theirs.text(theirs.greedy(theirs.ids("The capital of France is"), 12))


# ---- NeMo-Skills, for servers of NeMo ------------------------------------------------------------------------------

GREEDY = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}  # what it makes of a temperature of 0
BODIES = [
    {**GREEDY, "random_seed": 0, "repetition_penalty": 1.0, "end_strings": ["<|endoftext|>"]},
    {**GREEDY, "random_seed": 0, "repetition_penalty": 1.0, "end_strings": ["<|endoftext|>", "\n\n"], "stream": False},
]


@pytest.mark.parametrize("client", ["nemo-skills"])
@pytest.mark.parametrize("body", BODIES, ids=["one", "many"])
def test_nemo_skills_bodies(plain: Server, client: str, body: dict[str, Any]) -> None:
    theirs = reference.of(plain.folder)
    prompts = ["The capital of France is", "What is the capital of Spain?"]
    request = {"sentences": prompts, "tokens_to_generate": 24, **body}
    answer = httpx.put(f"{plain.url}/generate", json=request, trust_env=False, timeout=120)
    assert answer.status_code == 200, answer.text
    for prompt, sentence in zip(prompts, answer.json()["sentences"], strict=True):
        assert sentence.startswith(prompt)  # it cuts off as many characters
        text = theirs.text(theirs.greedy(theirs.ids(prompt), 24))
        assert sentence[len(prompt) :].split("\n\n")[0] == text.split("\n\n")[0]
