"""Commands and servers as processes that have logs, show their progress and never outlive their block."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.pipeline.flow import Server
from steerlm_nemo.pipeline.launcher import Launcher, Size
from steerlm_nemo.ranks import die_with_parent

SERVER_START_S = 1800.0  # a 70B model takes its time to load
STOP_GRACE_S = 70.0  # more than the ranks of a training get to save
QUIET_S = 10.0  # between two lines of progress where there is no terminal
LAST_LINES = 20
EXIT_STOPPED_EARLY = 75  # of a training that saved and goes on with the same command
EXIT_TERMINATED = 128 + signal.SIGTERM  # of a program that needs no goodbye


class StageError(SteerLMError):
    """A command of a stage failed; the message has its last lines and names its log, the exit code is the command's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedEarlyError(StageError):
    """A command was stopped in time, by a signal or its time limit, and the same flow goes on."""


_stop_requested = threading.Event()


def stop_like_ctrl_c() -> None:
    """Let SIGTERM, too, end the commands and servers; and a shell that starts us in the background ignores SIGINT."""

    def stop(number: int, frame: object) -> None:
        _stop_requested.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _raise_if_stopped() -> None:
    # Python drops what a handler raises inside the callbacks around a fork, and a process is started with some.
    if _stop_requested.is_set():
        raise KeyboardInterrupt


class Processes:
    """Runs commands; `folder` gets their logs, `show` their progress."""

    def __init__(self, folder: Path, launcher: Launcher, show: IO[str]) -> None:
        self._folder = folder
        self._launcher = launcher
        self._show = show

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def run(self, command: Sequence[str], size: Size, ports: Mapping[str, int], log_name: str) -> None:
        """Run a command to its end. Raises StageError or StoppedEarlyError if that is not exit code 0."""
        with self._process(command, size, ports, log_name) as process:
            code = _exit_code(self._watch(process, log_name))
        if code == 0:
            return
        what = f"exit code {code} of: {self._shell(command, size, ports)}"
        if code in (EXIT_STOPPED_EARLY, EXIT_TERMINATED):
            raise StoppedEarlyError(f"stopped early, the same command goes on; {what}", EXIT_STOPPED_EARLY)
        raise StageError(f"{what}\n{self._last_lines(log_name)}", code)

    def run_in_sight(self, command: Sequence[str], size: Size) -> int:
        """Run a command on the terminal; returns its exit code."""
        with self._process(command, size, {}, None) as process:
            return _exit_code(process.wait())

    @contextlib.contextmanager
    def serving(self, server: Server, port: int, log_name: str) -> Iterator[None]:
        """The server, healthy when the block begins and gone when it ends. Raises StageError if it does not start."""
        ports = {server.name: port}
        with self._process(server.command, server.size, ports, log_name) as process:
            deadline = time.monotonic() + SERVER_START_S
            progress = _Progress(self._show)
            while not _healthy(port):
                _raise_if_stopped()
                if process.poll() is not None or time.monotonic() > deadline:
                    why = "ended" if process.poll() is not None else f"did not answer within {SERVER_START_S:.0f} s"
                    command = self._shell(server.command, server.size, ports)
                    raise StageError(f"the server {why}: {command}\n{self._last_lines(log_name)}")
                progress.update(self._newest_line(log_name))
                time.sleep(0.2)
            progress.clear()
            yield

    @contextlib.contextmanager
    def _process(
        self, command: Sequence[str], size: Size, ports: Mapping[str, int], log_name: str | None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process that has ended when the block has. Its own session: only we pass signals on, once."""
        _raise_if_stopped()
        argv = [with_ports(word, ports) for word in self._launcher.argv(command, size)]
        with contextlib.ExitStack() as stack:
            file = None
            if log_name is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(self.log(log_name).open("ab"))
                file.write(f"$ {shlex.join(argv)}\n".encode())
                file.flush()
            process = subprocess.Popen(
                argv,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            try:
                yield process
            finally:
                self._stop(process)

    def _watch(self, process: subprocess.Popen[bytes], log_name: str) -> int:
        """Wait for the end, showing the newest line of the log now and then."""
        progress = _Progress(self._show)
        while True:
            _raise_if_stopped()
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=1.0)
                progress.clear()
                return code
            progress.update(self._newest_line(log_name))

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """End the process and wait; one that does not leave in time is killed with all it started."""
        if process.poll() is not None:
            return
        process.send_signal(self._launcher.stop_signal)
        try:
            process.wait(timeout=STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # in time, too late, or Ctrl-C once more
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _shell(self, command: Sequence[str], size: Size, ports: Mapping[str, int]) -> str:
        return shlex.join(with_ports(word, ports) for word in self._launcher.argv(command, size))

    def _newest_line(self, log_name: str) -> str:
        lines = self._log_lines(log_name)
        return lines[-1] if lines else ""

    def _last_lines(self, log_name: str) -> str:
        shown = [f"  | {line}" for line in self._log_lines(log_name)[-LAST_LINES:]]
        return "\n".join([*shown, f"Log: {self.log(log_name)}"])

    def _log_lines(self, log_name: str) -> list[str]:
        with self.log(log_name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode("utf-8", errors="replace")
        # A progress bar overwrites its line: of each only the last state is worth showing.
        return [line.rstrip("\r").split("\r")[-1] for line in text.split("\n") if line.strip()]


class _Progress:
    """One line that is overwritten on a terminal; elsewhere a line every QUIET_S."""

    def __init__(self, show: IO[str]) -> None:
        self._show = show
        self._live = show.isatty()
        self._started = self._shown = time.monotonic()

    def update(self, text: str) -> None:
        if not self._live and time.monotonic() - self._shown < QUIET_S:
            return
        self._shown = time.monotonic()
        line = f"  {self._shown - self._started:4.0f} s  {text}"
        width = shutil.get_terminal_size().columns - 1
        self._show.write(f"\r\033[K{line[:width]}" if self._live else line + "\n")
        self._show.flush()

    def clear(self) -> None:
        if self._live:
            self._show.write("\r\033[K")


def with_ports(word: str, ports: Mapping[str, int]) -> str:
    for name, port in ports.items():
        word = word.replace(f"{{{name}.port}}", str(port))
    return word


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
