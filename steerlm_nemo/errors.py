"""The exceptions a user can cause, and the one place that turns them into an exit code.

A message says what is wrong, where (file:line, record, key) and what to do next. Anything that is not a
`SteerLMError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import reprlib
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steerlm_nemo.conversation import RecordRef

EXIT_BAD_INPUT = 2
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141  # as a shell says of a program that SIGPIPE has ended


MOST_CHARACTERS = 3500  # of a message
_MOST_OF_REASON = 1000  # why one record cannot be used: a message may hold several
_MOST_OF_VALUE = 400
_MOST_SHOWN = 20  # keys, names, items


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, without its middle where it is longer: a message ends with what to do next."""
    if len(text) <= most:
        return text
    end = most // 3
    start = most - end
    return f"{text[:start]} ... ({len(text) - most:,} characters) ... {text[-end:]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _MOST_SHOWN
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """A value as a message quotes it: short, however long or deep it is."""
    text = _SHORT.repr(value)
    if isinstance(value, list | tuple | dict) and len(value) > _MOST_SHOWN:
        text = f"{text[:-1].removesuffix(', ...')} and {len(value) - _MOST_SHOWN:,} more{text[-1]}"
    return clipped(text, _MOST_OF_VALUE)


def listed(names: Iterable[object], separator: str = ", ", most: int = _MOST_SHOWN) -> str:
    """Names, or whatever has a text, in a message: `a, b, c and 4,997 more`."""
    texts = [clipped(str(name), 100) for name in names]
    more = len(texts) - most
    return separator.join(texts[:most]) + (f" and {more:,} more" if more > 0 else "")


class SteerLMError(Exception):
    """Base of every error a user can cause; `exit_code` is what the process ends with.

    However long what it quotes, its text has a bound.
    """

    exit_code = EXIT_BAD_INPUT

    def __str__(self) -> str:
        return clipped(super().__str__())


class InputError(SteerLMError):
    """A file, directory or command-line value that cannot be used."""


class RecordError(SteerLMError):
    """One record that cannot be used: where it stands, and why it cannot.

    The message starts with the place (`file:3: ...`, `file:3 turn 2: ...`); `reason` is what follows `file:3`, and
    `problem` what follows the place.
    """

    def __init__(self, ref: RecordRef, problem: str, turn: int | None = None) -> None:
        problem = clipped(problem, _MOST_OF_REASON)
        super().__init__(ref, problem, turn)  # all of them: an exception is pickled by its arguments
        self.ref = ref
        self.turn = turn
        self.problem = problem
        self.reason = problem if turn is None else f"turn {turn}: {problem}"

    @property
    def place(self) -> str:
        """`file:3`, or `file:3 turn 2`."""
        return str(self.ref) if self.turn is None else f"{self.ref} turn {self.turn}"

    def __str__(self) -> str:
        return clipped(f"{self.place}: {self.problem}")


class ConfigError(SteerLMError):
    """A configuration that cannot run; the message lists every problem found."""


class CheckpointError(SteerLMError):
    """A checkpoint that is damaged, unsafe, of an unknown architecture or does not fit the request."""


class FormatMismatchError(SteerLMError):
    """Two sides disagree about markers or attribute schema; the message shows both."""


class ServerError(SteerLMError):
    """A server that cannot be reached, or that answered with an error after all retries."""


class IncompleteError(SteerLMError):
    """The work ended, but some records are missing; the message counts them and names the reject file."""

    exit_code = EXIT_INCOMPLETE


def exit_with_message(main: Callable[[], None], *, tidy: bool = False) -> None:
    """Run `main`; print a user's error as one `error: ...` message without a traceback, then exit. Where nobody reads
    what it prints any more (`| head`), it ends without a word.

    With `tidy`, SIGTERM ends it as Ctrl-C does, and what it was writing is removed. Programs with ranks do not want
    that: a rank that waits for another inside a library would never see it.
    """
    if tidy:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = _exit_code(main)
        _flush()  # what nobody reads any more fails here, not when the interpreter ends
    except BrokenPipeError:
        if not _silence_what_nobody_reads():
            raise
        code = EXIT_NOBODY_READS
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], None]) -> int | str | None:
    try:
        main()
    except SteerLMError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as end:  # argparse has shown its help
        return end.code
    return None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started this
            stream.flush()


def _silence_what_nobody_reads() -> bool:
    """Turn a standard stream away from a pipe whose reader has gone (`| head`); False where there is none."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # what is left in its buffer goes there
            os.close(nowhere)
            found = True
    return found
