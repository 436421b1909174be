"""Every body that our clients, the page and the documentation send fits the served document, and is answered."""

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import fuzz
import httpx
import jsonschema
import live
import pytest
import tiny_world

from steerlm_nemo.annotation.annotate import annotate
from steerlm_nemo.annotation.thread import AnnotationSettings
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.client.server import ServerClient
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.routes.table import TABLE, TABLE_NEMO123
from steerlm_nemo.steering.steer import Sampling, steer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ports(value_engine):
    """By the ability that only one of the two has."""
    with live.run_engine(live.engine("VALUE_TO_TEXT")) as chat, live.run_engine(value_engine) as grade:
        yield {"chat": chat, "grade": grade}


class Checked:
    """Validates bodies against the document of the server on a port."""

    def __init__(self, port):
        self.document = httpx.get(f"http://127.0.0.1:{port}/openapi.json", trust_env=False).json()

    def __call__(self, method, path, body):
        request = self.document["paths"][path][method.lower()]["requestBody"]
        schema = request["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": self.document["components"]}).validate(body)


def send(port, method, path, body):
    Checked(port)(method, path, body)
    answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.fixture
def sent(ports, monkeypatch):
    """What our own client sends, each body checked against the document before it goes; a refusal fails the run."""
    documents = {f"http://127.0.0.1:{port}": Checked(port) for port in ports.values()}
    really_send, bodies = ServerClient._send, []

    def check_and_send(self, method, path, body=None):
        if body is not None:
            documents[self.where](method, path, body)
            bodies.append((path, frozenset(body)))
        answer = really_send(self, method, path, body)
        assert answer.status_code == 200, answer.text
        return answer

    monkeypatch.setattr(ServerClient, "_send", check_and_send)
    return bodies


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, {"prompts", "beliefs"}),
        ({"soft": True}, {"prompts"}),
        ({"only_missing": True, "soft": True}, {"prompts", "given"}),
        ({"mode": "slots"}, {"sentences", "min_tokens_to_generate"}),
    ],
)
def test_what_the_annotator_sends(ports, sent, chat_file, tmp_path, settings, keys):
    source, records = chat_file(6)
    for record in records:  # people gave the first attribute
        for turn in record["conversations"]:
            turn["label"] = turn["label"] and turn["label"].split(",")[0]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with ServerPool([("127.0.0.1", ports["grade"])], 30.0, 2, 4) as servers:
        annotate(source, tmp_path / "out.jsonl", servers, AnnotationSettings(**settings))
    assert any(keys <= body for _, body in sent)


def test_what_the_steering_client_sends(ports, sent):
    messages = [
        {"role": "system", "content": tiny_world.SYSTEM},
        {"role": "user", "content": "Speak!"},
        {"role": "assistant", "content": "good joke hello", "attributes": {"quality": 3}},
        {"role": "user", "content": "And now?"},
    ]
    for sampling in (Sampling(), Sampling(8, greedy=False, temperature=0.5, top_k=4, top_p=0.5, random_seed=7)):
        steer(messages, {"quality": 1}, f"127.0.0.1:{ports['chat']}", sampling=sampling)
    assert [path for path, _ in sent] == ["/generate"] * 2


# ---- the page ------------------------------------------------------------------------------------------------------

