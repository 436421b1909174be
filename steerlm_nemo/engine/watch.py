"""Forward passes that do not end: seen while they last, and given up in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.errors import ConfigError

TICK_S = 0.25


@dataclass(frozen=True)
class Patience:
    """How long a forward pass may take; `engine` of nemo_configs/megatron_gpt_inference.yaml has the defaults."""

    stall_s: float  # then the server says that it is not ready
    give_up_s: float  # then it ends


def patience_from(config: Any) -> Patience:
    """Check the two keys of the `engine` section.

    Raises:
        ConfigError: every value that cannot be, together.
    """
    problems = [
        f"engine.{key} is {config[key]!r}; it must be a number of seconds greater than 0"
        for key in ("stall_s", "give_up_s")
        if isinstance(config[key], bool) or not isinstance(config[key], (int, float)) or not config[key] > 0
    ]
    if not problems and config.give_up_s < config.stall_s:
        problems.append(
            f"engine.give_up_s is {config.give_up_s} and engine.stall_s {config.stall_s}; a server stalls before it "
            "gives up: raise give_up_s, or lower stall_s"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return Patience(float(config.stall_s), float(config.give_up_s))


class Watch:
    """Counts, in a thread of its own, the seconds since something last went on.

    Only seconds in which this process ran itself count: one that was stopped and continued has seen nobody hang. So a
    tick counts for little more than a tick, however late it comes.
    """

    def __init__(self, give_up_s: float, give_up: Callable[[], None]) -> None:
        """`give_up` is called once, in the watch's thread, when nothing has gone on for `give_up_s` seconds."""
        self.still_s = 0.0
        self._give_up_s = give_up_s
        self._give_up = give_up
        self._num_moves = 0
        self._idle = True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def moved(self, *, idle: bool = False) -> None:
        """Something went on; `idle`: and now nothing has to, until the next call."""
        self._num_moves += 1
        self._idle = idle
        self.still_s = 0.0

    def _run(self) -> None:
        seen, before = self._num_moves, time.monotonic()
        while not self._stopped.wait(TICK_S):
            now = time.monotonic()
            passed, before = min(now - before, 2 * TICK_S), now
            if self._idle or seen != self._num_moves:
                seen, self.still_s = self._num_moves, 0.0
                continue
            self.still_s += passed
            if self.still_s >= self._give_up_s:
                self._give_up()
                return
