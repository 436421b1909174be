"""Keep 16 clients at a server: `python soak.py PORT MINUTES`; prints memory, errors and latency as time goes on.

Every client sends what people send, one request after the other: generations, chats or annotations where the model can,
streams, streams given up half-way, and now and then nonsense. Ends by itself; exit code 1 if anything went wrong.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

CLIENTS = 16
MAX_GROWTH = 0.05  # of the memory after the first fifth of the time


@dataclass
class Record:
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds) of whole answers
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # (when, MiB)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(number: int, url: str, can_chat: bool, can_grade: bool, until: float, record: Record) -> None:
    chance = random.Random(number)
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:
        while time.monotonic() < until:
            start = time.monotonic()
            try:
                status = _one(http, chance, can_chat, can_grade)
                problem = None if status < 500 and status != 400 else f"status {status}"
            except httpx.HTTPError as err:
                problem = repr(err)
            with record.lock:
                record.latencies.append((start, time.monotonic() - start))
                if problem:
                    record.errors.append(problem)


def _one(http: httpx.Client, chance: random.Random, can_chat: bool, can_grade: bool) -> int:
    words = " ".join(chance.choice(("tell", "me", "dog", "speak", "and", "now")) for _ in range(chance.randint(1, 20)))
    kind = chance.random()
    if kind < 0.05:
        return 200 if http.put("/generate", json={"sentences": words}).status_code == 400 else 500
    if kind < 0.35 and can_chat:
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": 24, "temperature": chance.random()}
        return http.post("/v1/chat/completions", json=body).status_code
    if kind < 0.35 and can_grade:
        messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "bad dry hello"}]
        return http.post("/v1/annotate", json={"conversations": [{"messages": messages}]}).status_code
    if kind < 0.7:
        body = {"prompt": words, "max_tokens": chance.randint(1, 40), "stream": True}
        leaves = chance.random() < 0.3
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if leaves and line:
                    break
            return answer.status_code
    sentences = [words, words[::-1]][: chance.randint(1, 2)]
    return http.put("/generate", json={"sentences": sentences, "tokens_to_generate": chance.randint(1, 40)}).status_code


def _memory_mib(http: httpx.Client) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return samples["process_resident_memory_bytes"] / 2**20


def main() -> None:
    port, minutes = int(sys.argv[1]), float(sys.argv[2])
    url = f"http://127.0.0.1:{port}"
    start = time.monotonic()
    until = start + minutes * 60
    record = Record()
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        kind = http.get("/v1/models").json()["data"][0]["kind"]
        arguments = (url, kind == "steerlm", kind == "grader", until, record)
        clients = [threading.Thread(target=client, args=(number, *arguments)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        while time.monotonic() < until:
            time.sleep(min(10, max(until - time.monotonic(), 0.1)))
            record.memory.append((time.monotonic(), _memory_mib(http)))
        for thread in clients:
            thread.join()
    settled = [mib for when, mib in record.memory if when > start + minutes * 12] or [record.memory[-1][1]]
    growth = settled[-1] / settled[0] - 1
    print(f"{len(record.latencies)} requests in {minutes:g} min, {len(record.errors)} errors {record.errors[:5]}")
    print(f"memory {settled[0]:.1f} -> {settled[-1]:.1f} MiB: {growth:+.2%} ({', '.join(f'{m:.0f}' for m in settled)})")
    for name, low, high in (("first half", start, start + minutes * 30), ("second half", start + minutes * 30, until)):
        seconds = sorted(taken for when, taken in record.latencies if low <= when < high)
        if seconds:
            p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
            print(f"{name}: {len(seconds)} requests, p50 {p50:.3f} s, p99 {p99:.3f} s")
    sys.exit(1 if record.errors or growth > MAX_GROWTH else 0)


if __name__ == "__main__":
    main()
