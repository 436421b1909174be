"""A flow of stages that can be stopped anywhere and goes on where it was.

A stage is some commands, run one after the other, perhaps while a server runs. It is done when its outputs exist and
its fingerprint (commands and content of its input files) is the one it was done with. A stage that was interrupted is
run again in the folder it left, so a program that resumes by itself does; if the fingerprint has changed in between,
the folder is emptied first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from steerlm_nemo.errors import InputError, SteerLMError
from steerlm_nemo.ranks import die_with_parent
from steerlm_nemo.records import atomic_output

SERVER_START_S = 300.0
STOP_GRACE_S = 70.0  # more than the ranks of a training get to save
LAST_LINES = 20
STATE_FILE = "state.json"
PORT = "{port}"  # in a command: the port of the stage's server


class StageError(SteerLMError):
    """A command of a stage failed; the message has its last lines and names its log."""

    exit_code = 1


@dataclass(frozen=True)
class Stage:
    """`folder` belongs to this stage alone and is the working place of its commands; outputs lie in it.

    `server` is a command that serves on `{port}` (GET /health) while the commands run; it is timed as a stage of its
    own, `server_name`.
    """

    name: str
    folder: Path
    commands: Sequence[Sequence[str]]
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    server: Sequence[str] = ()
    server_name: str = ""

    def fingerprint(self) -> str:
        """Hash of the commands and of every input's content. Raises InputError if an input is missing."""
        digest = hashlib.sha256(json.dumps([list(map(list, self.commands)), list(self.server)]).encode())
        for path in self.inputs:
            if not path.is_file():
                raise InputError(f"{path}: no such file; stage {self.name} needs it")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digest.update(b"\x00")
        return digest.hexdigest()[:16]


class Flow:
    """Runs stages in order. Keeps `state.json` and `logs/` in its folder."""

    def __init__(self, folder: Path, show: IO[str] = sys.stdout) -> None:
        self._folder = folder
        self._show = show
        self._state_file = folder / STATE_FILE
        self._state: dict[str, dict[str, Any]] = {}
        if self._state_file.is_file():
            self._state = json.loads(self._state_file.read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = {}  # per stage in order, attempts that were interrupted included

    def run(self, stage: Stage) -> None:
        """Run the stage unless it is done.

        Raises:
            StageError: a command failed.
            InputError: the stage's folder holds something else.
            KeyboardInterrupt: after every process of the stage has ended.
        """
        fingerprint = stage.fingerprint()
        entry = self._state.get(stage.name)
        if entry is None and stage.folder.exists():
            raise InputError(
                f"{stage.folder} is there, but no earlier run made it; stage {stage.name} would clear it. "
                "Give another output folder, or move it away."
            )
        if entry is not None and entry["fingerprint"] == fingerprint:
            if entry["done"] and all(path.is_file() for path in stage.outputs):
                self.seconds |= entry["seconds"]
                self._print(f"[{stage.name}] done before ({sum(entry['seconds'].values()):.0f} s)")
                return
        else:
            shutil.rmtree(stage.folder, ignore_errors=True)
            entry = {"fingerprint": fingerprint, "seconds": {}}
        entry["done"] = False
        self._state[stage.name] = entry
        self._save()  # before the folder, which is known as ours by it
        stage.folder.mkdir(parents=True, exist_ok=True)
        self._print(f"[{stage.name}] ...")
        try:
            self._work(stage, entry["seconds"])
            if missing := [path for path in stage.outputs if not path.is_file()]:
                raise StageError(f"stage {stage.name} ended without writing {missing[0]}. Log: {self.log(stage.name)}")
            entry["done"] = True
        finally:
            self._save()
        self.seconds |= entry["seconds"]
        self._print(f"[{stage.name}] {sum(entry['seconds'].values()):.1f} s")

    def log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _work(self, stage: Stage, seconds: dict[str, float]) -> None:
        for name in filter(None, (stage.name, stage.server_name)):
            self.log(name).unlink(missing_ok=True)
        if not stage.server:
            with _timed(seconds, stage.name):
                self._commands(stage, port=0)
            return
        port = _free_port()
        with contextlib.ExitStack() as running:
            with _timed(seconds, stage.server_name):
                server = running.enter_context(self._process(stage.server, port, stage.server_name))
                self._wait_until_healthy(server, port, stage)
            with _timed(seconds, stage.name):
                self._commands(stage, port)

    def _commands(self, stage: Stage, port: int) -> None:
        for command in stage.commands:
            with self._process(command, port, stage.name) as process:
                code = self._watch(process, stage.name)
            if code != 0:
                raise StageError(
                    f"stage {stage.name} failed with exit code {code}: {_shell(command, port)}\n"
                    f"{self._last_lines(stage.name)}\nLog: {self.log(stage.name)}"
                )

    @contextlib.contextmanager
    def _process(self, command: Sequence[str], port: int, log_name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process that has ended when the block has. Its own session: only we pass signals on, once."""
        argv = [part.replace(PORT, str(port)) for part in command]
        log = self.log(log_name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {_shell(command, port)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent
            )
            try:
                yield process
            finally:
                _stop(process)

    def _watch(self, process: subprocess.Popen[bytes], name: str) -> int:
        """Wait for the end, showing the newest line of the log now and then."""
        live = self._show.isatty()
        started = shown = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=1.0)
                if live:
                    self._show.write("\r\033[K")
                return code
            if live or time.monotonic() - shown >= 10:
                shown = time.monotonic()
                line = f"  {shown - started:4.0f} s  {self._newest_line(name)}"
                self._show.write(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}" if live else line + "\n")
                self._show.flush()

    def _wait_until_healthy(self, server: subprocess.Popen[bytes], port: int, stage: Stage) -> None:
        deadline = time.monotonic() + SERVER_START_S
        while not _healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                why = "ended" if server.poll() is not None else f"did not answer within {SERVER_START_S:.0f} s"
                raise StageError(
                    f"stage {stage.name}: the server {why}: {_shell(stage.server, port)}\n"
                    f"{self._last_lines(stage.server_name)}\nLog: {self.log(stage.server_name)}"
                )
            time.sleep(0.2)

    def _newest_line(self, name: str) -> str:
        lines = self._log_lines(name)
        return lines[-1] if lines else ""

    def _last_lines(self, name: str) -> str:
        return "\n".join(f"  | {line}" for line in self._log_lines(name)[-LAST_LINES:])

    def _log_lines(self, name: str) -> list[str]:
        with self.log(name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode("utf-8", errors="replace")
        # A progress bar overwrites its line: of each only the last state is worth showing.
        return [line.rstrip("\r").split("\r")[-1] for line in text.split("\n") if line.strip()]

    def _save(self) -> None:
        with atomic_output(self._state_file) as file:
            file.write(json.dumps(self._state, indent=1) + "\n")

    def _print(self, line: str) -> None:
        print(line, file=self._show, flush=True)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's duration, also when it is interrupted."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and wait; one that does not leave in time is killed with all it started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # in time, too late, or Ctrl-C once more
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _shell(command: Sequence[str], port: int) -> str:
    return " ".join(part.replace(PORT, str(port)) for part in command)