GREEDY = {"max_tokens": 9, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
DRAWN = {**GREEDY, "temperature": 1.5, "top_p": 0.9, "seed": 7}
LINE = {"quality": 2, "humor": 0, "lang": "en"}
EARLIER = [
    {"role": "system", "content": "Three words."},
    {"role": "user", "content": "Tell me."},
    {"role": "assistant", "content": "good dry hello", "attributes": {"quality": 3, "humor": 0, "lang": "en"}},
]
SPOKEN = [{"role": "user", "content": "Speak!"}, {"role": "assistant", "content": "bad dry hello"}]
# (how static/requests.js makes it, ability, path, what it makes); the models here have these names.
PAGE = [
    (
        "chatBody('VALUE_TO_TEXT', ' ', [], 'Speak! \\ud800', LINE, samplingOf({greedy: true, maxTokens: 9}))",
        "chat",
        "/v1/chat/completions",
        {
            "model": "VALUE_TO_TEXT",
            "messages": [{"role": "user", "content": "Speak! \ufffd"}],
            "attributes": LINE,
            **GREEDY,
        },
    ),
    (
        "chatBody('VALUE_TO_TEXT', 'Three words.', [{prompt: 'Tell me.', response: 'good dry hello', "
        "attributes: {...LINE, quality: 3}}], 'Speak!', LINE, DRAWN)",
        "chat",
        "/v1/chat/completions",
        {"model": "VALUE_TO_TEXT", "messages": [*EARLIER, SPOKEN[0]], "attributes": LINE, **DRAWN},
    ),
    (
        "completionBody('VALUE_TO_TEXT', 'Once', DRAWN)",
        "chat",
        "/v1/completions",
        {"model": "VALUE_TO_TEXT", "prompt": "Once", **DRAWN},
    ),
    (
        "annotateBody('Three words.', 'Speak!', 'bad dry hello')",
        "grade",
        "/v1/annotate",
        {"conversations": [{"messages": [EARLIER[0], *SPOKEN]}], "soft": True},
    ),
    (
        "annotateBody('', 'Speak!', 'bad dry hello')",
        "grade",
        "/v1/annotate",
        {"conversations": [{"messages": SPOKEN}], "soft": True},
    ),
]


@pytest.mark.parametrize(("call", "ability", "path", "body"), PAGE)
def test_what_the_page_sends(ports, call, ability, path, body):
    send(ports[ability], "POST", path, body)


@pytest.mark.skipif(not shutil.which("node"), reason="no node here (Debian: nodejs), which runs the page's requests.js")
def test_the_page_really_makes_these_bodies_and_no_others():
    static = ROOT / "steerlm_nemo" / "serving" / "static"
    program = (static / "requests.js").read_text()
    drawn = "samplingOf({greedy: false, temperature: 1.5, topP: 0.9, seed: 7, maxTokens: 9})"
    calls = ", ".join(call for call, *_ in PAGE)
    script = f"{program}\nconst LINE = {json.dumps(LINE)}, DRAWN = {drawn};\nconsole.log(JSON.stringify([{calls}]));"
    run = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [body for *_, body in PAGE]
    makers = set(re.findall(r"^export function (\w+Body)\(", program, re.MULTILINE))
    page = "".join(file.read_text() for file in static.glob("*.js") if file.name != "requests.js")
    assert set(re.findall(r"\b(\w+Body)\(", page)) == makers == {call.partition("(")[0] for call, *_ in PAGE}
    read = {"/v1/models", "/v1/attributes"}
    assert set(re.findall(r'"(/v1/[\w/]+)"', page)) - read == {path for _, _, path, _ in PAGE}


# ---- the documentation ---------------------------------------------------------------------------------------------

CURL = re.compile(r"^curl (.*?)http://localhost:(\d+)(/\S+)(?: .*?-d '(.*)')?", re.MULTILINE)
ABILITY_OF_PORT = {"1427": "chat", "1424": "grade"}


def curl_lines():
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for options, port, path, body in CURL.findall(file.read_text()):
            yield file.name, "PUT" if "-X PUT" in options else "POST" if body else "GET", port, path, body


def test_what_the_documentation_sends_with_curl(ports):
    lines = list(curl_lines())
    assert {(name, path) for name, method, _, path, _ in lines if method != "GET"} >= {
        ("README.md", "/generate"),
        ("README.md", "/v1/chat/completions"),
        ("README.md", "/v1/annotate"),
        ("serving.md", "/v1/chat/completions"),
        ("serving.md", "/v1/completions"),
        ("serving.md", "/v1/annotate"),
    }
    for name, method, port, path, body in lines:
        served = ports[ABILITY_OF_PORT[port]]
        # The models of the README know other attributes than the tests' do; the same keys are asked for with ours.
        if method == "GET":
            assert httpx.get(f"http://127.0.0.1:{served}{path}", trust_env=False).status_code == 200, (name, path)
        else:
            send(served, method, path, json.loads(body))


def test_what_the_page_of_openais_client_in_the_documentation_sends(ports):
    program = re.search(r"```python\n(from openai import OpenAI.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
    text = program.group(1).replace("localhost:1427", f"127.0.0.1:{ports['chat']}")
    bodies, scope = [], {}

    def check(request):
        if request.content:
            bodies.append(json.loads(request.content))
            Checked(ports["chat"])(request.method, request.url.path, bodies[-1])

    client = httpx.Client(trust_env=False, event_hooks={"request": [check]})
    exec(text.replace("OpenAI(base_url", "OpenAI(http_client=client, base_url"), {"client": client, **scope}, scope)
    assert scope["answer"].choices[0].message.content and bodies[0]["attributes"] == {"quality": 4, "humor": 0}


# ---- the document and the check ------------------------------------------------------------------------------------

# What JSON Schema cannot say: how keys go together, how much this server takes, and that no text has lone surrogates.
BEYOND_THE_SCHEMA = re.compile(
    r"needs (logprobs|stream)|min_tokens is|accepted: 1 or n|what it holds|entries; this server takes|"
    r"Maximum number of sentences|Unicode"
)


@pytest.mark.parametrize(
    "row", [row for row in (*TABLE, TABLE_NEMO123[0]) if row.body], ids=lambda row: row.body.__name__
)
def test_the_document_takes_what_the_check_takes_and_nothing_else(ports, row):
    """On bodies with something wrong in them, at any depth; a body the two judge differently is a drift."""
    from steerlm_nemo.serving.routes.document import document

    described = document([row], live.engine("VALUE_TO_TEXT").info)
    schema = {"$ref": f"#/components/schemas/{row.body.__name__}", "components": described["components"]}
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    chance, judged = random.Random(7), {True: 0, False: 0}
    good = [body for _, path, body in fuzz.GOOD if path == row.path]
    for _ in range(1500):
        body = chance.choice(good)
        for _ in range(chance.choice((1, 1, 2, 3))):
            body = fuzz._changed(body, chance)
        body = plain(body)
        reason = ""
        try:
            row.body.from_json(body, max_prompts=128)
        except BadRequest as err:
            reason = str(err)
        if BEYOND_THE_SCHEMA.search(reason):
            continue
        assert validator.is_valid(body) == (not reason), (reason, json.dumps(body)[:2000])
        judged[not reason] += 1
    assert min(judged.values()) > 50, judged


def plain(value):
    """Whole numbers as integers: to JSON Schema 2.0 is one, to us only where it is to NeMo. And no NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return 3.5 if not math.isfinite(value) else int(value) if value.is_integer() else value
    return value
