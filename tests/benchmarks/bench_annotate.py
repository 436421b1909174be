"""The annotator's own cost: threads per second against a server that answers at once.

The reference's client sends one value per request and one request at a time, on a connection of its own each. Ours is
the whole command, start included. The limit is what one process gets through the same socket doing nothing else: our
requests, made beforehand, over connections kept open.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from side_by_side import Run, in_turns, report, timed

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3
NUM_THREADS = {"reference client": 40, "ours": 2000}  # a repeat; the reference client's rate needs no more
NUM_CLIENTS = 8
SYSTEM = "A chat between a curious user and an artificial intelligence assistant.\n\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        server = subprocess.Popen([sys.executable, __file__, "serve", str(port)])
        try:
            wait_for(port)
            measure(Path(name), port)
        finally:
            server.terminate()
            server.wait()


def measure(folder: Path, port: int) -> None:
    source = folder / "in.jsonl"
    made = records(NUM_THREADS["ours"])
    source.write_text("".join(json.dumps(record) + "\n" for record in made))

    def ours(batch_size: int) -> Run:
        command = [sys.executable, ROOT / "scripts/attribute_annotate.py", f"--input_file_name={source}"]
        command += [f"--output_file_name={folder / 'out.jsonl'}", f"--port_num={port}", "--host=127.0.0.1"]
        command.append(f"--batch_size={batch_size}")
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    bodies = [json.dumps({"prompts": [prompt]}).encode() for record in made for prompt in prompts(record)]

    def limit() -> Run:
        def send(mine: list[bytes]) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for body in mine:
                connection.request("POST", "/v1/attribute_lines", body, {"Content-Type": "application/json"})
                connection.getresponse().read()

        def everybody() -> None:
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                list(pool.map(send, [bodies[place::NUM_CLIENTS] for place in range(NUM_CLIENTS)]))

        return timed(everybody)

    runs = in_turns(
        {
            "reference client": lambda: timed(
                lambda: [reference(r, port) for r in made[: NUM_THREADS["reference client"]]]
            ),
            "ours, batch size 1": lambda: ours(1),
            "ours, batch size 8": lambda: ours(8),
            "requests of batch size 1 alone": limit,
        },
        REPEATS,
    )
    rate = {name: NUM_THREADS["ours"] / contestant.seconds for name, contestant in runs.items()}
    rate["reference client"] *= NUM_THREADS["reference client"] / NUM_THREADS["ours"]
    report(
        "annotate",
        runs,
        {
            "turns per thread": 2,
            **{f"{name}, threads/s": value for name, value in rate.items()},
            "ours against the reference client, batch size 1": rate["ours, batch size 1"] / rate["reference client"],
            "ours against the requests alone, batch size 1": rate["ours, batch size 1"]
            / rate["requests of batch size 1 alone"],
        },
    )


def records(count: int) -> list[dict[str, Any]]:
    """Two responses each, of 120 words; four threads share their first two turns at a time."""
    chance = random.Random(1)
    words = (
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "zorps",
        "watch",
        "from hills",
    )

    def turn(speaker: str, length: int) -> dict[str, str]:
        return {"value": " ".join(chance.choice(words) for _ in range(length)), "from": speaker}

    made = []
    for number in range(count):
        if number % 4 == 0:
            start = [turn("User", 40), turn("Assistant", 120)]
        turns = [*start, turn("User", 20), turn("Assistant", 120)]
        made.append({"conversations": turns, "system": SYSTEM, "mask": "User", "type": "TEXT_TO_VALUE"})
    return made


def prompts(record: dict[str, Any]) -> list[str]:
    """What is asked about the two responses."""
    text, found = f"\x00System\n{SYSTEM}\n", []
    for turn in record["conversations"]:
        text += f"\x11{turn['from']}\n{turn['value']}\n"
        if turn["from"] == "Assistant":
            found.append(text + "\x12")
            text += f"\x12{LINE}\n"
    return found


def reference(record: dict[str, Any], port: int) -> None:
    """Grade the responses as the reference's client does its turns: 13 requests each."""
    import requests

    for prompt in prompts(record):
        line: list[str] = []
        for item in LINE.split(","):
            key = item.partition(":")[0]
            body = {"sentences": [prompt + ",".join([*line, f"{key}:"])], "tokens_to_generate": 1, "greedy": True}
            answer = requests.put(f"http://127.0.0.1:{port}/generate", json=body).json()
            line.append(f"{key}:{answer['sentences'][0].rpartition(':')[2]}")
        assert ",".join(line) == LINE


LINE = (
    "quality:1,toxicity:1,humor:1,creativity:1,violence:1,helpfulness:1,not_appropriate:1,hate_speech:1,"
    "sexual_content:1,fails_task:1,political_content:1,moral_judgement:1,lang:en"
)


def serve(port: int) -> None:
    """A server without a model: every value is 1."""
    import uvicorn

    from steerlm_nemo.attributes import NEMO12_LANG
    from steerlm_nemo.model_kind import GRADER, SteerLMFormat
    from steerlm_nemo.template import ChatTemplate

    served = SteerLMFormat(ChatTemplate(), NEMO12_LANG, GRADER).to_dict() | {"identity": "none"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        answer: dict[str, Any] = {"ready": True}
        if scope["path"] == "/v1/attribute_lines":
            count = len(json.loads(body)["prompts"])
            answer = {"lines": [LINE] * count, "num_overruled": [0] * count, "model": "none"}
        elif scope["path"] == "/v1/attributes":
            answer = served
        elif scope["path"] == "/generate":
            sentences = json.loads(body)["sentences"]
            answer = {"sentences": [text + ("en" if text.endswith("lang:") else "1") for text in sentences]}
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", lifespan="off")


def wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]))
    else:
        main()
