"""One client of one or several servers of the same model: `--endpoints a:1424,b:1424`. The only place with retries.

Every server has a bounded number of requests under way. One that cannot be reached is left alone for a growing pause,
its work goes to the others, and it is tried again, one request at a time. What fails otherwise (500, a time-out, an
answer cut short) is that request's own failure and is sent again a bounded number of times.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from steerlm_nemo.client.server import (
    Generation,
    RequestRefusedError,
    ServedLine,
    ServerClient,
    UnreachableError,
    require_ability,
)
from steerlm_nemo.errors import FormatMismatchError, InputError, ServerError
from steerlm_nemo.model_kind import SteerLMFormat

FIRST_PAUSE_S = 0.5  # before a request is sent again, or a server tried again; then twice as long each time
LONGEST_PAUSE_S = 30.0

_T = TypeVar("_T")


@dataclass
class _Server:
    client: ServerClient
    num_in_flight: int = 0
    num_failures: int = 0  # in a row, of reaching it
    again_at: float = 0.0  # monotonic seconds; before that nobody asks it
    failed_at: float = 0.0
    last_error: str = ""
    known: bool = False  # it serves the run's model, as far as it tells; to be asked anew after it was away


@dataclass
class ServerPool:
    """Servers that must serve one model. May be shared by threads.

    addresses: host and port of each. in_flight: requests under way at a time, per server. retries: how often one
    request is sent again, and how often a server that is away is tried before it counts as gone.
    """

    addresses: Sequence[tuple[str, int]]
    timeout_s: float = 600.0
    retries: int = 8
    in_flight: int = 8
    num_retries: int = 0
    identity: str | None = None  # of the served model; None where no server tells
    _format: SteerLMFormat | None = None
    _began_at: str | None = None  # the server that the others are compared with
    _servers: list[_Server] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        if len(set(self.addresses)) < len(self.addresses):
            raise InputError(f"--endpoints names a server twice: {self.where}")
        self._servers = [_Server(ServerClient(host, port, self.timeout_s)) for host, port in self.addresses]

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.client.close()

    @property
    def where(self) -> str:
        return ", ".join(f"http://{host}:{port}" for host, port in self.addresses)

    @property
    def num_requests(self) -> int:
        return sum(server.client.num_requests for server in self._servers)

    def format(self) -> SteerLMFormat | None:
        """Template and schema that all servers have; None if they tell none, as NeMo's own. Sets `identity`.

        A server that is away now is named on stderr and is checked when it comes.

        Raises:
            ServerError: no server can be reached.
            InputError: two servers do not serve the same.
        """
        # The first question of every run: a wrong port should show in seconds, not after all the patience of a run.
        for attempt in range(min(self.retries, 2) + 1):
            if attempt:
                time.sleep(_pause_s(attempt - 1))
            away = [error for server in self._servers if (error := self._meet(server)) is not None]
            if len(away) < len(self._servers):
                for error in away:
                    print(f"WARNING: {error} The others begin without it.", file=sys.stderr)
                return self._format
        raise UnreachableError("\n".join(away))

    def require_format(self, ability: str) -> SteerLMFormat:
        """As `format`, but only for a model that can do this. Raises InputError naming what is served instead."""
        return require_ability(self.format(), ability, self.where)

    def attribute_lines(
        self,
        prompts: Sequence[str],
        given: Sequence[Mapping[str, str | int]] | None = None,
        home: int = 0,
        *,
        beliefs: bool = True,
    ) -> list[ServedLine] | None:
        """As `ServerClient.attribute_lines`. Requests of one `home` go to one server where possible: what they have in
        common with those before is in its cache."""
        return self._ask(lambda client: client.attribute_lines(prompts, given, beliefs=beliefs), home)

    def generate(self, sentences: Sequence[str], home: int = 0, **settings: Any) -> Generation:
        """As `ServerClient.generate`; `home` as above."""
        return self._ask(lambda client: client.generate(sentences, **settings), home)

    def is_ready(self) -> bool:
        """Is there a server whose GET /health answers now?"""
        return any(server.client.is_ready() for server in self._servers)

    def _ask(self, ask: Callable[[ServerClient], _T], home: int) -> _T:
        attempt = 0
        failed: _Server | None = None
        while True:
            server = self._take(home, failed)
            begun = time.monotonic()
            try:
                if not server.known and (error := self._meet(server)) is not None:
                    raise UnreachableError(error)
                answer = ask(server.client)
            except RequestRefusedError:
                self._give_back(server, reached=True)
                raise
            except UnreachableError as err:
                self._give_back(server, reached=False, begun=begun, error=str(err))
                with self._changed:
                    self._raise_if_all_are_gone()
                    self.num_retries += 1
            except ServerError as err:
                self._give_back(server, reached=True)
                if attempt == self.retries:
                    raise type(err)(f"{err} ({attempt + 1} tries)" if attempt else str(err)) from err
                with self._changed:
                    self.num_retries += 1
                time.sleep(_pause_s(attempt))
                attempt += 1
                failed = server
            except BaseException:
                self._give_back(server, reached=True)
                raise
            else:
                self._give_back(server, reached=True)
                return answer

    def _take(self, home: int, failed: _Server | None) -> _Server:
        """A server with room: the home, or the one with least to do, rather not `failed`. Waits until there is one.

        Raises UnreachableError when another thread has found that all are gone.
        """
        with self._changed:
            while True:
                self._raise_if_all_are_gone()
                now = time.monotonic()
                free = [s for s in self._servers if s.again_at <= now and s.num_in_flight < self.in_flight]
                if free:
                    at_home = self._servers[home % len(self._servers)]
                    others = [s for s in free if s is not failed] or free
                    server = at_home if at_home in others else min(others, key=lambda s: s.num_in_flight)
                    if server.num_failures:  # one request finds out whether it is back; the others wait or go elsewhere
                        server.again_at = now + _pause_s(server.num_failures)
                    server.num_in_flight += 1
                    return server
                wake_at = min((s.again_at for s in self._servers if s.again_at > now), default=None)
                self._changed.wait(None if wake_at is None else wake_at - now)

    def _give_back(self, server: _Server, *, reached: bool, begun: float = 0.0, error: str = "") -> None:
        with self._changed:
            server.num_in_flight -= 1
            if reached:
                if server.num_failures:
                    _say(f"{server.client.where} is back")
                server.num_failures, server.again_at = 0, 0.0
            elif begun >= server.failed_at:  # requests that were under way together fail together: once
                server.failed_at = time.monotonic()
                server.again_at = server.failed_at + _pause_s(server.num_failures)
                server.num_failures += 1
                if server.num_failures == 1 and self.retries:
                    patience_s = sum(_longest_pause_s(attempt) for attempt in range(self.retries))
                    _say(f"WARNING: {error} It is asked again for up to {patience_s:.0f} s.")
                server.last_error = error
                server.known = False
            self._changed.notify_all()

    def _raise_if_all_are_gone(self) -> None:
        if all(server.num_failures > self.retries for server in self._servers):
            tries = f" ({self.retries + 1} tries)" if self.retries else ""
            raise UnreachableError("\n".join(server.last_error + tries for server in self._servers))

    def _meet(self, server: _Server) -> str | None:
        """Ask a server what it serves. Returns why it cannot be reached, or None.

        Raises:
            InputError: it serves something else than the run began with.
        """
        try:
            found = server.client.format()
        except RequestRefusedError:
            raise
        except ServerError as err:
            return str(err)
        with self._changed:
            if self._began_at is None:
                self._began_at, self._format, self.identity = server.client.where, found, server.client.identity
            if (found is None) != (self._format is None) or server.client.identity != self.identity:
                raise InputError(
                    f"the servers do not serve one model: {server.client.where} serves "
                    f"{server.client.identity or 'a model it does not name'}, but the run began with "
                    f"{self.identity or 'a model that was not named'} at {self._began_at}. Serve the same .nemo "
                    "everywhere and run again."
                )
            if found is not None and self._format is not None:
                try:
                    self._format.require_same(found, self._began_at, server.client.where)
                except FormatMismatchError as err:
                    raise InputError(str(err)) from err
            server.known = True
        return None


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above a progress bar, if there is one


def _pause_s(attempt: int) -> float:
    """Growing, and spread out: or all the threads that failed together would come back together."""
    return _longest_pause_s(attempt) * random.uniform(0.5, 1.0)


def _longest_pause_s(attempt: int) -> float:
    return min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)


def parse_endpoints(text: str) -> list[tuple[str, int]]:
    """`a:1424,b:1424` -> hosts and ports. Raises InputError."""
    found = []
    for item in text.split(","):
        host, colon, port = item.strip().rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"--endpoints: {item!r} is not HOST:PORT, such as localhost:1424")
        found.append((host, int(port)))
    return found
