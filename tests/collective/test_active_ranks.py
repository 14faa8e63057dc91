"""Ranks left out of rounds: nobody waits for them, nothing reaches them; a reset returns them."""

from __future__ import annotations

import pytest
import torch

from moe_a2a.errors import StateError
from tests.collective.places import meet
from tests.collective.rounds import Case, Round, opened, play, send, tokens_of


def shrink_and_grow(ranks, backend, case):
    """Active ranks go 4, 3, 2 and back to 4 by a reset."""
    steps = ((True, True, True, True), (True, True, False, True), (True, False, False, True))
    with opened(ranks, backend, case, timeout=10) as a2a:
        for number, active in enumerate(steps):
            if active[ranks.rank]:
                for seed in range(3):
                    routing = ("random", "hot", "invalid")[seed]
                    play(
                        a2a, ranks, case, Round(10 * number + seed, active=active, routing=routing)
                    )
        if ranks.rank in (0, 3):
            with pytest.raises(StateError, match="reset"):
                play(a2a, ranks, case, Round(50, active=steps[1]))
            assert a2a.phase == "idle"
            play(a2a, ranks, case, Round(51, active=steps[2]))
        meet(ranks)
        a2a.reset()
        for seed in range(3):
            play(a2a, ranks, case, Round(60 + seed))
        if backend == "shm":
            grow_from_a_subset(a2a, ranks, case)


def grow_from_a_subset(a2a, ranks, case):
    """A reset over two ranks only, rounds, then everyone."""
    active = (False, True, True, False)
    if active[ranks.rank]:
        a2a.reset(torch.tensor(active))
        for seed in range(3):
            play(a2a, ranks, case, Round(70 + seed, active=active))
    meet(ranks)
    a2a.reset()
    for seed in range(3):
        play(a2a, ranks, case, Round(80 + seed))


@pytest.mark.parametrize("wire", ["bf16", "mxfp4"])
def test_active_ranks_shrink_and_a_reset_grows_them(pool, every_backend, wire):
    case = Case(4, experts=9, top_k=3, wire=wire, combine_wire="fp32")
    pool.run(shrink_and_grow, every_backend, case, ranks=4)


def alone(ranks, backend, case):
    """Every rank is the only active one of its own object."""
    with opened(ranks, backend, case, timeout=10) as a2a:
        only = tuple(rank == ranks.rank for rank in range(ranks.size))
        for seed in range(3):
            play(a2a, ranks, case, Round(seed, active=only))
        a2a.reset()
        play(a2a, ranks, case, Round(9))


def test_a_rank_may_be_active_alone(pool, every_backend):
    pool.run(alone, every_backend, Case(3), ranks=3)


def resets(ranks, backend, case, times):
    """Resets with no failure before them, in any phase, back to back."""
    with opened(ranks, backend, case, timeout=5) as a2a:
        for number in range(times):
            a2a.reset()
            if number % 8 == 0:
                play(a2a, ranks, case, Round(number))
            if number % 8 == 4:
                nothing = Round(number, tokens=(0,))
                send(a2a, case, nothing, tokens_of(case, nothing, ranks.rank))


@pytest.mark.slow
def test_resets_back_to_back_and_in_any_phase(pool, every_backend):
    pool.run(resets, every_backend, Case(3), 60, ranks=3)
