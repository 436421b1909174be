"""What holds for every request: token, limits, numbers, log lines, clients that leave, and an orderly end."""

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import live
import openai
import pytest
from omegaconf import OmegaConf
from prometheus_client.parser import text_string_to_metric_families

from steerlm_nemo.client.server import RequestRefusedError, ServerClient
from steerlm_nemo.config import load_config
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.serving.front_door import TOKEN_VARIABLE, settings_from
from steerlm_nemo.serving.listener import open_listener

GENERATE = {"sentences": ["a"], "greedy": True, "tokens_to_generate": 4, "end_strings": []}
CHAT = {"messages": [{"role": "user", "content": "Speak!"}], "temperature": 0}
LONG = {"prompt": "a", "max_tokens": 200, "temperature": 2, "seed": 1}
PATIENCE_S = 60


@pytest.fixture(scope="module")
def engine():
    return live.engine("VALUE_TO_TEXT")


def send(port, path="/generate", body=GENERATE, **options):
    return httpx.post(f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=PATIENCE_S, **options)


def get(port, path, **options):
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=PATIENCE_S, **options)


def samples(port):
    families = text_string_to_metric_families(get(port, "/metrics").text)
    return [sample for family in families for sample in family.samples]


def numbers(port):
    """By name and labels, but for the model's name."""
    return {
        (sample.name, *sorted(value for label, value in sample.labels.items() if label != "model_name")): sample.value
        for sample in samples(port)
    }


