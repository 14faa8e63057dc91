"""Ranks that stay away, come late, call otherwise or die: who it was, in time, and how to go on.

A kernel can't raise: it records what happened and returns, and `check` or the next call raises.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from moe_a2a.errors import PeerTimeout, StateError
from moe_a2a.testing import run_ranks
from tests.collective import rounds
from tests.collective.places import meet, place_of
from tests.collective.rounds import Case, Round, opened, play
from tests.collective.test_faults import reset_together
from tests.conftest import PRELOAD
from tests.cuda.playing import in_turn, run_streams

CASE = Case(3, experts=9, top_k=3, capacity=40, combine_wire="fp32", more={"allow_defer": True})
QUANTIZED = Case(3, experts=9, top_k=3, wire="nvfp4", more={"allow_defer": True})
LIMIT = 0.8


def send(a2a, ranks, case=CASE, rnd=None):
    rnd = rnd or Round(2)
    return rounds.send(a2a, case, rnd, rounds.tokens_of(case, rnd, ranks.rank))


def zeros(a2a):
    return a2a.combine_buffer().zero_()


def gives_up(a2a, missing, phase, slack=1.0):
    """`check` names the missing in time; then every call says the same, and the GPU is well."""
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        a2a.check()
    error, took = caught.value, time.monotonic() - start
    assert took < LIMIT + slack, took
    assert error.ranks == missing, error
    assert (error.phase, error.round) == (phase, 2), error
    assert LIMIT / 2 <= error.waited < LIMIT + slack, error.waited
    assert (torch.ones(4, device=a2a.device) * 2).sum().item() == 8
    for later in (a2a.combine_buffer, a2a.check, lambda: a2a.combine(None)):
        with pytest.raises(PeerTimeout) as second:
            later()
        assert str(second.value) == str(error)


def one_stays_away(ranks, phase, rows):
    with opened(ranks, "nvlink", CASE, timeout=LIMIT) as a2a:
        play(a2a, ranks, CASE, Round(1))
        rnd = Round(2, rows=rows, tokens=(rows,))
        if phase == "combine":
            send(a2a, ranks, rnd=rnd)
            zeros(a2a)
        meet(ranks)
        if ranks.rank != 1:
            if phase == "dispatch":
                send(a2a, ranks, rnd=rnd)
            else:
                a2a.combine(zeros(a2a))
            gives_up(a2a, (1,), phase)
        meet(ranks)
        a2a.reset()
        assert a2a.phase == "idle"
        for seed in range(4):
            play(a2a, ranks, CASE, Round(seed))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_a_rank_that_stays_away_is_named_and_all_go_on(phase, rows):
    run_streams(3, one_stays_away, phase, rows)


def one_comes_late(ranks):
    with opened(ranks, "nvlink", CASE, timeout=LIMIT) as a2a:
        play(a2a, ranks, CASE, Round(1))
        meet(ranks)
        if ranks.rank == 1:
            time.sleep(LIMIT / 2)  # within the limit: nobody notices
        play(a2a, ranks, CASE, Round(2))
        meet(ranks)
        if ranks.rank == 1:
            time.sleep(LIMIT + 1)
        start = time.monotonic()
        with pytest.raises((PeerTimeout, StateError)) as caught:
            # What the others sent before they gave up is there: it may get one operation further.
            for call in (lambda: send(a2a, ranks), lambda: a2a.combine(zeros(a2a))) * 2:
                call()
                a2a.check()
        assert time.monotonic() - start < LIMIT + 1.5
        if ranks.rank != 1:
            assert caught.value.ranks == (1,), caught.value
        reset_together(a2a)
        for seed in range(3):
            play(a2a, ranks, CASE, Round(seed))


def test_a_rank_that_comes_late_is_told_that_it_was_given_up():
    run_streams(3, one_comes_late)


def survivors(ranks):
    """Rank 2 ends; the others go on without it, and its object is closed last."""
    a2a = opened(ranks, "nvlink", CASE, timeout=LIMIT)
    play(a2a, ranks, CASE, Round(1))
    meet(ranks)
    active = (True, True, False)
    if ranks.rank != 2:
        send(a2a, ranks)
        gives_up(a2a, (2,), "dispatch")
        reset_together(a2a, torch.tensor(active))
        for seed in range(4):
            play(a2a, ranks, CASE, Round(seed, active=active))
        with pytest.raises(PeerTimeout) as caught:
            a2a.reset()
        assert (caught.value.ranks, caught.value.phase) == ((2,), "reset")
    meet(ranks)
    a2a.close()


def test_survivors_go_on_after_a_reset_over_them():
    run_streams(3, survivors)


def disagree(ranks, case, odd, texts):
    with opened(ranks, "nvlink", case, timeout=10) as a2a:
        play(a2a, ranks, case, Round(1))
        keywords = {"rows": 4, "tokens": (3,)} | (odd if ranks.rank == 1 else {})
        start = time.monotonic()
        send(a2a, ranks, case, Round(2, **keywords))
        with pytest.raises(StateError) as caught:
            a2a.check()
        assert time.monotonic() - start < 5, "known at once, not when the wait expires"
        text = str(caught.value).replace("Rank", "rank")
        assert all(part in text for part in ("rank 1", "reset", *texts)), text
        with pytest.raises(StateError):
            send(a2a, ranks, case)
        meet(ranks)
        reset_together(a2a)
        for seed in range(3):
            play(a2a, ranks, case, Round(seed))


@pytest.mark.parametrize(
    ("case", "odd", "texts"),
    [
        (CASE, {"rows": 3}, ("runtime_max_tokens=3", "runtime_max_tokens=4")),
        (CASE, {"rows": 40}, ("runtime_max_tokens=40", "runtime_max_tokens=4")),
        (QUANTIZED, {"defer": True}, ("defer",)),
    ],
    ids=["rows", "packets_or_bulk", "defer"],
)
def test_different_calls_in_one_round_are_told_to_all(case, odd, texts):
    run_streams(3, disagree, case, odd, texts)


def graph_without_peer(ranks):
    """Replays of an object that has failed return at once, whatever they hold."""
    with opened(ranks, "nvlink", CASE, timeout=LIMIT) as a2a:
        place = place_of(ranks, "nvlink")
        rnd = Round(2)
        call = rounds.call_of(CASE, rnd, rounds.tokens_of(CASE, rnd, ranks.rank), place)
        y = torch.zeros(CASE.size, CASE.capacity, CASE.hidden, device=place)
        play(a2a, ranks, CASE, Round(1))
        graph = torch.cuda.CUDAGraph()

        def capture():
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                a2a.dispatch(**call)
                return a2a.combine(y)

        in_turn(ranks, capture)
        if ranks.rank == 0:
            start = time.monotonic()
            for _ in range(100):
                graph.replay()
            with pytest.raises(PeerTimeout):
                a2a.check()
            assert time.monotonic() - start < LIMIT + 1.5, "one wait, not a hundred"
        meet(ranks)
        reset_together(a2a)
        graph.replay()
        a2a.check()
        play(a2a, ranks, CASE, Round(3))


def test_replays_after_a_failure_return_at_once():
    run_streams(3, graph_without_peer)


def killed(ranks, victim, phase):
    opened(ranks, "nvlink", CASE).close()  # a process loads for longer than the limit
    meet(ranks)
    a2a = opened(ranks, "nvlink", CASE, timeout=LIMIT)
    play(a2a, ranks, CASE, Round(1))
    if phase == "combine":
        send(a2a, ranks)
        zeros(a2a)
    meet(ranks)
    if ranks.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if phase == "dispatch":
        send(a2a, ranks)
    else:
        a2a.combine(zeros(a2a))
    gives_up(a2a, (victim,), phase, slack=2.0)
    active = tuple(rank != victim for rank in range(ranks.size))
    reset_together(a2a, torch.tensor(active))
    for seed in range(4):
        play(a2a, ranks, CASE, Round(seed, active=active))
    a2a.close()


@pytest.mark.parametrize(("victim", "phase"), [(2, "dispatch"), (0, "combine")])
def test_survivors_of_a_killed_process_go_on(victim, phase):
    exits = run_ranks(3, killed, victim, phase, preload=PRELOAD, timeout=90)
    assert [e.exitcode for e in exits] == [-9 if r == victim else 0 for r in range(3)], exits
