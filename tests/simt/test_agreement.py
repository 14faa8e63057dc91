"""Survivors agree on who is gone, also with those that come while, or after, they give up."""

from __future__ import annotations

import time

import pytest

from moe_a2a.errors import PeerTimeout, StateError
from tests.collective.places import meet
from tests.collective.rounds import Case, Round, opened, play
from tests.simt.backend import register
from tests.simt.playing import NEEDS

pytestmark = NEEDS
LIMIT = 0.6
BACKENDS = ("shm", "collective", "simt")


def comes_late(ranks, backend, delays, debug):
    """Whom this rank named; the ranks begin round 2 one after the other."""
    register()
    case = Case(len(delays))
    with opened(ranks, backend, case, timeout=LIMIT, debug=debug) as a2a:
        play(a2a, ranks, case, Round(1))
        meet(ranks)
        time.sleep(delays[ranks.rank])
        start = time.monotonic()
        with pytest.raises((PeerTimeout, StateError)) as caught:
            for seed in (2, 3):
                play(a2a, ranks, case, Round(seed))
        took = time.monotonic() - start
        meet(ranks)
        return getattr(caught.value, "ranks", None), took, str(caught.value)


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_comes_while_the_others_give_up_is_the_one(pool, backend, debug):
    found = pool.run(comes_late, backend, (0.0, 0.0, LIMIT + 0.2), debug, ranks=3)
    assert [named for named, _, _ in found] == [(2,)] * 3, found


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_come_one_after_the_other_learn_that_they_are_out(pool, backend):
    late = 2 * LIMIT + 0.6
    found = pool.run(comes_late, backend, (0.0, 0.0, late, late + 0.4), False, ranks=4)
    assert [named for named, _, _ in found] == [(2, 3)] * 4, found


def test_the_limit_is_one_of_the_operation(pool):
    """Not of each source: ranks that each come within it, but one after the other, are too late."""
    delays = tuple(0.8 * LIMIT * n for n in range(4))
    found = pool.run(comes_late, "simt", delays, False, ranks=4)
    named, took, _ = found[0]
    assert named, found
    assert took < LIMIT + 1