def wait_until(true):
    """Seconds until it was; never a claim about how many."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + PATIENCE_S
        time.sleep(0.01)
    return time.monotonic() - start


class Slow:
    """The engine, a pause before each step."""

    def __init__(self, engine, pause_s=0.02):
        self.info, self.counters, self._engine, self._pause_s = engine.info, engine.counters, engine, pause_s
        self.add, self.cancel = engine.add, engine.cancel

    def step(self):
        time.sleep(self._pause_s)
        return self._engine.step()


# ---- the token ----------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_answered_but_whether_the_server_lives(engine, caplog):
    with (
        caplog.at_level(logging.DEBUG),
        live.run_engine(engine, http=live.http(token="sesame")) as port,
    ):
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Basic sesame"}):
            answer = send(port, headers=headers)
            assert answer.status_code == 401 and "Bearer" in answer.json()["message"]
            assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                assert get(port, path, headers=headers).status_code == 401
        assert send(port, headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert get(port, "/health").status_code == get(port, "/ready").status_code == 200
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesam", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert client.with_options(api_key="sesame").models.list().data
    assert "sesam" not in caplog.text


def test_our_own_clients_send_the_token_of_the_environment(engine, monkeypatch):
    with live.run_engine(engine, http=live.http(token="sesame")) as port:
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        with pytest.raises(RequestRefusedError, match="401.*wants a token"):
            ServerClient("127.0.0.1", port).format()
        monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
        assert ServerClient("127.0.0.1", port).format() == engine.info.format


def test_the_token_comes_from_a_file_or_the_environment_never_from_the_command_line(tmp_path, monkeypatch):
    def section(**changes):
        return OmegaConf.merge(live.server_config().http, changes)

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert settings_from(section()) == live.http(token=None)
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert settings_from(section()).token == "from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert settings_from(section(token_file=str(tmp_path / "token"))).token == "from-file"
    (tmp_path / "token").write_text("two words\n")
    with pytest.raises(ConfigError, match="one word of printable ASCII"):
        settings_from(section(token_file=str(tmp_path / "token")))
    with pytest.raises(InputError, match="cannot read a token"):
        settings_from(section(token_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"http.max_body_mb is 0.*\n.*http.drain_s is 'x'"):
        settings_from(section(max_body_mb=0, drain_s="x"))
    with pytest.raises(ConfigError):
        load_config(["gpt_model_file=x.nemo", "http.token=secret"], "megatron_gpt_inference")


def test_binding_wide_is_warned_of_where_there_is_no_token(capsys):
    open_listener(0, "0.0.0.0", has_token=True).close()
    assert capsys.readouterr().err == ""
    open_listener(0, "0.0.0.0").close()
    assert "without a token" in capsys.readouterr().err


# ---- limits -------------------------------------------------------------------------------------------------------


def test_limits_are_told_by_status(engine):
    limits = live.http(max_body_mb=0.01, max_prompts=3)
    with live.run_engine(engine, http=limits) as port:
        big = json.dumps({**GENERATE, "sentences": ["a" * 20000]}).encode()
        headers = {"content-type": "application/json"}
        for content in (big, iter([big[:5000], big[5000:]])):  # with its length said, and in chunks
            answer = httpx.put(f"http://127.0.0.1:{port}/generate", content=content, headers=headers, trust_env=False)
            assert answer.status_code == 413 and "http.max_body_mb" in answer.json()["message"]
        four = ["a"] * 4
        answer = send(port, body={**GENERATE, "sentences": four})
        assert (answer.status_code, answer.json()["message"]) == (400, "Maximum number of sentences is 3")
        for path, body in (
            ("/v1/completions", {"prompt": four}),
            ("/v1/completions", {"prompt": "a", "n": 4}),
            ("/v1/chat/completions", {**CHAT, "n": 4}),
        ):
            answer = send(port, path, body)
            assert answer.status_code == 400 and "more than 3" in answer.json()["error"]["message"]
        assert send(port, body={**GENERATE, "sentences": four[:3]}).status_code == 200


def test_megabytes_of_text_are_refused_before_they_are_tokenised(engine):
    class Counting:
        def __init__(self, tokenizer):
            self.longest, self._tokenizer = 0, tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode(self, text):
            self.longest = max(self.longest, len(text))
            return self._tokenizer.encode(text)

    class Watched:
        counters, add, cancel, step = engine.counters, engine.add, engine.cancel, engine.step
        info = replace(engine.info, tokenizer=Counting(engine.info.tokenizer), format=None)

    text = "abcdefg" * 2**20
    with live.run_engine(Watched()) as port:
        for path, body in (
            ("/generate", {**GENERATE, "sentences": [text]}),
            ("/v1/completions", {"prompt": text}),
        ):
            answer = send(port, path, body)
            assert answer.status_code == 400 and "characters" in answer.text
        assert send(port, body={**GENERATE, "end_strings": [text]}).status_code == 200
    assert Watched.info.tokenizer.longest < 100


# ---- numbers, request ids, log ------------------------------------------------------------------------------------


def test_metrics_count_requests_and_what_the_engine_did(engine):
    with live.run_engine(engine) as port:
        before = numbers(port)
        assert send(port).status_code == 200
        assert send(port, body={}).status_code == 400
        assert send(port, "/v1/nowhere/in/particular").status_code == 404
        after = numbers(port)
    assert after["steerlm_requests_total", "/generate", "200", "POST"] == 1
    assert after["steerlm_requests_total", "/generate", "400", "POST"] == 1
    assert after["steerlm_requests_total", "404", "POST", "other"] == 1  # strangers' paths make no series of their own
    assert after["steerlm_request_seconds_count", "/generate"] == 2
    made = after["steerlm_generation_tokens_total",] - before["steerlm_generation_tokens_total",]
    assert 1 <= made <= 4
    assert after["steerlm_prefilled_tokens_total",] > before["steerlm_prefilled_tokens_total",]
    assert after["steerlm_rows_running",] == after["steerlm_num_requests_waiting",] == 0
    assert after["steerlm_requests_in_flight",] == 1  # the one that asks
    assert after["steerlm_ready",] == 1


def test_every_number_of_the_server_names_the_model(engine):
    with live.run_engine(engine) as port:
        assert send(port).status_code == 200
        ours = [sample for sample in samples(port) if sample.name.startswith("steerlm_")]
    assert len({sample.name for sample in ours}) > 20
    assert {sample.labels.get("model_name") for sample in ours} == {"VALUE_TO_TEXT"}
    told = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().partition("## Numbers for Prometheus")[2]
    ends = "_(bucket|sum|count|created)$"
    assert {re.sub(ends, "", sample.name).removeprefix("steerlm_") for sample in ours} - {"requests"} <= {
        *re.findall(r"`(\w+)`", told)
    }


def test_histograms_hold_every_row_and_every_token(engine):
    three = {**LONG, "n": 3, "max_tokens": 20}
    with live.run_engine(Slow(engine, 0.03), max_batch_rows=2) as port:
        before = numbers(port)
        usage = send(port, "/v1/completions", three).json()["usage"]
        after = numbers(port)

    def grown(name):
        return after[name,] - before[name,]

    def seconds(what, up_to=None):
        name = f"steerlm_{what}_seconds"
        return (
            grown(f"{name}_sum") if up_to is None else after[f"{name}_bucket", up_to] - before[f"{name}_bucket", up_to]
        )

    assert grown("steerlm_time_to_first_token_seconds_count") == grown("steerlm_request_queue_time_seconds_count") == 3
    assert grown("steerlm_e2e_request_latency_seconds_count") == 1
    assert grown("steerlm_generation_tokens_total") == usage["completion_tokens"]
    assert grown("steerlm_inter_token_latency_seconds_count") == usage["completion_tokens"] - 3
    assert grown("steerlm_prompt_tokens_total") == 3 * usage["prompt_tokens"]
    # A step takes 0.03 s at least, and the third row waits for one of the first two.
    assert seconds("time_to_first_token", "0.025") == seconds("inter_token_latency", "0.025") == 0
    assert 0.03 < seconds("request_queue_time") < seconds("time_to_first_token")
    assert seconds("inter_token_latency") >= 0.03 * (usage["completion_tokens"] - 3)
    assert seconds("e2e_request_latency") > seconds("inter_token_latency") / 3


def test_rows_and_requests_that_wait_are_counted_apart(engine):
    with live.run_engine(Slow(engine, 0.05), max_batch_rows=2) as port, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(send, port, "/v1/completions", {**LONG, "n": 3, "max_tokens": 20}) for _ in range(2)]
        wait_until(lambda: numbers(port)["steerlm_rows_waiting",] == 4)
        now = numbers(port)
        assert now["steerlm_rows_running",] == 2 and now["steerlm_num_requests_running",] == 1
        assert now["steerlm_num_requests_waiting",] == 2  # of one, two rows have joined
        assert [answer.result().status_code for answer in asked] == [200, 200]


def test_requests_have_a_number_that_clients_may_choose(engine, caplog):
    with caplog.at_level(logging.INFO, "steerlm_nemo.serving"), live.run_engine(engine) as port:
        assert send(port, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert send(port, body={}, headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"
        own = send(port, headers={"X-Request-Id": "x" * 200}).headers["x-request-id"]
        assert len(own) == 32
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert client.chat.completions.create(model="VALUE_TO_TEXT", **CHAT)._request_id
    lines = [record.getMessage() for record in caplog.records if " /generate " in record.getMessage()]
    assert [line.rpartition("id=")[2] for line in lines] == ["mine-1", "mine-2", own]


def test_every_answer_names_the_model_that_gave_it(engine, monkeypatch):
    with live.run_engine(engine) as port:  # nobody knows what it is
        assert "x-model-identity" not in send(port).headers
    monkeypatch.setattr(engine, "info", replace(engine.info, identity="abc"))
    with live.run_engine(engine) as port:
        assert send(port).headers["x-model-identity"] == send(port, body={}).headers["x-model-identity"] == "abc"
        assert get(port, "/nowhere").headers["x-model-identity"] == "abc"


def test_a_path_cannot_write_log_lines_of_its_own(engine, caplog):
    with caplog.at_level(logging.INFO, "steerlm_nemo.serving"), live.run_engine(engine) as port:
        get(port, "/a%0aPUT%20/generate%20200")
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_what_is_no_http_gets_json_too(engine):
    with live.run_engine(engine) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400 and json.loads(answer.read())["message"]


# ---- clients that leave -------------------------------------------------------------------------------------------


def leave(port, path, body, sent=1.0):
    """Send a request, or the given share of its body, and return the open connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content[: int(sent * len(content))])
    return connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"sentences": ["a"] * 3, "tokens_to_generate": 200, "end_strings": []}),
        ("/v1/completions", {**LONG, "n": 3}),
        ("/v1/completions", {**LONG, "n": 3, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "temperature": 2, "n": 3, "stream": True}),
    ],
    ids=["generate", "completions", "completions stream", "chat stream"],
)
def test_a_client_that_leaves_gives_its_rows_back(engine, path, body, record_property):
    with live.run_engine(Slow(engine)) as port:
        before = numbers(port)["steerlm_generation_tokens_total",]
        connection = leave(port, path, body)
        wait_until(lambda: numbers(port)["steerlm_rows_running",] == 3)
        connection.close()
        seconds = wait_until(lambda: numbers(port)["steerlm_rows_running",] == 0)
        record_property("seconds", seconds)
        print(f"rows free {seconds:.3f} s after the client left")
        assert numbers(port)["steerlm_generation_tokens_total",] - before < 3 * 50  # 3 * 200 would have come
        assert send(port).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_gives_its_place_back_during_a_long_step(engine, stream):
    limits = live.http(max_waiting_requests=1)
    with live.run_engine(Slow(engine, 0.3), max_batch_rows=1, http=limits) as port, ThreadPoolExecutor(1) as pool:
        first = pool.submit(send, port, body={**GENERATE, "tokens_to_generate": 5})
        wait_until(lambda: numbers(port)["steerlm_rows_running",] == 1)
        waiting = leave(port, "/v1/completions", {**LONG, "stream": stream})
        wait_until(lambda: numbers(port)["steerlm_num_requests_waiting",] == 1)
        assert send(port).status_code == 429
        refused = send(port, "/v1/completions", {**LONG, "stream": stream})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "1 requests are waiting already" in refused.json()["error"]["message"]
        waiting.close()
        seconds = wait_until(lambda: numbers(port)["steerlm_num_requests_waiting",] == 0)
        print(f"place free {seconds:.3f} s after the client left")
        assert not first.done()
        assert send(port).status_code == 200
        assert first.result().status_code == 200


