"""The OpenAPI document against its specification, the routes, and what the server really answers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import jsonschema
import live
import openapi_spec_validator
import pytest
from starlette.routing import Route

from steerlm_nemo.engine.protocol import EngineCounters
from steerlm_nemo.model_kind import KINDS
from steerlm_nemo.serving import page

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
    ("/v1/annotate", "post", "value model", {"conversations": [{}]}, 400),
    ("/v1/attribute_lines", "post", "value model", {"prompts": [GRADE, GRADE], "given": [{"quality": 3}, None]}, 200),
    ("/v1/attribute_lines", "post", "value model", {"prompts": [GRADE], "beliefs": False}, 200),
    ("/v1/attribute_lines", "post", "value model", {"prompts": 1}, 400),
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

    small = live.http(max_body_mb=2)
    with (
        live.run_engine(live.engine("VALUE_TO_TEXT"), http=small) as chat,
        live.run_engine(live.engine("TEXT_TO_VALUE")) as value,
        live.run_engine(HFEngine.load(genuine_checkpoint)) as base,
    ):
        ports = {"value model": value, "base model": base}
        yield lambda model: f"http://127.0.0.1:{ports.get(model, chat)}"


@pytest.fixture(scope="module")
def documents(urls):
    return {
        model: httpx.get(urls(model) + "/openapi.json", trust_env=False).json()
        for model in (None, "value model", "base model")
    }


@pytest.fixture(scope="module")
def document(documents):
    """Of a SteerLM model."""
    return documents[None]


def validate(document, schema, content):
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(content)


def test_the_documents_are_valid_openapi(documents):
    for document in documents.values():
        openapi_spec_validator.validate(document)


ALWAYS = {"/v1/models", "/v1/models/{model}", "/v1/attributes", "/v1/template", "/health", "/ready", "/metrics"}
TEXT_ROUTES, CHAT_ROUTES = {"/generate", "/v1/completions"}, {"/v1/chat/completions"}
GRADING_ROUTES = {"/v1/annotate", "/v1/attribute_lines"}
ROUTES_OF = {
    "grader": TEXT_ROUTES | GRADING_ROUTES,
    "steerlm": TEXT_ROUTES | CHAT_ROUTES,
    "plain": TEXT_ROUTES | CHAT_ROUTES,
    "regression": set(),
    "reward": set(),
    "preference": TEXT_ROUTES | CHAT_ROUTES,
    None: TEXT_ROUTES,
}


def app_of(kind):
    """The application of a model of this kind, which is never asked to do anything."""

    class Idle:
        counters, info = EngineCounters(), live.engine("VALUE_TO_TEXT").info

    engine = Idle()
    engine.info = replace(Idle.info, format=kind and replace(Idle.info.format, kind=KINDS[kind]))
    return live.app(engine)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_model_has_the_routes_that_its_kind_can_answer_and_the_document_those(kind):
    app = app_of(kind)
    document = app.state.server.document
    openapi_spec_validator.validate(document)
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route not in page.ROUTES  # the page is for people
        for method in route.methods - {"HEAD"}
    }
    assert routes == {(path, method) for path, entry in document["paths"].items() for method in entry}
    assert {path for path, _ in routes} == ALWAYS | {"/openapi.json"} | ROUTES_OF[kind]
    assert document["info"]["x-model-kind"] == kind
    if kind == "steerlm":
        assert {(path, method) for path, method, *_ in EXAMPLES if path not in GRADING_ROUTES} == routes


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_route_that_a_model_cannot_answer_is_404_and_says_who_has_it(kind):
    every = TEXT_ROUTES | CHAT_ROUTES | GRADING_ROUTES
    title = KINDS[kind].title if kind else "a checkpoint without a kind, which continues text"
    absent = sorted(every - ROUTES_OF[kind])
    with live.run_app(app_of(kind)) as port:
        for path in absent:
            answer = httpx.post(f"http://127.0.0.1:{port}{path}", json={}, trust_env=False)
            assert answer.status_code == 404
            body = answer.json()
            if path in TEXT_ROUTES | CHAT_ROUTES and path != "/generate":  # where OpenAI's clients call
                assert body["error"]["type"] == "invalid_request_error" and body["error"]["code"] == "not_of_this_kind"
                body = body["error"]
            able = [other for other, routes in ROUTES_OF.items() if other and path in routes]
            assert body["message"].startswith(f"{path} needs ") and body["message"].endswith(f" is {title}")
            assert all(f"{KINDS[other].title} ({other})" in body["message"] for other in able)
        card = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"][0]
        assert card["kind"] == kind and card["abilities"] == sorted(KINDS[kind].abilities if kind else {"generate"})
        told = httpx.get(f"http://127.0.0.1:{port}/v1/attributes", trust_env=False)
        assert told.json()["kind"] == kind if kind else told.status_code == 404


@pytest.mark.parametrize(("path", "method", "where", "body", "status"), EXAMPLES)
def test_answers_are_as_documented(urls, documents, path, method, where, body, status):
    model = where if where in ("value model", "base model") else None
    document = documents[model]
    operation = document["paths"][path][method]
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
        assert done == "[DONE]" and len(events) >= 2  # a text and an end; a busy machine may put all text into one
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
    """One model is both: the two sides cannot drift apart without this showing it."""
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


def test_the_documentation_names_every_path_and_every_key(documents):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    quoted = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    words = set(" ".join(quoted).split())
    for document in documents.values():
        assert {path.replace("{model}", "NAME") for path in document["paths"]} <= words
    for model, name in ((None, "ChatRequest"), (None, "CompletionRequest"), ("value model", "AnnotateRequest")):
        assert set(documents[model]["components"]["schemas"][name]["properties"]) <= words


def test_the_documentation_has_the_defaults_of_the_config():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    told = dict(re.findall(r"^\| `http\.(\w+)` \| (\d+|\[\]) \|", text, re.MULTILINE))
    config = live.server_config()
    assert {key: json.loads(value) for key, value in told.items()} == {
        key: config.http[key] for key in config.http if key != "token_file"
    }
    for key in ("stall_s", "give_up_s"):
        assert f"`engine.{key}` ({config.engine[key]} s)" in text
