import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import live
import pytest
from hf_engine import HFEngine

from steerlm_nemo.engine.protocol import Failed
from steerlm_nemo.errors import InputError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.listener import open_listener

GREEDY = {"greedy": True, "tokens_to_generate": 12}


@pytest.fixture(scope="module")
def engine():
    return live.engine("VALUE_TO_TEXT")


@pytest.fixture(scope="module")
def url(engine):
    with live.run_engine(engine) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def prompt(engine):
    return "\x00System\nThree words.\n\n\n\x11User\nSpeak!\n\x11Assistant\n\x12quality:1,humor:2,lang:de\n"


def put(url, body, **options):
    return httpx.put(f"{url}/generate", json=body, trust_env=False, timeout=60, **options)


def test_the_answer_has_the_references_keys_and_spelling(url, engine, prompt):
    answer = put(url, {"sentences": [prompt], "end_strings": ["\x11"], **GREEDY})
    assert answer.status_code == 200
    body = answer.json()
    assert answer.text == json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    assert sorted(body) == ["logprob", "offsets", "sentences", "token_ids", "tokens"]
    assert body["sentences"] == [prompt + "poor laugh hallo\n\x11"]
    assert body["logprob"] is None
    ids, tokens, offsets = body["token_ids"][0], body["tokens"][0], body["offsets"][0]
    assert engine.info.tokenizer.decode(ids) == body["sentences"][0]
    assert tokens == [engine.info.tokenizer.id_to_piece(i) for i in ids] and "<0x0A>" in tokens
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_post_is_answered_like_put(url, prompt):
    body = {"sentences": [prompt], **GREEDY}
    assert httpx.post(f"{url}/generate", json=body, trust_env=False).json() == put(url, body).json()


def test_prompts_reach_the_model_as_training_tokenises_them(url, engine, prompt):
    ids = put(url, {"sentences": [prompt], **GREEDY}).json()["token_ids"][0]
    expected = engine.info.format.template.encode_prompt(prompt, engine.info.tokenizer)
    assert ids[: len(expected)] == expected


def test_bos_and_eos_count_nothing_in_offsets(url, engine):
    body = put(url, {"sentences": ["x"], "add_BOS": True, **GREEDY}).json()
    assert body["token_ids"][0][0] == engine.info.tokenizer.bos_id
    assert body["offsets"][0][:2] == [0, 0]


def test_every_row_has_its_own_limit(url, engine):
    sentences = ["a", "a much longer sentence than the first one"]
    body = put(url, {"sentences": sentences, "greedy": True, "tokens_to_generate": 3, "end_strings": []}).json()
    for sentence, ids in zip(sentences, body["token_ids"], strict=True):
        prompt_ids = engine.info.format.template.encode_prompt(sentence, engine.info.tokenizer)
        assert len(prompt_ids) < len(ids) <= len(prompt_ids) + 3  # the reference gives the shorter one more (D-16)


def test_only_the_compat_mode_pads_rows(engine, prompt):
    body = {"sentences": [prompt, "a"], "end_strings": ["\x11"], **GREEDY}
    with live.run_engine(engine) as plain, live.run_engine(engine, compat="nemo1.23") as padded:
        rows, padded_rows = (put(f"http://127.0.0.1:{port}", body).json()["token_ids"] for port in (plain, padded))
    assert len(rows[0]) != len(rows[1])
    longest = max(map(len, rows))
    eos = engine.info.tokenizer.eos_id
    assert padded_rows == [row + [eos] * (longest - len(row)) for row in rows]


def test_log_probabilities_are_those_of_the_model(url, engine, prompt):
    import torch

    body = put(url, {"sentences": [prompt], "compute_logprob": True, "all_probs": True, **GREEDY}).json()
    ids = body["token_ids"][0]
    with torch.no_grad():
        expected = engine.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    full = torch.tensor(body["full_logprob"][0])
    assert full.shape == (len(ids) - 1, engine.info.vocab_size)
    assert torch.allclose(full, expected, atol=1e-4)
    assert torch.allclose(
        torch.tensor(body["logprob"][0]), expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4
    )


def test_all_probs_needs_no_compute_logprob(url):
    body = put(url, {"sentences": ["a"], "all_probs": True, **GREEDY}).json()  # status 500 in the reference (D-15)
    assert body["logprob"] is None and len(body["full_logprob"][0]) == len(body["token_ids"][0]) - 1


def test_a_probability_of_zero_is_null_because_json_has_no_infinity(engine):
    from steerlm_nemo.serving.http import json_text

    assert json_text({"a": [float("-inf"), 1.0], "b": ("x",)}) == '{"a":[null,1.0],"b":["x"]}'