# ---- pages of other origins ---------------------------------------------------------------------------------------

PAGE = "https://chat.example.org"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def preflight(port, path, origin):
    headers = {"Origin": origin, **PREFLIGHT}
    return httpx.options(f"http://127.0.0.1:{port}{path}", headers=headers, trust_env=False)


def test_pages_of_other_origins_are_shut_out_by_default(engine):
    with live.run_engine(engine) as port:
        for answer in (preflight(port, "/generate", PAGE), send(port, headers={"Origin": PAGE})):
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert preflight(port, "/generate", PAGE).status_code == 405


def test_pages_of_listed_origins_may_ask_and_read_errors_and_streams_too(engine):
    listed = live.http(token="sesame", cors_allow_origins=(PAGE, "http://localhost:3000"))
    with live.run_engine(engine, http=listed) as port:
        for origin in listed.cors_allow_origins:
            allowed = preflight(port, "/v1/chat/completions", origin)  # without the token: browsers send none here
            assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origin
            assert {"GET", "PUT", "POST"} <= set(allowed.headers["access-control-allow-methods"].split(", "))
            assert allowed.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
            assert "Origin" in allowed.headers["vary"]
            assert "access-control-allow-credentials" not in allowed.headers
        token = {"Authorization": "Bearer sesame"}
        for answer in (
            send(port, headers={"Origin": PAGE, **token}),
            send(port, headers={"Origin": PAGE}),  # 401
            send(port, body={}, headers={"Origin": PAGE, **token}),  # 400
            send(port, "/nowhere", headers={"Origin": PAGE, **token}),  # 404
            send(port, "/v1/completions", {**LONG, "max_tokens": 4, "stream": True}, headers={"Origin": PAGE, **token}),
        ):
            assert answer.headers["access-control-allow-origin"] == PAGE and answer.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in answer.headers
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        for other in ("https://chat.example.org.evil.example", "http://chat.example.org", "null"):
            assert preflight(port, "/generate", other).status_code == 400
            assert "access-control-allow-origin" not in send(port, headers={"Origin": other, **token}).headers


