"""What holds for every request: token, limits, numbers, log lines, clients that leave, and an orderly end."""

import http.client
import json
import logging
import os
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


def numbers(port):
    families = text_string_to_metric_families(get(port, "/metrics").text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


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
    made = after["steerlm_generated_tokens_total",] - before["steerlm_generated_tokens_total",]
    assert 1 <= made <= 4
    assert after["steerlm_prefilled_tokens_total",] > before["steerlm_prefilled_tokens_total",]
    assert after["steerlm_rows_running",] == after["steerlm_requests_waiting",] == 0
    assert after["steerlm_requests_in_flight",] == 1  # the one that asks
    assert after["steerlm_ready",] == 1


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


def leave(port, path, body):
    """Send a request, and return the open connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
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
        before = numbers(port)["steerlm_generated_tokens_total",]
        connection = leave(port, path, body)
        wait_until(lambda: numbers(port)["steerlm_rows_running",] == 3)
        connection.close()
        seconds = wait_until(lambda: numbers(port)["steerlm_rows_running",] == 0)
        record_property("seconds", seconds)
        print(f"rows free {seconds:.3f} s after the client left")
        assert numbers(port)["steerlm_generated_tokens_total",] - before < 3 * 50  # 3 * 200 would have come
        assert send(port).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_gives_its_place_back_during_a_long_step(engine, stream):
    limits = live.http(max_waiting_requests=1)
    with live.run_engine(Slow(engine, 0.3), max_batch_rows=1, http=limits) as port, ThreadPoolExecutor(1) as pool:
        first = pool.submit(send, port, body={**GENERATE, "tokens_to_generate": 5})
        wait_until(lambda: numbers(port)["steerlm_rows_running",] == 1)
        waiting = leave(port, "/v1/completions", {**LONG, "stream": stream})
        wait_until(lambda: numbers(port)["steerlm_requests_waiting",] == 1)
        assert send(port).status_code == 429
        waiting.close()
        seconds = wait_until(lambda: numbers(port)["steerlm_requests_waiting",] == 0)
        print(f"place free {seconds:.3f} s after the client left")
        assert not first.done()
        assert send(port).status_code == 200
        assert first.result().status_code == 200


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


def test_a_second_signal_ends_at_once(slow_server):
    connection = leave(slow_server.port, "/v1/completions", {**LONG, "n": 8})
    wait_until(lambda: numbers(slow_server.port)["steerlm_rows_running",] == 8)
    slow_server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: get(slow_server.port, "/ready").status_code == 503)
    slow_server.process.send_signal(signal.SIGTERM)
    assert slow_server.process.wait(timeout=PATIENCE_S) == 128 + signal.SIGTERM
    connection.close()


def test_an_engine_that_died_is_503_and_ends_the_server_with_its_reason(tmp_path):
    program = """
import sys
import live
from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.serving.listener import open_listener, serve
from hf_engine import HFEngine
from pathlib import Path

engine = HFEngine.load(Path(sys.argv[1]))
def step():
    raise RuntimeError("no more")
engine.step = step
exit_with_message(lambda: serve(live.app(engine), open_listener(int(sys.argv[2])), "it", 30))
"""
    with open_listener(0) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(live.__file__).parent)}
    command = [sys.executable, "-c", program, live.model_folder("VALUE_TO_TEXT"), str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def answers():
        try:
            return get(port, "/ready").status_code == 200
        except httpx.TransportError:
            assert server.poll() is None
            return False

    wait_until(answers)
    answer = send(port)
    assert answer.status_code == 503 and "the engine died: no more" in answer.json()["message"]
    _, err = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 2
    assert err.splitlines()[-1] == "error: stopped serving it: the engine died: no more"