def test_a_refused_request_is_400_json_that_never_reaches_the_engine(url, engine):
    before = len(engine.calls)
    answer = put(url, {"sentences": ["a"], "temperature": 0})
    assert answer.status_code == 400
    assert answer.json() == {"message": "temperature must be a positive number less than or equal to 100.0, found 0"}
    assert put(url, {"sentences": ["a"] * 129}).json() == {"message": "Maximum number of sentences is 128"}
    assert len(engine.calls) == before


def test_the_compat_mode_answers_200_with_a_bare_string_as_the_reference_does(engine):
    with live.run_engine(engine, compat="nemo1.23") as port:
        url = f"http://127.0.0.1:{port}"
        answer = put(url, {"sentences": ["a"], "top_p": 2})
        assert (answer.status_code, answer.json()) == (200, "top_p must be a positive number less than or equal to 1.0")
        answer = put(url, {"sentences": ["a"] * 129})
        assert (answer.status_code, answer.json()) == (400, {"message": "Maximum number of sentences is 128"})
        assert put(url, {"sentences": ["a"], "unknown": 1, **GREEDY}).json()["sentences"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"{}"}, 415),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json; charset=utf-8"}}, 400),
        ({"content": b'{"sentences": NaN}', "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"[" * 100000, "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b" " * (17 * 2**20), "headers": {"content-type": "application/json"}}, 413),
    ],
)
def test_bodies_that_are_no_json_get_a_json_error(url, options, status):
    answer = httpx.put(f"{url}/generate", trust_env=False, **options)
    assert answer.status_code == status
    assert answer.json()["message"]


def test_other_methods_and_paths_get_json_errors(url):
    assert httpx.get(f"{url}/generate", trust_env=False).status_code == 405
    assert "message" in httpx.get(f"{url}/nowhere", trust_env=False).json()


def test_health_names_the_model_and_its_parallel_size(url):
    answer = httpx.get(f"{url}/health", trust_env=False).json()
    assert answer == {
        "status": "ready",
        "ready": True,
        "model": "VALUE_TO_TEXT",
        "tp_size": 1,
        "dtype": "float32",
        "context_length": 256,
    }


def test_template_and_attributes_are_the_format_kept_in_the_checkpoint(url, engine):
    for path in ("template", "attributes"):
        answer = httpx.get(f"{url}/v1/{path}", trust_env=False)
        assert SteerLMFormat.from_dict(answer.json()) == engine.info.format


def test_a_genuine_model_without_format_continues_text_as_its_authors_recorded(genuine_checkpoint):
    expected = json.loads((genuine_checkpoint / "expected.json").read_text())["greedy_text"]
    with live.run_engine(HFEngine.load(genuine_checkpoint)) as port:
        url = f"http://127.0.0.1:{port}"
        body = {"sentences": [""], "add_BOS": True, "greedy": True, "tokens_to_generate": 60}
        text = put(url, body).json()["sentences"][0]
        assert httpx.get(f"{url}/v1/attributes", trust_env=False).status_code == 404
    assert len(text) > 100
    assert expected.strip().startswith(text.strip())


def test_request_bodies_of_public_documentation_work_unchanged(genuine_checkpoint):
    path = live.DATA / "nemo-generate-requests" / "requests.jsonl"
    if not path.is_file():
        pytest.skip("no documented request bodies here (../shared/data/nemo-generate-requests)")
    with live.run_engine(HFEngine.load(genuine_checkpoint)) as port:
        for line in path.read_text().splitlines():
            example = json.loads(line)
            address = f"http://127.0.0.1:{port}{example['path']}"
            answer = httpx.request(example["method"], address, json=example["body"], timeout=120, trust_env=False)
            sentences = answer.json()["sentences"]
            assert len(sentences) == len(example["body"]["sentences"])
            for sent, got in zip(example["body"]["sentences"], sentences, strict=True):
                assert got.startswith(sent)  # documented clients cut len(prompt) characters off
                assert len(got) > len(sent)


def test_concurrent_clients_get_the_answers_they_get_alone_and_share_batches(engine):
    bodies = [{"sentences": ["Tell me. " * n, "And now? "][: 1 + n % 2], **GREEDY} for n in range(1, 17)]
    with live.run_engine(engine) as port:
        url = f"http://127.0.0.1:{port}"
        alone = [put(url, body).json() for body in bodies]
        before = len(engine.calls)
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda body: put(url, body).json(), bodies))
    assert together == alone
    assert len(engine.calls) - before < len(bodies)


class Gate:
    """The engine behind a door: steps wait until it opens; samples with the forbidden limit fail."""

    def __init__(self, engine):
        self.info, self.counters, self._engine = engine.info, engine.counters, engine
        self.entered, self.open = threading.Event(), threading.Event()
        self.rows = []
        self._num_new, self._forbidden = 0, []
        self.cancel = engine.cancel

    def add(self, sample):
        row = self._engine.add(sample)
        self._num_new += 1
        if sample.tokens_to_generate == 13:
            self._forbidden.append(row)
        return row

    def step(self):
        if self._num_new:
            self.rows.append(self._num_new)
        self.entered.set()
        self.open.wait(30)
        failed = [Failed(row, RuntimeError("no answer of 13 tokens")) for row in self._forbidden]
        for row in self._forbidden:
            self._engine.cancel(row)
        self._num_new, self._forbidden = 0, []
        return [*failed, *self._engine.step()]