@pytest.mark.parametrize(
    "origins",
    [
        *(
            "https://chat.example.org",
            ["chat.example.org"],
            ["https://chat.example.org/"],
            ["https://Chat.example.org"],
        ),
        *(["https://me@chat.example.org"], ["https://chat.example.org:443"], ["null"], [""], [3000]),
    ],
    ids=str,
)
def test_origins_that_no_browser_sends_are_refused(origins, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="it must be a list of what browsers send as Origin"):
        settings_from(OmegaConf.merge(live.server_config().http, {"cors_allow_origins": origins}))


def test_any_origin_and_a_token_do_not_go_together(monkeypatch):
    section = OmegaConf.merge(live.server_config().http, {"cors_allow_origins": ["*"]})
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert settings_from(section).cors_allow_origins == ("*",)
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
    with pytest.raises(ConfigError, match="and the server a token"):
        settings_from(section)


# ---- the end ------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_server():
    with open_listener(0) as free:
        port = free.getsockname()[1]
    server = live.ServerProcess(live.model_folder("VALUE_TO_TEXT"), port, pause_s=0.03)
    server.start()
    server.wait_ready()
    yield server
    server.kill()


def test_sigterm_finishes_streams_refuses_what_is_new_and_ends_with_0(slow_server):
    port = slow_server.port
    body = {**LONG, "stream": True, "max_tokens": 100}
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        with client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            slow_server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: get(port, "/ready").status_code == 503)
            assert get(port, "/health").json()["status"] == "draining"
            refused = send(port)
            assert refused.status_code == 503 and refused.json()["message"] and refused.headers["retry-after"] == "5"
            with pytest.raises(openai.InternalServerError, match="ending"):
                openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0).models.list()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    out, err = slow_server.process.communicate(timeout=PATIENCE_S)
    assert slow_server.process.returncode == 0
    assert out.splitlines()[-1] == "stopped serving VALUE_TO_TEXT" and "Traceback" not in err
    assert "ending: 1 requests in flight" in err


