"""Ranks that die: the others learn who, in time, agree on it, and go on without them.

`tests/faults` has the engine for ranks lost in any way at any point: see test_lost_ranks.py.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll
from moe_a2a.errors import MoeA2AError, PeerTimeout, StateError
from tests.collective import rounds
from tests.collective.rounds import Case, Round, play

CASE = Case(4, experts=9, top_k=3, combine_wire="fp32")
LIMIT = 0.6
OPENING = 1.0  # opening takes longer than a round on a busy machine


def dispatch_only(a2a, ranks):
    rnd = Round(2)
    return rounds.send(a2a, CASE, rnd, rounds.tokens_of(CASE, rnd, ranks.rank))


def zeros(a2a):
    return a2a.combine_buffer().zero_()


def times_out(a2a, call, victims, phase):
    """PeerTimeout in time; afterwards every call raises the very same."""
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        call()
    error, took = caught.value, time.monotonic() - start
    assert took < LIMIT + 1, took
    if a2a.backend == "shm":
        assert took >= LIMIT / 2, "ranks of one host have no sign of death but silence"
        assert error.ranks == victims, error
    else:
        assert set(error.ranks) <= set(victims), error
        assert error.ranks, error
    assert (error.phase, error.round) == (phase, 2), error
    assert 0 <= error.waited <= took + 0.01
    assert all(str(rank) in str(error) for rank in error.ranks)
    none = torch.zeros(0, CASE.hidden, dtype=torch.bfloat16)
    again = (
        lambda: a2a.dispatch(none, torch.zeros(0, 3).int(), torch.zeros(0, 3)),
        lambda: a2a.combine(torch.zeros(4, 6, CASE.hidden)),
        a2a.combine_buffer,
    )
    for later in again:
        with pytest.raises(PeerTimeout) as second:
            later()
        assert second.value is error or str(second.value) == str(error)
    return error.ranks


def reset_together(a2a, active=None):
    """Ranks give up at different moments, so that a reset may have to be called again."""
    for _ in range(10):
        try:
            return a2a.reset(active)
        except (PeerTimeout, StateError):  # noqa: PERF203
            with pytest.raises(MoeA2AError):
                a2a.combine_buffer()
    return a2a.reset(active)


def killed(ranks, backend, victims, phase):
    a2a = AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=LIMIT)
    play(a2a, ranks, CASE, Round(1))
    if phase == "combine":
        dispatch_only(a2a, ranks)
    if ranks.rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    if phase == "dispatch":
        named = times_out(a2a, lambda: dispatch_only(a2a, ranks), victims, phase)
    else:
        y = zeros(a2a)
        named = times_out(a2a, lambda: a2a.combine(y), victims, phase)
    active = tuple(rank not in victims for rank in range(4))
    reset_together(a2a, torch.tensor(active))
    assert a2a.phase == "idle"
    for seed in range(4):
        play(a2a, ranks, CASE, Round(seed, active=active, routing="hot" if seed == 1 else "random"))
    times_out_at_reset(a2a, victims)
    a2a.close()
    return named


def times_out_at_reset(a2a, victims):
    """A reset that counts on the dead ranks says so."""
    with pytest.raises(PeerTimeout) as caught:
        a2a.reset()
    assert set(caught.value.ranks) <= set(victims)
    assert caught.value.phase == "reset"


@pytest.mark.parametrize(("victims", "phase"), [((0, 3), "dispatch"), ((0, 1, 3), "combine")])
def test_killed_ranks(crew, backend, victims, phase):
    exits = crew.run(4, killed, backend, victims, phase)
    assert [e.exitcode for e in exits] == [-9 if r in victims else 0 for r in range(4)], exits
    named = {e.result for r, e in enumerate(exits) if r not in victims}
    assert len(named) == 1 or backend == "collective", "the survivors do not agree"


def late_within_the_grace(ranks):
    """Rank 3 is dead, rank 1 begins just as the waits of ranks 0 and 2 have expired."""
    a2a = AllToAll(CASE.spec(), ranks.group, backend="shm", timeout=LIMIT)
    play(a2a, ranks, CASE, Round(1))
    dist.barrier(group=ranks.group)
    if ranks.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == 1:
        time.sleep(LIMIT + 0.15)
    with pytest.raises(PeerTimeout) as caught:
        dispatch_only(a2a, ranks)
    return caught.value.ranks


def test_survivors_agree_also_with_one_that_posts_during_their_grace(crew):
    exits = crew.run(4, late_within_the_grace)
    assert [e.error for e in exits] == [None] * 4
    assert [exits[rank].result for rank in (0, 1, 2)] == [(3,)] * 3


def killed_while_opening(ranks, backend, step):
    """The victim dies at the `step`-th meeting of its constructor."""
    from moe_a2a.group import Group
    from tests.collective.footprint import footprint, settled

    spec = CASE.spec()
    AllToAll(spec, ranks.group, backend=backend, timeout=5).close()
    before = footprint()
    if ranks.rank == 1:
        meet, count = Group.exchange, []

        def exchange(group, message):
            count.append(1)
            if len(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return meet(group, message)

        Group.exchange = exchange
    start = time.monotonic()
    try:
        a2a = AllToAll(spec, ranks.group, backend=backend, timeout=OPENING)
    except MoeA2AError as error:
        assert time.monotonic() - start < OPENING + 1
        ranks_named = error.ranks if isinstance(error, PeerTimeout) else None
    else:  # nobody asked for the victim any more
        ranks_named = "open"
        a2a.close()
    return ranks_named, settled(before)


MEETINGS = {"shm": 6, "collective": 5}  # exchanges of a constructor


@pytest.mark.parametrize(
    ("backend", "step"),
    [
        pytest.param(name, step + 1, marks=[] if step % 3 == 1 else pytest.mark.slow)
        for name, most in MEETINGS.items()
        for step in range(most)
    ],
)
def test_killed_while_opening(crew, backend, step):
    exits = crew.run(4, killed_while_opening, backend, step)
    assert exits[1].exitcode == -signal.SIGKILL, "the victim got through: fewer meetings than said"
    for rank in (0, 2, 3):
        assert exits[rank].error is None, exits[rank].error
        named, left = exits[rank].result
        assert 1 in named, named
        assert not left, f"rank {rank} still holds {left}"


def late_resets(ranks, backend):
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=0.4) as a2a:
        time.sleep(0.1 * ranks.rank)
        a2a.reset()
        play(a2a, ranks, CASE, Round(1))
        dist.barrier(group=ranks.group)
        if ranks.rank == 2:
            time.sleep(1.0)  # the others give up on it at least once
        failures = 0
        for _ in range(10):
            try:
                a2a.reset()
                break
            except (PeerTimeout, StateError):
                failures += 1
                with pytest.raises(MoeA2AError):
                    dispatch_only(a2a, ranks)
        for seed in range(3):
            play(a2a, ranks, CASE, Round(seed))
    return failures


@pytest.mark.slow
def test_resets_at_different_times_and_again_after_a_timeout(pool, backend):
    failures = pool.run(late_resets, backend, ranks=4)
    assert min(failures[0], failures[1], failures[3]) >= 1, failures
