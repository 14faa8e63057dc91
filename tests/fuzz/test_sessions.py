"""Whole sessions that hypothesis thinks up: a few in every run, many with `make fuzz`."""

from __future__ import annotations

from collections import Counter

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import sessions_of


def test_sessions(pool):
    tally: Counter[str] = Counter()
    machine = sessions_of(pool, lateness=False, tally=tally)
    # Not shrunk: where ranks wait for each other in vain that takes minutes.
    quick = settings(max_examples=10, stateful_step_count=8, phases=[Phase.generate])
    run_state_machine_as_test(machine, settings=quick)
    for name in ("rounds", "bad calls", "resets", "disagreements"):
        assert tally[name] > 2, tally