PROGRAM = """
import sys, time
import live
from steerlm_nemo.engine.watch import Patience
from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.serving.listener import open_listener, serve
from hf_engine import HFEngine
from pathlib import Path

folder, port, drain_s, kind = sys.argv[1:]
engine = HFEngine.load(Path(folder))
steps = []
def step():
    steps.append(1)
    if kind == "dies" and len(steps) == 20:
        raise RuntimeError("no more")
    time.sleep(600 if kind == "hangs" and len(steps) == 20 else 0.05)
    return original()
original, engine.step = engine.step, step
app = live.app(engine, patience=Patience(1, 1.5))
exit_with_message(lambda: serve(app, open_listener(int(port)), "it", float(drain_s)))
"""


class Ending:
    """A server in a process of its own that ends in some way while all sorts of requests are under way."""

    def __init__(self, kind, drain_s):
        with open_listener(0) as free:
            self.port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(live.__file__).parent), *sys.path])}
        arguments = [str(live.model_folder("VALUE_TO_TEXT")), str(self.port), str(drain_s), kind]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(self._answers)

    def _answers(self):
        try:
            return get(self.port, "/ready").status_code == 200
        except httpx.TransportError:
            assert self.process.poll() is None, self.process.communicate()[1]
            return False

    def answers(self, end):
        """Of all sorts of requests, by name, `end` being called when they are under way; then what the server said."""
        two = {**LONG, "n": 2, "stream": True}
        body = {"sentences": ["a"], "tokens_to_generate": 200, "min_tokens_to_generate": 200, "end_strings": []}
        with ThreadPoolExecutor(3) as pool:
            asked = {
                "generate": pool.submit(send, self.port, "/generate", body),
                "completions": pool.submit(send, self.port, "/v1/completions", {**LONG, "n": 2}),
                "stream": pool.submit(send, self.port, "/v1/completions", two),
            }
            uploading = leave(self.port, "/v1/completions", LONG, sent=0.5)
            wait_until(lambda: numbers(self.port)["steerlm_rows_running",] == 5)
            end(self.process)
            with uploading:
                upload = http.client.HTTPResponse(uploading)
                upload.begin()
                told = upload.read()
            found = {name: answer.result() for name, answer in asked.items()}
        found["upload"] = httpx.Response(upload.status, headers=upload.getheaders(), content=told)
        _, self.said = self.process.communicate(timeout=PATIENCE_S)
        return found


