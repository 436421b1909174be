"""Random requests against a server, from a seed: `python fuzz.py NUM_REQUESTS [SEED [PORT]]` reports what it finds.

Without PORT it starts two servers of the tests' models in turn; with it, it asks the server there.

A request is a good one with something wrong, something random, or bytes; its method, path, headers and size are random,
too. Good answers and 4xx are fine; 5xx, silence, and a 4xx without a JSON reason are findings.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import live

HANG_S = 120.0
CLIENTS = 16
JSON = "application/json"
MODELS = ("VALUE_TO_TEXT", "TEXT_TO_VALUE")

_CHAT: dict[str, Any] = {
    "messages": [{"role": "system", "content": "Three words.\n\n"}, {"role": "user", "content": "Speak!"}],
    "attributes": {"quality": 2, "humor": 1, "lang": "de"},
    "temperature": 1.0,
    "max_tokens": 8,
    "n": 1,
    "seed": 3,
    "stop": ["x"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
}
_GRADED = [{"from": "User", "value": "Speak!"}, {"from": "Assistant", "value": "bad dry hello", "label": "quality:1"}]
GOOD: list[tuple[str, str, Any]] = [
    (
        "PUT",
        "/generate",
        {
            "sentences": ["Speak!", "And now?"],
            "tokens_to_generate": 6,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 0.9,
            "greedy": False,
            "add_BOS": False,
            "all_probs": False,
            "compute_logprob": False,
            "repetition_penalty": 1.2,
            "min_tokens_to_generate": 0,
            "end_strings": ["<|endoftext|>", "x"],
            "random_seed": 1,
        },
    ),
    ("POST", "/v1/chat/completions", _CHAT),
    ("POST", "/v1/chat/completions", {**_CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"prompt": ["Speak!", "a"], "max_tokens": 6, "n": 2, "logprobs": 1, "echo": False}),
    ("POST", "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 6, "stream": True, "stop": "e"}),
    ("POST", "/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 0, "echo": True, "logprobs": 1, "best_of": 1}),
    (
        "POST",
        "/v1/completions",
        {
            "prompt": "a",
            "max_tokens": 6,
            "min_tokens": 6,
            "ignore_eos": True,
            "min_p": 0.1,
            "logit_bias": {"5": -100, "6": 1.5},
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "stop_token_ids": [9],
            "include_stop_str_in_output": True,
            "use_beam_search": False,
            "guided_json": None,
            "user": "x",
            "stream": True,
            "stream_options": {"continuous_usage_stats": True},
        },
    ),
    (
        "POST",
        "/v1/annotate",
        {
            "conversations": [
                {"conversations": _GRADED, "system": "Three words.\n\n", "mask": "User", "type": None},
                {"messages": [{"role": "user", "content": "Speak!"}, {"role": "assistant", "content": "bad"}]},
            ],
            "turns": "all",
            "only_missing": True,
            "soft": True,
        },
    ),
    (
        "POST",
        "/v1/attribute_lines",
        {"prompts": ["\x00System\nThree words.\n\n\n\x11User\nSpeak!\n\x12"], "given": [{"quality": 3}]},
    ),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/VALUE_TO_TEXT", None),
    ("GET", "/v1/attributes", None),
    ("GET", "/v1/template", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
    ("GET", "/", None),
]


@dataclass(frozen=True)
class Case:
    method: str
    path: str
    content: bytes
    headers: dict[str, str]
    leaves_after_s: float | None = None  # the client does not wait for the answer


def case(chance: random.Random) -> Case:
    method, path, body = chance.choices(GOOD, [8 if body else 1 for _, _, body in GOOD])[0]
    headers = {"content-type": JSON}
    content = b"" if body is None else json.dumps(body).encode()
    kind = chance.random()
    if body is not None and kind < 0.6:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            body = _changed(body, chance)
        content = json.dumps(body).encode()
    elif kind < 0.7:
        content = json.dumps(_value(chance)).encode()
    elif kind < 0.8:
        content = _bytes(content, chance)
    if chance.random() < 0.05:
        method = chance.choice(("GET", "PUT", "POST", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "BREW"))
    if chance.random() < 0.05:
        path = _path(path, chance)
    if chance.random() < 0.05:
        headers["content-type"] = chance.choice(
            ("", "text/plain", JSON + "; charset=utf-16", "a/b;c", "multipart/form-data")
        )
    if chance.random() < 0.1:
        headers[chance.choice(("authorization", "x-request-id", "accept", "accept-encoding", "expect", "cookie"))] = (
            chance.choice(("", "Bearer", "Bearer x", "a" * 5000, "*/*", "gzip", "%00", "x y z", "100-continu"))
        )
    leaves = chance.random() * 0.2 if chance.random() < 0.03 else None
    return Case(method, path, content, headers, leaves)


def _changed(body: Any, chance: random.Random) -> Any:
    """The body with one thing in it replaced, left out, doubled or added, at any depth."""
    if isinstance(body, dict) and body:
        key = chance.choice(sorted(body))
        if isinstance(body[key], (dict, list)) and chance.random() < 0.5:
            return {**body, key: _changed(body[key], chance)}
        match chance.randrange(6):
            case 0:
                return {other: value for other, value in body.items() if other != key}
            case 1:
                return {**body, _text(chance): _value(chance)}
            case 2:
                return {**{other: value for other, value in body.items() if other != key}, key[:-1] + "s": body[key]}
        return {**body, key: _value(chance)}
    if isinstance(body, list) and body:
        place = chance.randrange(len(body))
        match chance.randrange(4):
            case 0:
                return body[:place] + body[place + 1 :]
            case 1:
                return body * chance.choice((2, 50, 130))
            case 2:
                return [*body[:place], _changed(body[place], chance), *body[place + 1 :]]
        return [*body[:place], _value(chance), *body[place + 1 :]]
    return _value(chance)


def _value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return chance.choice((None, True, False))
    if kind == 1:
        return chance.choice((0, 1, -1, 2, 5, 128, 129, 255, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**400))
    if kind == 2:
        return chance.choice((0.0, 0.5, 1.0, 1.5, -0.0, 2.0000001, 1e-300, 1e308, -3.7, float("nan"), float("inf")))
    if kind < 6:
        return _text(chance)
    if kind == 6:
        return [_value(chance, depth + 1) for _ in range(chance.choice((0, 1, 2, 5)))]
    return {_text(chance): _value(chance, depth + 1) for _ in range(chance.choice((0, 1, 3)))}


def _text(chance: random.Random) -> str:
    match chance.randrange(8):
        case 0:
            return chance.choice(
                ("", " ", "\n", "\x00", "\x11", "\x12", "\ud800", "\udfff\ud800", "\U0001f600", "\ufeff")
            )
        case 1:
            return chance.choice(
                ("<|endoftext|>", "<extra_id_1>", "User", "quality:4", "</s>", "NaN", "__proto__", "../..")
            )
        case 2:
            return "".join(chance.choice(string.printable) for _ in range(chance.randrange(40)))
        case 3:
            return "".join(chr(chance.randrange(1, 0x2FFF)) for _ in range(chance.randrange(60)))
        case 4:
            return chance.choice(("a ", "Tell me. ", "\x11User\n", "\u4e2d")) * chance.choice((3, 60, 400, 20000))
        case 5:
            return chance.choice(("model", "prompt", "sentences", "attributes", "stream", "tools", "n", "stop", "lang"))
        case 6:
            return chance.choice(("1", "0", "-1", "1e9", "true", "null"))
    return chance.choice(("Speak!", "bad dry hello", "de", "en", "assistant", "user", "VALUE_TO_TEXT"))


def _bytes(content: bytes, chance: random.Random) -> bytes:
    match chance.randrange(9):
        case 0:
            return content[: chance.randrange(len(content) + 1)]
        case 1:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
        case 2:
            return b"[" * chance.choice((10, 900, 5000, 200000))
        case 3:
            depth = chance.choice((10, 300, 600, 900))
            return b'{"a":' * depth + b"1" + b"}" * depth
        case 4:
            return b"\xef\xbb\xbf" + content
        case 5:
            return content.decode().encode("utf-16")
        case 6:
            return b'{"sentences": ["a"], "sentences": ["b"], "n": ' + b"9" * chance.choice((10, 4000, 9000)) + b"}"
        case 7:
            depth = chance.choice((50, 400, 800))
            nested = b"[" * depth + b"]" * depth
            return b'{"conversations": [{"messages": ' + nested + b', "conversations": ' + nested + b"}]}"
    return b" " * (17 * 2**20) if chance.random() < 0.1 else content * 2


def _path(path: str, chance: random.Random) -> str:
    return chance.choice(
        (
            path + "/",
            path + "?" + "a=b&" * 50,
            path.upper(),
            "/" + path,
            "/v1/models/" + "x" * 3000,
            "/v1/models/%00%0a%2e%2e%2f",
            "/v1/" + "".join(chance.choice(string.ascii_lowercase) for _ in range(6)),
            "/%ff%fe",
            "/../../etc/passwd",
            "/v1/chat/completions/x",
        )
    )


@dataclass
class Findings:
    """`bad` is empty where all is well."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    by_path: Counter[tuple[str, int | str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, case: Case, status: int | str, seconds: float, problem: str | None) -> None:
        self.statuses[status] += 1
        known = {path for _, path, _ in GOOD}
        self.by_path[case.path if case.path in known else "other", status] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if problem:
            self.bad.append(f"{case.method} {case.path[:80]} {case.headers} {case.content[:500]!r}: {problem[:500]}")


