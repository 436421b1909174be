"""A `.nemo` served by the command that people type, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from repository import ROOT


def serve_command(nemo: Path, *settings: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/megatron_gpt_eval.py"), f"gpt_model_file={nemo}", *settings]


@contextmanager
def served(nemo: Path, *settings: str, timeout_s: float = 300) -> Iterator[str]:
    """Yields http://127.0.0.1:PORT once it serves; afterwards the server has ended, with exit code 0, or this fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            serve_command(nemo, "server=True", f"port={port}", *settings), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait(url, server, log, time.monotonic() + timeout_s)
            yield url
        finally:
            server.terminate()
            code = server.wait(timeout=90)
        assert code == 0, _said(log)


def _wait(url: str, server: subprocess.Popen[bytes], log, deadline: float) -> None:  # type: ignore[no-untyped-def]
    while True:
        assert server.poll() is None, _said(log)
        assert time.monotonic() < deadline, f"not ready in time:\n{_said(log)}"
        try:
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)


def _said(log) -> str:  # type: ignore[no-untyped-def]
    log.seek(0)
    return log.read()[-4000:]
