"""How long nothing goes on before somebody says so: what counts, and what does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import live
import pytest
from omegaconf import OmegaConf

from steerlm_nemo.engine.watch import Patience, Watch, patience_from
from steerlm_nemo.errors import ConfigError

PATIENCE_S = 60
TICK_S = 0.1


def wait_until(true):
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + PATIENCE_S
        time.sleep(0.01)


@pytest.fixture
def given_up(monkeypatch):
    monkeypatch.setattr("steerlm_nemo.engine.watch.TICK_S", TICK_S)
    return []


@pytest.fixture
def watch(given_up):
    watch = Watch(8 * TICK_S, lambda: given_up.append(True))
    watch.start()
    yield watch
    watch.stop()


def test_what_never_began_to_move_is_given_up_once(watch, given_up):
    watch.moved()
    wait_until(lambda: given_up)
    time.sleep(3 * TICK_S)
    assert given_up == [True]


def test_what_moves_or_has_nothing_to_do_is_not_given_up(watch, given_up):
    for _ in range(12):
        watch.moved()
        time.sleep(TICK_S)
    assert watch.still_s < 8 * TICK_S
    watch.moved(idle=True)
    time.sleep(12 * TICK_S)
    assert watch.still_s == 0 and not given_up
    watch.moved()  # the control
    wait_until(lambda: given_up)


def test_seconds_in_which_the_watching_process_was_stopped_itself_do_not_count():
    program = """
from steerlm_nemo.engine import watch as module
module.TICK_S = 0.1
watch = module.Watch(0.8, lambda: print("given up", flush=True))
watch.start()
watch.moved()
print("began", flush=True)
input()
print(watch.still_s < 0.8, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(12 * TICK_S)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n", timeout=PATIENCE_S)[0] == "True\n"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stall_s": 0}, "engine.stall_s is 0; it must be a number of seconds greater than 0"),
        ({"stall_s": True, "give_up_s": "x"}, r"engine.stall_s is True.*\n.*engine.give_up_s is 'x'"),
        ({"give_up_s": None}, "engine.give_up_s is None"),
        ({"give_up_s": 30}, "raise give_up_s, or lower stall_s"),
    ],
)
def test_bounds_that_cannot_be_are_refused(changes, reason):
    section = live.server_config().engine
    assert patience_from(section) == Patience(section.stall_s, section.give_up_s)
    with pytest.raises(ConfigError, match=reason):
        patience_from(OmegaConf.merge(section, changes))