def attack(port: int, num_requests: int, seed: int) -> Findings:
    """Send as many cases from 16 clients at a time."""
    chance = random.Random(seed)
    cases = [case(chance) for _ in range(num_requests)]
    findings = Findings()
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=HANG_S) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        for number, result in enumerate(pool.map(lambda each: _send(client, each), cases)):
            findings.add(cases[number], *result)
    return findings


def _send(client: httpx.Client, case: Case) -> tuple[int | str, float, str | None]:
    start = time.monotonic()
    timeout = HANG_S if case.leaves_after_s is None else case.leaves_after_s
    try:
        answer = client.request(case.method, case.path, content=case.content, headers=case.headers, timeout=timeout)
    except httpx.TimeoutException:
        problem = None if case.leaves_after_s is not None else f"no answer in {HANG_S} s"
        return "left" if problem is None else "hang", time.monotonic() - start, problem
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError) as err:
        # The server answers a body that is too large without reading it all.
        too_large = len(case.content) > 16 * 2**20
        return (
            "too large, cut off" if too_large else "broken",
            time.monotonic() - start,
            None if too_large else repr(err),
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError):
        return "unsendable", 0.0, None
    seconds = time.monotonic() - start
    status = answer.status_code
    if status >= 500:
        return status, seconds, answer.text
    if status >= 400 and case.method != "HEAD":
        try:
            reason = answer.json()
            told = reason["error"]["message"] if "error" in reason else reason["message"]
            assert isinstance(told, str) and told
        except (ValueError, KeyError, TypeError, AssertionError):
            return status, seconds, f"no JSON reason: {answer.text}"
    if status == 200 and answer.headers["content-type"] == JSON and case.method != "HEAD":
        with suppress(ValueError):
            answer.json()
            return status, seconds, None
        return status, seconds, f"no JSON: {answer.text}"
    return status, seconds, None


