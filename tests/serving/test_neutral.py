"""A value that asks for what happens anyway is taken; of any other the sender is told which, and what is accepted."""

import json
from pathlib import Path

import httpx
import live
import pytest

from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.generate import GenerateRequest
from steerlm_nemo.serving.requests.grading import AnnotateRequest, AttributeLinesRequest
from steerlm_nemo.serving.requests.neutral import GENERATION, shown
from steerlm_nemo.serving.requests.openai import ChatRequest, CompletionRequest, Message

CASES = Path(__file__).resolve().parents[2] / ".." / "shared" / "cases" / "serving"
HELLO = [{"role": "user", "content": "hi"}]
ROUTES = [
    (ChatRequest, {"messages": HELLO}, ChatRequest.neutral),
    (CompletionRequest, {"prompt": "hi"}, CompletionRequest.neutral),
    (GenerateRequest, {"sentences": ["hi"]}, GENERATION),
]
EVERY_ROUTE = pytest.mark.parametrize(
    ("model", "body", "neutral"), ROUTES, ids=lambda each: getattr(each, "__name__", "")
)
ODD = [True, False, -7.5, 10**30, "odd", "", ["a", 1], [{"b": {"c": "d" * 200}}], {"type": "odd"}, {"type": 7, "e": []}]


def read(model, body):
    return model.from_json(body, max_prompts=128)


def refusal(model, body):
    try:
        read(model, body)
    except BadRequest as err:
        return str(err)
    return None


def parts(value):
    """A value and what is in it: the message may name the item at fault."""
    yield value
    if isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            yield from parts(item)


@EVERY_ROUTE
def test_neutral_values_change_nothing_and_others_are_refused_by_value_with_what_is_accepted(model, body, neutral):
    plain = read(model, body)
    for key, row in neutral.items():
        if key in model.model_fields:
            continue
        for value in [None, *(ODD if row.values is None else row.values)]:
            assert read(model, {**body, key: value}) == plain, (key, value)
        for value in ODD:
            if not row.takes(value):
                told = refusal(model, {**body, key: value})
                assert told.startswith(f"{key} "), (key, value)
                assert any(shown(part) in told for part in parts(value)), told
                assert row.why in told and " accepted: " in told and len(told) < 400


@EVERY_ROUTE
def test_all_neutral_values_at_once_are_taken(model, body, neutral):
    everything = {key: (row.values or (None,))[0] for key, row in neutral.items() if key not in model.model_fields}
    assert read(model, {**everything, **body}) == read(model, body)
    nested = {"extra_body": {"top_a": 0, "tools": None}, "parameters": {"watermark": False, "typical_p": 1.0}}
    assert read(model, {**body, **nested}) == read(model, body)
    told = refusal(model, {**body, "parameters": {"max_new_tokens": 5}})
    assert 'parameters {"max_new_tokens": 5} is not supported: what it holds are keys of the body itself' in told


