"""A model's own chat template, rendered in a process that may do nothing else (`sandbox`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_nemo.errors import InputError

SECONDS = 5  # of work for one conversation; genuine templates need a thousandth of one
MEGABYTES = 512
_PATIENCE_S = 60  # for an answer, on a machine that is busy with other things
_SANDBOX = Path(__file__).with_name("sandbox.py")
# What a Python needs to find its libraries, and a template to tell the time. No token, no key.
_ENVIRONMENT = ("HOME", "PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")


class TooLongError(InputError):
    """The rendered text would be longer than asked for."""


class Renderer:
    """One process, started at once and again after a request that ended it; threads take turns.

    Raises:
        InputError: the template is no Jinja, or takes too much to be read.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._start()

    def render(self, variables: Mapping[str, Any], most: int) -> str:
        """The text, of at most `most` characters.

        Raises:
            InputError: the template refuses these variables, in its own words, or fails on them.
            TooLongError: the text is longer.
        """
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            answer = self._ask({"variables": variables, "most": most})
        if "refused" in answer:
            raise InputError(f"the model's chat template refuses this conversation: {answer['refused']}")
        if "failed" in answer:
            raise InputError(f"the model's chat template fails on this conversation: {answer['failed']}")
        if "longer" in answer:
            raise TooLongError(f"the rendered conversation has more than {most} characters")
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the server, which finishes its requests first
        )
        answer = self._ask({"source": self._source, "megabytes": MEGABYTES, "seconds": SECONDS})
        if "failed" in answer:
            self.close()
            raise InputError(f"the model's chat template cannot be used: {answer['failed']}")

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        overdue = threading.Timer(_PATIENCE_S, process.kill)
        overdue.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            overdue.cancel()
        if line.endswith(b"\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        return {"failed": f"it was ended, having worked for {SECONDS} s or used more than {MEGABYTES} MB"}
