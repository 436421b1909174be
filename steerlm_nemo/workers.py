"""The same work on many items in several processes, in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from steerlm_nemo.errors import SteerLMError

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AT_A_TIME = 64  # enough to make sending them cheap, few enough to keep progress smooth

_work: Callable[[Any], Any]  # of a worker process


def in_order(work: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`work` of each item, in the order of the items; with more than one worker, in processes of their own.

    `work` is sent to each process once and must be picklable, as must items and results. No more items are taken than
    keep the processes busy, so memory is flat.

    Raises:
        SteerLMError: a process died.
    """
    if num_workers == 1:
        yield from map(work, items)
        return
    # Spawned, not forked: tqdm and Hugging Face tokenizers have threads, which a fork would cut off.
    context = multiprocessing.get_context("spawn")
    remaining = iter(items)
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (work,))
    try:
        waiting: deque[Future[list[Result]]] = deque()
        while True:
            while len(waiting) < 2 * num_workers and (chunk := list(islice(remaining, ITEMS_AT_A_TIME))):
                waiting.append(pool.submit(_do, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool as err:
        raise SteerLMError(
            "a worker process died, most likely for want of memory. Ask for fewer workers than "
            f"{num_workers} and run the same command again"
        ) from err
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it


def _do(items: list[Any]) -> list[Any]:
    return [_work(item) for item in items]
