"""A server whose forward passes do not end says so, and is well again when one does; else everybody is answered."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import live
import openai
import pytest

from steerlm_nemo.engine.watch import Patience

PATIENCE_S = 60
STREAM = {"prompt": "a", "max_tokens": 100, "temperature": 2, "seed": 1, "stream": True}
FIVE = {"tokens_to_generate": 5, "min_tokens_to_generate": 5, "end_strings": []}
REQUESTS = {
    "/generate": {"sentences": ["a"], "greedy": True, **FIVE},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Speak!"}], "temperature": 2, "seed": 1},
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 100, "temperature": 2, "seed": 1},
}


class Stuck:
    """The engine, of which one step hangs until it is let go."""

    def __init__(self, engine, step):
        self.info, self.counters, self.cancel = engine.info, engine.counters, engine.cancel
        self.hangs, self.let_go = threading.Event(), threading.Event()
        self.added = []
        self._engine, self._left = engine, step

    def add(self, work):
        self.added.append(self._engine.add(work))
        return self.added[-1]

    def step(self):
        self._left -= 1
        if self._left == 0:
            self.hangs.set()
            assert self.let_go.wait(PATIENCE_S)
        return self._engine.step()


@pytest.fixture
def stuck():
    """Made by the number of the step that hangs; let go at the end in any case."""
    made = []

    def make(step):
        made.append(Stuck(live.engine("VALUE_TO_TEXT"), step))
        return made[-1]

    yield make
    for engine in made:
        engine.let_go.set()
        for row in engine.added:  # other tests have the same engine
            engine.cancel(row)


def get(port, path):
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=PATIENCE_S)


def send(port, path, body):
    return httpx.post(f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=PATIENCE_S)


def wait_until(true):
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + PATIENCE_S
        time.sleep(0.02)


@pytest.mark.parametrize("step", [1, 3], ids=["the first pass", "a later pass"])
def test_while_a_pass_does_not_end_the_server_is_not_ready_and_then_it_is_again(stuck, step):
    engine = stuck(step)
    with live.run_engine(engine, patience=Patience(0.5, 60)) as port, ThreadPoolExecutor(1) as pool:
        assert get(port, "/ready").json() == {"ready": True}
        asked = pool.submit(send, port, "/generate", REQUESTS["/generate"])
        wait_until(lambda: get(port, "/ready").status_code == 503)
        assert engine.hangs.is_set()
        refusal, health = get(port, "/ready"), get(port, "/health")
        assert "no forward pass has ended for" in refusal.json()["message"] and refusal.headers["retry-after"]
        assert health.status_code == 503 and health.headers["retry-after"]
        told = health.json()
        assert (told["status"], told["ready"], told["model"]) == ("stalled", False, "VALUE_TO_TEXT")
        assert "no forward pass has ended for" in told["message"]
        engine.let_go.set()
        assert asked.result().status_code == 200
        assert get(port, "/ready").status_code == get(port, "/health").status_code == 200


def test_without_rows_no_pass_has_to_end(stuck):
    with live.run_engine(stuck(1000), patience=Patience(0.5, 0.75)) as port:
        assert send(port, "/generate", REQUESTS["/generate"]).status_code == 200
        time.sleep(1.5)
        assert get(port, "/health").json()["status"] == "ready"


def test_a_client_that_leaves_does_not_make_a_server_well_whose_pass_hangs(stuck, caplog):
    engine = stuck(1)
    with live.run_engine(engine, patience=Patience(0.5, 60)) as port:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{port}/generate", json=REQUESTS["/generate"], timeout=0.2, trust_env=False)
        wait_until(lambda: get(port, "/ready").status_code == 503)
        engine.let_go.set()
        wait_until(lambda: get(port, "/ready").status_code == 200)
    assert "Traceback" not in caplog.text and "defect" not in caplog.text


def test_everybody_who_waits_for_a_pass_that_hangs_is_answered(stuck, caplog):
    engine = stuck(3)
    with live.run_engine(engine, patience=Patience(0.5, 1.5)) as port, ThreadPoolExecutor(8) as pool:
        asked = {path: pool.submit(send, port, path, body) for path, body in REQUESTS.items()}
        streams = [pool.submit(send, port, "/v1/completions", STREAM) for _ in range(2)]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_until(engine.hangs.is_set)
        with pytest.raises(openai.InternalServerError, match="no forward pass has ended") as caught:
            client.completions.create(model="VALUE_TO_TEXT", prompt="a")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        for path, answer in asked.items():
            told = answer.result()
            assert told.status_code == 503 and told.headers["retry-after"]
            message = told.json()["error"]["message"] if path.startswith("/v1") else told.json()["message"]
            assert "no forward pass has ended for" in message
        for stream in streams:
            lines = [line for line in stream.result().text.split("\n") if line]
            assert "no forward pass has ended for" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        assert get(port, "/health").json()["status"] == "failed"
        assert send(port, "/generate", REQUESTS["/generate"]).status_code == 503
    assert "Traceback" not in caplog.text and "defect" not in caplog.text
