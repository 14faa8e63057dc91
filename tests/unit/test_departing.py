"""What a closed exchange leaves behind stays as long as the device needs it, and no longer."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest

from moe_a2a.backends import departing


class Memory:
    pass


@pytest.fixture(autouse=True)
def _none_is_held(monkeypatch):
    monkeypatch.setattr(departing, "_all", [])


def held(ended):
    memory = Memory()
    departing.hold(memory, lambda: ended[0], lambda: None)
    return weakref.ref(memory)


def test_memory_stays_until_the_device_is_through():
    ended = [False]
    memory = held(ended)
    departing.sweep()
    assert memory() is not None
    ended[0] = True
    departing.sweep()
    assert memory() is None


def test_who_departs_later_lets_go_of_those_before():
    first, second = held(ended := [False]), held([False])
    ended[0] = True
    third = held([False])
    assert (first(), second() is not None, third() is not None) == (None, True, True)


def test_a_destructor_may_close_another():
    class Closes(Memory):
        def __del__(self):
            departing.sweep()

    departing.hold(Closes(), ended := iter([False, True]).__next__, lambda: None)
    assert callable(ended)
    departing.hold(Memory(), lambda: True, lambda: None)
    departing.sweep()
    assert not departing._all


SCRIPT = """
from moe_a2a.backends import departing
departing.hold("through", iter([False, True]).__next__, lambda: print("told in vain"))
departing.hold("waits", lambda: False, lambda: 1 / 0)
departing.hold("waits", lambda: False, lambda: print("told to give up"))
"""


def test_at_the_end_of_the_process_those_that_wait_are_told():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "told to give up\n", "")