@pytest.mark.parametrize(
    ("model", "body"),
    [(model, body) for model, body, _ in ROUTES]
    + [
        (AnnotateRequest, {"conversations": [{"messages": HELLO}]}),
        (AttributeLinesRequest, {"prompts": ["hi"]}),
        (Message, HELLO[0]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_whatever_a_key_is_refused_for_the_message_names_the_value_and_what_is_accepted(model, body):
    num_refused = 0
    for key in model.model_fields:
        for value in ODD:
            told = refusal(model, {**body, key: value})
            if told is None or key == "task_ids":  # NeMo's own words
                continue
            num_refused += 1
            assert any(shown(part) in told for part in parts(value)), (key, value, told)
            assert any(word in told for word in ("must be", "accepted:", "expect", "needs", "is missing", "known are"))
            assert len(told) < 600, told
    assert num_refused > 10


def test_a_misspelt_key_is_unknown_and_the_nearest_is_named():
    assert "did you mean 'ignore_eos'?" in refusal(ChatRequest, {"messages": HELLO, "ignore_eso": True})
    assert "did you mean 'skip_special_tokens'?" in refusal(
        CompletionRequest, {"prompt": "a", "skip_specal_tokens": True}
    )
    assert "did you mean 'min_tokens'?" in refusal(GenerateRequest, {"sentences": ["a"], "min_token": 3})
    assert "known are messages, " in refusal(ChatRequest, {"messages": HELLO, "zzz": 1})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format type 'json_object' is not supported: "),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format type 'json_schema' is not "),
        (
            {"tools": [{"type": "function"}], "tool_choice": "auto"},
            'tools [{"type": "function"}] is not supported: the m',
        ),
        (
            {"tool_choice": "required"},
            "tool_choice 'required' is not supported: the model calls no tools; accepted: 'none'",
        ),
        ({"functions": [{"name": "f"}]}, 'functions [{"name": "f"}] is not supported: the model calls no tools'),
        ({"reasoning_effort": "high"}, "reasoning_effort 'high' is not supported: "),
        (
            {"guided_json": {"type": "object"}},
            "guided_json type 'object' is not supported: the text of the model is not",
        ),
        ({"logit_bias": {"5": 200}}, "logit_bias.5 must be a number from -100 to 100, found 200"),
        ({"stop": [7]}, "stop[0] must be a string of valid Unicode, 1 to 500 characters long, found 7"),
        ({"messages": ["hi"]}, "messages[0] must be an object, found 'hi'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type 'image_url' is not supported: text is all that is read and written; accepted",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, *HELLO]},
            'messages[1].tool_calls [{"id": "1"}] is not supported: the model calls no tools; accepted: []',
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content must be a string of valid Unicode or a li",
        ),
        ({"attributes": {"quality": [1]}}, "attributes.quality must be a whole number from "),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens is 5, but max_tokens 3; it must not be larger"),
    ],
)
def test_a_refusal_is_a_sentence_to_act_on(body, told):
    assert refusal(ChatRequest, {"messages": HELLO, **body}).startswith(told)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # What load tools send: guidellm 0.8, `vllm bench serve`, sglang's bench_serving.
        ("/v1/completions", {"prompt": "a", "max_tokens": 9, "stop": None, "ignore_eos": True, "stream": True,
                             "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
        ("/v1/completions", {"prompt": "a", "temperature": 0.0, "best_of": 1, "max_tokens": 9, "stream": True,
                             "ignore_eos": True, "repetition_penalty": 1.0, "logprobs": None}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
                                  "temperature": 0.0, "max_completion_tokens": 9, "stream": True, "ignore_eos": True,
                                  "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "min_tokens": 9, "temperature": 0}),
        # NeMo-Skills, and lm-evaluation-harness's chat.
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "temperature": 0.0, "top_p": 0.95, "seed": 0,
                                  "stop": None, "logprobs": False, "top_logprobs": None, "n": 1, "stream": False,
                                  "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_p": 0.0, "tools": None,
                                  "repetition_penalty": 1.0, "spaces_between_special_tokens": False,
                                  "ignore_eos": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "type": "text"}], "max_tokens": 9,
                                  "temperature": 0, "stop": ["Q:", "\x01"], "seed": 1234, "min_tokens": 9}),
        ("/generate", {"sentences": ["a"], "tokens_to_generate": 9, "greedy": True, "ignore_eos": True, "n": 1}),
        ("/generate", {"sentences": ["a"], "tokens_to_generate": 9, "greedy": True, "min_tokens": 9, "top_p_decay": 0}),
    ],
)  # fmt: skip
def test_bodies_of_clients_are_answered_with_exactly_as_many_tokens_as_they_ask_for(port, path, body):
    answer = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    if path == "/generate":
        assert len(answer.json()["token_ids"][0]) == 9 + len(live.engine("VALUE_TO_TEXT").info.tokenizer.encode("a"))
    elif not body.get("stream"):
        assert answer.json()["usage"]["completion_tokens"] == 9
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    elif "stream_options" in body:
        *_, last, done = answer.text.strip().split("\n\n")
        assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == 9


@pytest.fixture(scope="module")
def port():
    with live.run_engine(live.engine("VALUE_TO_TEXT")) as port:
        yield port


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("A1-generate-stream-false", "/generate"),
        ("A2-lm-eval-loglikelihood", "/v1/completions"),
        ("A3-response-format-text", "/v1/chat/completions"),
        ("A5-guidellm", "/v1/chat/completions"),
    ],
)
def test_requests_that_were_refused_are_answered(port, case, path):
    if not (file := CASES / case / "body.json").is_file():
        pytest.skip(f"the request is not here (../shared/cases/serving/{case})")
    body = {key: value for key, value in json.loads(file.read_text()).items() if key != "model"}
    answer = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