def test_a_failing_engine_call_is_500_for_its_own_request_only(engine):
    gate = Gate(engine)
    gate.open.set()
    good, bad = {"sentences": ["a"], **GREEDY}, {"sentences": ["a"], **GREEDY, "tokens_to_generate": 13}
    with live.run_engine(gate) as port:
        url = f"http://127.0.0.1:{port}"
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda body: put(url, body), [good, bad, good] * 4))
        assert [answer.status_code for answer in answers] == [200, 500, 200] * 4
        assert "engine failed" in answers[1].json()["message"]
        assert put(url, good).status_code == 200


def test_a_full_queue_is_429_with_retry_after_and_loses_nobody(engine):
    gate = Gate(engine)
    body = {"sentences": ["a"], **GREEDY}
    with live.run_engine(gate, http=live.http(max_waiting_requests=2)) as port, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}"
        first = pool.submit(put, url, body)
        gate.entered.wait(10)  # the engine is busy, so whatever comes now has to wait
        others = [pool.submit(put, url, body) for _ in range(5)]
        while sum(other.done() for other in others) < 3:
            time.sleep(0.01)
        gate.open.set()
        answers = [other.result() for other in others]
        assert first.result().status_code == 200
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1" and "waiting" in refused.json()["message"]


def test_a_client_that_goes_away_frees_its_place_and_breaks_nobody(engine):
    gate = Gate(engine)
    body = {"sentences": ["a"], **GREEDY}
    with live.run_engine(gate, http=live.http(max_waiting_requests=1)) as port, ThreadPoolExecutor(4) as pool:
        url = f"http://127.0.0.1:{port}"
        first = pool.submit(put, url, body)
        gate.entered.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.put(f"{url}/generate", json={"sentences": ["a", "b", "c"]}, timeout=0.2, trust_env=False)
        time.sleep(1.5)  # longer than the server takes to notice
        gate.open.set()
        assert first.result().status_code == 200
        assert put(url, body).status_code == 200
    assert gate.rows == [1, 1]  # the three rows nobody waits for were never computed


def test_the_log_has_method_path_status_and_rows_but_never_a_body(engine, caplog):
    secret = "my password is hunter2"
    with caplog.at_level(logging.DEBUG, "steerlm_nemo.serving"), live.run_engine(engine) as port:
        address = f"http://127.0.0.1:{port}/generate?q=hunter2"
        httpx.put(address, json={"sentences": [secret, secret], **GREEDY}, trust_env=False)
        httpx.put(address, json={"sentences": [secret], "x": secret}, trust_env=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "steerlm_nemo.serving"]
    assert len(lines) == 2
    assert lines[0].startswith("PUT /generate 200 ") and " ms rows=2 id=" in lines[0]
    assert lines[1].startswith("PUT /generate 400 ")
    assert "hunter2" not in " ".join(lines)


def test_answers_do_not_wait_for_acknowledgements():
    """asyncio switches Nagle's algorithm off for connections whose listener names TCP only."""
    with open_listener(0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_named_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use"):
            open_listener(port)
        script = Path(live.__file__).with_name("serve_hf.py")
        run = subprocess.run([sys.executable, script, "/no/such/model", str(port)], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: port ") and "Traceback" not in run.stderr


@pytest.mark.parametrize(("port", "host"), [(70000, "127.0.0.1"), (-1, "127.0.0.1"), (0, "no.such.host.invalid")])
def test_impossible_addresses_are_refused(port, host):
    with pytest.raises(InputError):
        open_listener(port, host)


def test_binding_wide_is_warned_of_and_loopback_is_not(capsys):
    open_listener(0).close()
    assert capsys.readouterr().err == ""
    open_listener(0, "0.0.0.0").close()
    assert "WARNING: serving on 0.0.0.0" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_0_after_the_requests_in_flight(number):
    with open_listener(0) as free:
        port = free.getsockname()[1]
    server = live.ServerProcess(live.model_folder("VALUE_TO_TEXT"), port)
    server.start()
    server.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        body = {"sentences": ["a"] * 16, "greedy": True, "tokens_to_generate": 60, "end_strings": []}
        answer = pool.submit(put, f"http://127.0.0.1:{port}", body)
        time.sleep(0.3)
        server.process.send_signal(number)
        assert answer.result().status_code == 200
    out, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0, err
    assert out.splitlines()[-1] == "stopped serving VALUE_TO_TEXT"
    assert "Traceback" not in err
