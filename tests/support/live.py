"""Real servers on real sockets for the tests: our API in this process or in one of its own, and a faulty proxy."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import tiny_world
import uvicorn
from hf_engine import HFEngine
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from steerlm_nemo.compat.http_server import JsonProtocol
from steerlm_nemo.config import load_config
from steerlm_nemo.engine.protocol import Engine
from steerlm_nemo.engine.watch import patience_from
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.app import build_app
from steerlm_nemo.serving.front_door import HttpSettings, settings_from
from steerlm_nemo.serving.listener import open_listener

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@functools.cache
def model_folder(record_type: str | None) -> Path:
    """A tiny model trained for `record_type`, or a random one for None; made once per test run."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-")) / (record_type or "random")
    served = tiny_world.make_model(folder, record_type, steps=220)
    (folder / "format.json").write_text(json.dumps(served.to_dict()))
    return folder


@functools.cache
def engine(record_type: str | None) -> HFEngine:
    folder = model_folder(record_type)
    return HFEngine.load(folder, SteerLMFormat.from_dict(json.loads((folder / "format.json").read_text())))


@contextmanager
def run_app(app: Any, port: int = 0) -> Iterator[int]:
    """The app on a port of this machine, a free one if none is given, in a thread of this process."""
    listener = open_listener(port)
    config = uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=5, http=JsonProtocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def server_config() -> DictConfig:
    return load_config(["gpt_model_file=x.nemo"], "megatron_gpt_inference")


def http(**changes: object) -> HttpSettings:
    """The settings that a server has where its config is left as it is, but for these; the token is not looked up."""
    return replace(settings_from(server_config().http), **{"token": None, **changes})  # type: ignore[arg-type]


def app(engine: Engine, **options: object) -> Starlette:
    """As the server builds it from its config, but for these options of `build_app`."""
    config = server_config().engine
    defaults = {"http": http(), "max_batch_rows": config.max_batch_rows, "patience": patience_from(config)}
    return build_app(engine, **{**defaults, **options})  # type: ignore[arg-type]


@contextmanager
def run_engine(engine: Engine, **options: object) -> Iterator[int]:
    with run_app(app(engine, **options)) as port:
        yield port


class ServerProcess:
    """The tiny value model behind `serve` in its own process, to be killed and started again on the same port."""

    def __init__(self, folder: Path, port: int, pause_s: float = 0) -> None:
        script = Path(__file__).with_name("serve_hf.py")
        self._command = [sys.executable, str(script), str(folder), str(port), str(pause_s)]
        self.port = port

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_quietly(self) -> None:
        """The same, what it says going to a file: a pipe that nobody reads would stop it in the end."""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, text=True)

    def log(self) -> str:
        """What a quiet server has said."""
        self._log.seek(0)
        return self._log.read()

    def wait_ready(self) -> None:
        while True:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False)
                return
            except httpx.TransportError:
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class FaultyProxy:
    """Passes requests on, but answers a share of the model calls with one of the faults that networks really have."""

    def __init__(self, port: int, share: float, seed: int = 0) -> None:
        self._target = f"http://127.0.0.1:{port}"
        self._share = share
        self._chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.app = Starlette(routes=[Route("/{path:path}", self._pass_on, methods=["GET", "PUT", "POST"])])

    async def _pass_on(self, request: Request) -> Response:
        body = await request.body()
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.request(
                request.method,
                self._target + request.url.path,
                content=body,
                headers={"content-type": "application/json"},
            )
        if request.url.path not in ("/generate", "/v1/attribute_lines") or self._chance.random() >= self._share:
            return Response(answer.content, answer.status_code, media_type="application/json")
        fault = self._chance.choice(("500", "502 html", "cut json", "broken connection", "timeout", "other json"))
        self.faults[fault] += 1
        if fault == "500":
            return Response('{"message": "Internal Server Error"}', 500, media_type="application/json")
        if fault == "502 html":
            return Response("<html>Bad Gateway</html>", 502, media_type="text/html")
        if fault == "cut json":
            return Response(answer.content[: len(answer.content) // 2], media_type="application/json")
        if fault == "other json":
            return Response('{"sentences": []}', media_type="application/json")
        if fault == "timeout":
            await asyncio.sleep(4.5)  # the tests' clients wait for three seconds
            return Response(answer.content, media_type="application/json")

        async def broken() -> AsyncIterator[bytes]:
            yield answer.content[:10]
            raise ConnectionResetError

        promised = {"content-length": str(len(answer.content))}
        return StreamingResponse(broken(), headers=promised, media_type="application/json")
