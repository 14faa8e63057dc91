"""Whole sessions that hypothesis thinks up: a few in every run, many with `make fuzz`."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import sessions_of


def test_sessions(pool):
    tally: Counter[str] = Counter()
    machine = sessions_of(pool, lateness=False, tally=tally)
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=8))
    for name in ("rounds", "bad calls", "resets", "disagreements"):
        assert tally[name] > 2, tally
