"""The OpenAPI document against its specification, the routes, and what the server really answers."""

import json
import re
from pathlib import Path

import httpx
import jsonschema
import live
import openapi_spec_validator
import pytest
from starlette.routing import Route

from steerlm_nemo.serving.app import build_app
from steerlm_nemo.serving.front_door import HttpSettings
from steerlm_nemo.serving.requests.generate import _RULES

PROMPT = "\x00System\nThree words.\n\n\n\x11User\nSpeak!\n\x11Assistant\n\x12quality:1,humor:2,lang:de\n"
GRADE = "\x00System\nThree words.\n\n\n\x11User\nSpeak!\n\x11Assistant\nbad dry hello\n\x12"
CHAT = {"messages": [{"role": "user", "content": "Speak!"}], "temperature": 0}
ANNOTATE = {"conversations": [{"messages": [*CHAT["messages"], {"role": "assistant", "content": "bad dry hello"}]}]}

# (path of the document, method, path asked for, body, status); the value model answers what is marked so.
EXAMPLES = [
    ("/generate", "put", None, {"sentences": [PROMPT], "compute_logprob": True, "greedy": True}, 200),
    ("/generate", "put", None, {"sentences": ["a"], "all_probs": True, "tokens_to_generate": 2}, 200),
    ("/generate", "post", None, {"sentences": [PROMPT]}, 200),
    ("/generate", "put", None, {"sentences": []}, 400),
    ("/generate", "post", None, {"sentences": [PROMPT], "top_p": 2}, 400),
    ("/generate", "put", None, b"x", 415),
    ("/generate", "put", None, b" " * 3 * 2**20, 413),
    ("/v1/chat/completions", "post", None, CHAT, 200),
    ("/v1/chat/completions", "post", None, {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}, 200),
    ("/v1/chat/completions", "post", None, {**CHAT, "stream": True, "logprobs": True}, 200),
    ("/v1/chat/completions", "post", None, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, 200),
    ("/v1/chat/completions", "post", None, {}, 400),
    ("/v1/chat/completions", "post", None, {**CHAT, "model": "x"}, 404),
    ("/v1/completions", "post", None, {"prompt": PROMPT}, 200),
    ("/v1/completions", "post", None, {"prompt": [5, 6], "logprobs": 3, "n": 2}, 200),
    ("/v1/completions", "post", None, {"prompt": PROMPT, "stream": True, "logprobs": 1}, 200),
    ("/v1/completions", "post", None, b"[", 415),
    ("/v1/models", "get", None, None, 200),
    ("/v1/models/{model}", "get", "/v1/models/VALUE_TO_TEXT", None, 200),
    ("/v1/models/{model}", "get", "/v1/models/x", None, 404),
    ("/v1/annotate", "post", "value model", ANNOTATE, 200),
    ("/v1/annotate", "post", None, ANNOTATE, 400),
    ("/v1/attribute_lines", "post", "value model", {"prompts": [GRADE, GRADE], "given": [{"quality": 3}, None]}, 200),
    ("/v1/attribute_lines", "post", None, {"prompts": 1}, 400),
    ("/v1/attributes", "get", None, None, 200),
    ("/v1/attributes", "get", "base model", None, 404),
    ("/v1/template", "get", None, None, 200),
    ("/health", "get", None, None, 200),
    ("/ready", "get", None, None, 200),
    ("/metrics", "get", None, None, 200),
    ("/openapi.json", "get", None, None, 200),
]


@pytest.fixture(scope="module")
def urls(genuine_checkpoint):
    from hf_engine import HFEngine

    small = HttpSettings(max_body_mb=2)
    with (
        live.run_engine(live.engine("VALUE_TO_TEXT"), http=small) as chat,
        live.run_engine(live.engine("TEXT_TO_VALUE")) as value,
        live.run_engine(HFEngine.load(genuine_checkpoint)) as base,
    ):
        ports = {"value model": value, "base model": base}
        yield lambda model: f"http://127.0.0.1:{ports.get(model, chat)}"