def once(process):
    process.send_signal(signal.SIGTERM)


def twice(process):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("kind", "end", "drain_s", "code", "reason"),
    [
        ("slow", once, 0.5, 0, "the server is ending and waited no longer than 0.5 s"),
        ("slow", twice, 30, 128 + signal.SIGTERM, "the server was told twice to end"),
        ("hangs", once, 30, 2, "the engine died: no forward pass has ended"),
        ("dies", lambda process: None, 30, 2, "the engine died: no more"),
    ],
    ids=["drained too long", "told twice", "hung while it drained", "died"],
)
def test_whatever_ends_a_server_its_requests_are_answered(kind, end, drain_s, code, reason):
    server = Ending(kind, drain_s)
    try:
        answers = server.answers(end)
    finally:
        server.process.kill()
    assert server.process.returncode == code, server.said
    stream = answers.pop("stream")
    assert stream.status_code == 200
    last = [line for line in stream.text.split("\n") if line][-1]
    told = json.loads(last.removeprefix("data: "))["error"]
    assert reason in told["message"] and told["type"] == "server_error"
    for name, answer in answers.items():
        assert answer.status_code == 503 and answer.headers["content-type"] == "application/json", name
        assert answer.headers["retry-after"] and answer.headers["x-request-id"]
        message = answer.json()["message"] if name == "generate" else answer.json()["error"]["message"]
        assert reason in message, name
    assert ("Traceback" in server.said) == (kind == "dies")  # the engine's own, which says where it died
    assert "ASGI" not in server.said and "defect" not in server.said
    if code == 2:
        assert server.said.splitlines()[-1].startswith("error: stopped serving it: the engine died: ")


def test_a_defect_is_answered_in_the_shape_of_the_route_and_the_log_has_its_place(engine, caplog):
    class Defective:
        counters, add, cancel, step = engine.counters, engine.add, engine.cancel, engine.step
        info = replace(engine.info, context_length="x")  # whoever compares with it fails

    allowed = live.http(cors_allow_origins=(PAGE,))
    with live.run_engine(Defective(), http=allowed) as port:
        own = send(port, headers={"Origin": PAGE})
        openais = send(port, "/v1/completions", LONG, headers={"Origin": PAGE})
    assert own.status_code == openais.status_code == 500
    assert own.json() == {"message": "Internal Server Error"}
    assert openais.json()["error"]["type"] == "server_error"
    assert own.headers["x-request-id"] and own.headers["access-control-allow-origin"] == PAGE
    assert "POST /generate: a defect of this server" in caplog.text and "TypeError" in caplog.text


def test_a_stream_that_fails_midway_ends_in_an_error_event(engine, monkeypatch):
    from steerlm_nemo.serving.routes import openai as route

    def failing(*arguments):
        raise ValueError("no such text")

    monkeypatch.setattr(route._Row, "news", failing)
    with live.run_engine(engine) as port:
        answer = send(port, "/v1/completions", {**LONG, "stream": True})
    assert answer.status_code == 200
    last = [line for line in answer.text.split("\n") if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "Internal Server Error"