def fuzz(model: str, num_requests: int, seed: int) -> tuple[Findings, str]:
    """Attack a server process of its own; what was found, and what the server wrote."""
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    server = live.ServerProcess(live.model_folder(model), port)
    server.start_quietly()
    try:
        server.wait_ready()
        findings = attack(port, num_requests, seed)
        good = httpx.put(f"http://127.0.0.1:{port}/generate", json=GOOD[0][2], trust_env=False, timeout=HANG_S)
        if good.status_code != 200:
            findings.bad.append(f"afterwards, a good request is answered with {good.status_code}: {good.text}")
        server.process.terminate()
        if server.process.wait(timeout=HANG_S) != 0:
            findings.bad.append(f"the server ended with {server.process.returncode}")
    finally:
        server.process.kill()
    log = server.log()
    if "Traceback" in log:
        findings.bad.append("the server's log has a traceback:\n" + log[log.index("Traceback") :][:3000])
    return findings, log


def main() -> None:
    num_requests, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    port = int(sys.argv[3]) if len(sys.argv) > 3 else None
    models = MODELS if port is None else (f"port {port}",)
    num_bad = 0
    for model in models:
        start, count = time.monotonic(), num_requests // len(models)
        findings = fuzz(model, count, seed)[0] if port is None else attack(port, count, seed)
        num_bad += len(findings.bad)
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(findings.statuses.items(), key=str))
        print(f"{model}: {count} requests in {time.monotonic() - start:.0f} s: {counts}")
        print(f"  slowest {findings.slowest_s:.1f} s; findings: {len(findings.bad)}")
        for path in sorted({path for path, _ in findings.by_path}):
            parts = [(status, count) for (other, status), count in findings.by_path.items() if other == path]
            print(f"  {path}: " + ", ".join(f"{status}: {count}" for status, count in sorted(parts, key=str)))
        for bad in findings.bad[:20]:
            print("FOUND", bad)
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