@pytest.fixture(scope="module")
def document(urls):
    return httpx.get(urls(None) + "/openapi.json", trust_env=False).json()


def validate(document, schema, content):
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(content)


def test_the_document_is_valid_openapi(document):
    openapi_spec_validator.validate(document)


def test_every_route_has_an_entry_and_every_entry_a_route(document):
    app = build_app(live.engine("VALUE_TO_TEXT"))
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path != "/"  # the page is for people
        for method in route.methods - {"HEAD"}
    }
    assert routes == {(path, method) for path, entry in document["paths"].items() for method in entry}
    assert {(path, method) for path, method, *_ in EXAMPLES} == routes


def test_the_keys_of_generate_are_those_that_are_checked(document):
    assert list(_RULES) == list(build_keys(document, "GenerateRequest"))


def build_keys(document, name):
    return sorted(document["components"]["schemas"][name]["properties"], key=list(_RULES).index)


@pytest.mark.parametrize(("path", "method", "where", "body", "status"), EXAMPLES)
def test_answers_are_as_documented(urls, document, path, method, where, body, status):
    operation = document["paths"][path][method]
    model = where if where in ("value model", "base model") else None
    address = urls(model) + (path if model or where is None else where)
    if body is None or isinstance(body, bytes):
        content = {} if body is None else {"content": body}
        if status == 413:
            content["headers"] = {"content-type": "application/json"}
    else:
        content = {"json": body}
        if status == 200:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            validate(document, schema, body)
    answer = httpx.request(method.upper(), address, trust_env=False, timeout=60, **content)
    assert answer.status_code == status, answer.text
    documented = operation["responses"][str(status)]["content"]
    media_type = answer.headers["content-type"].partition("; charset")[0]
    if media_type == "text/event-stream":
        *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert done == "[DONE]" and len(events) > 2
        for event in events:
            validate(document, documented[media_type]["x-event-schema"], json.loads(event))
    elif media_type == "application/json":
        validate(document, documented[media_type]["schema"], answer.json())
    else:
        assert media_type in documented and answer.text


def test_the_schemas_refuse_what_the_server_does_not_answer(document):
    """The control of the test above: a changed answer does not pass."""
    for name, answer in (("Ready", {}), ("Error", {"error": 1}), ("Models", {"object": "list", "data": [{}]})):
        with pytest.raises(jsonschema.ValidationError):
            validate(document, {"$ref": f"#/components/schemas/{name}"}, answer)


def test_what_the_request_schema_refuses_the_server_refuses_too(urls, document):
    """One table is both: the two sides cannot drift apart without this showing it."""
    bodies = [
        {**CHAT, "temperature": 2.5},
        {**CHAT, "stop": [""]},
        {**CHAT, "n": True},
        {**CHAT, "messages": [{"role": "user"}]},
        {**CHAT, "messages": [{"role": "judge", "content": "x"}]},
        {**CHAT, "top_logprobs": 21, "logprobs": True},
        {**CHAT, "attributes": {"quality": 1.5}},
        {**CHAT, "tools": [{}]},
    ]
    for body in bodies:
        with pytest.raises(jsonschema.ValidationError):
            validate(document, {"$ref": "#/components/schemas/ChatRequest"}, body)
        answer = httpx.post(urls(None) + "/v1/chat/completions", json=body, trust_env=False)
        assert answer.status_code == 400, body


def test_the_documentation_names_every_path_and_every_key_and_its_curl_lines_work(urls, document):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    quoted = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    words = set(" ".join(quoted).split())
    assert {path.replace("{model}", "NAME") for path in document["paths"]} <= words
    for name in ("ChatRequest", "CompletionRequest", "AnnotateRequest"):
        assert set(document["components"]["schemas"][name]["properties"]) <= words
    lines = re.findall(r"^curl \S+ http://localhost:(\d+)(\S+) .* -d '(.*)'$", text, re.MULTILINE)
    assert len(lines) == 3
    for port, path, body in lines:
        model = {"1427": None, "1424": "value model"}[port]
        answer = httpx.post(urls(model) + path, json=json.loads(body), trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
