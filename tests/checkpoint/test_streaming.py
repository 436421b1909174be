"""Reading ahead and writing behind."""

from __future__ import annotations

import errno
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerlm_nemo.checkpoint.streaming import EagerFile, read_ahead

LARGE = EagerFile.LARGE_BYTES


def test_writes_of_any_size_and_seeks_give_the_file_that_an_ordinary_one_would_be(tmp_path: Path) -> None:
    chance = random.Random(0)
    with EagerFile(tmp_path / "ours") as ours, (tmp_path / "theirs").open("xb") as theirs:
        for _ in range(300):
            if chance.random() < 0.2:
                place = chance.randrange(theirs.tell() + 1)
                ours.seek(place)
                theirs.seek(place)
            data = chance.randbytes(chance.choice((1, 512, LARGE - 1, LARGE, 2 * LARGE)))
            assert ours.write(memoryview(data)) == theirs.write(data)
            if chance.random() < 0.2:
                assert ours.tell() == theirs.tell()
        ours.sync()
        assert (tmp_path / "ours").stat().st_size == theirs.seek(0, 2)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond two large writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * LARGE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("call", ["write", "tell", "seek", "sync"])
def test_what_a_thread_could_not_write_is_told_by_the_next_call(tmp_path: Path, full_disk: None, call: str) -> None:
    arguments = {"write": (b"x",), "seek": (0,)}.get(call, ())
    with EagerFile(tmp_path / "file") as file:
        for _ in range(3):
            file.write(bytes(LARGE))
        with pytest.raises(OSError) as failure:
            getattr(file, call)(*arguments)
        assert failure.value.errno == errno.EFBIG


def test_reading_ahead_keeps_the_order_and_raises_where_reading_failed() -> None:
    assert list(read_ahead(lambda n: n * n, range(7))) == [(n, n * n) for n in range(7)]
    got = []
    with pytest.raises(ZeroDivisionError):
        for unit, result in read_ahead(lambda n: 6 // (3 - n), range(7)):
            got.append((unit, result))
    assert got == [(0, 2), (1, 3), (2, 6)]
