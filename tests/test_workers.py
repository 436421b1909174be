"""Work in several processes: order, bounded look-ahead, and what happens when a process dies."""

import os
from collections.abc import Iterator

import pytest

from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.workers import ITEMS_AT_A_TIME, in_order


def square(number: int) -> int:
    return number * number


def die_at_100(number: int) -> int:
    if number == 100:
        os._exit(9)
    return number


def test_results_come_in_the_order_of_the_items() -> None:
    numbers = range(5 * ITEMS_AT_A_TIME + 1)
    assert list(in_order(square, numbers, 3)) == list(in_order(square, numbers, 1)) == [n * n for n in numbers]


def test_items_are_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100 * ITEMS_AT_A_TIME):
            taken.append(number)
            yield number

    results = in_order(square, items(), 2)
    next(results)
    assert len(taken) <= 5 * ITEMS_AT_A_TIME
    results.close()


def test_a_process_that_dies_is_an_error_that_says_so() -> None:
    with pytest.raises(SteerLMError, match="a worker process died"):
        list(in_order(die_at_100, range(1000), 2))
