"""Combine on the CPU: rows that say by themselves that they have come, in places used again."""

from __future__ import annotations

import time

import pytest
import torch

from moe_a2a import AllToAll
from moe_a2a.errors import PeerTimeout
from moe_a2a.spec import COMBINE_WIRES
from tests.collective.rounds import (
    Case,
    Round,
    experts,
    opened,
    same_values,
    send,
    sums_of,
    tokens_of,
)
from tests.simt.backend import register
from tests.simt.playing import KINDS, NEEDS, inputs, on_a_device, play_case

pytestmark = NEEDS


@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_combine_of_rows_of_several_runs(pool, back):
    """Few tokens, but R of a large round: some warps push, in longer runs than the others sum."""
    case = Case(2, experts=4, top_k=3, hidden=17536, capacity=120, combine_wire=back)
    rounds = [
        Round(1, tokens=(9, 2), rows=120),
        Round(2, tokens=(1, 7), rows=120, memory="strided"),
    ]
    pool.run(play_case, "simt", case, rounds, ranks=2)


@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_combine_on_any_grid(pool, back):
    """Three ranks, sources with unlike numbers of rows; y at odd addresses. One block: all push,
    then sum. More: some warps push, the last units come from a counter."""
    case = Case(3, experts=6, top_k=2, hidden=640, capacity=60, combine_wire=back)
    rounds = [Round(n, tokens=(37, 3, 60), memory=("own", "strided")[n]) for n in range(2)]
    for blocks in (1, 2, 3):
        pool.run(on_a_device, 3 * blocks, "simt", case, rounds, ranks=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_rows_that_look_like_none(pool, back, kind):
    """NaN whose bits are all ones, as in an inbox before a row has come; the rest is right."""
    rounds = [
        Round(1, ones=True),
        Round(2, ones=True, rows=3, output="fp16"),
        Round(3, ones=True, memory="strided", output="fp32"),
        Round(4),
    ]
    case = Case(2, top_k=3, hidden=640, capacity=50, combine_wire=back)
    pool.run(play_case, kind, case, rounds, ranks=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_places_of_an_inbox_are_written_again(pool, back, kind):
    """Rounds of all sizes over the same rows; in each another rank is late with its rows, so that
    the others look where those of the round before were."""
    many = Case(8, experts=16, top_k=8, hidden=128, capacity=24, combine_wire=back)
    few = Case(3, experts=6, top_k=4, hidden=640, capacity=40, combine_wire=back)
    rounds = [
        Round(n, rows=rows, ones=n % 3 == 0, specials=n % 3 == 1)
        for n, rows in enumerate((24, 1, 23, 24, 2, 7, 24, 3))
    ]
    pool.run(late_in_turn, kind, many, rounds, ranks=8)
    pool.run(on_a_device, 6, kind, few, [Round(9), *rounds, Round(10)], late_in_turn, ranks=3)


def late_in_turn(ranks, kind, case, rounds):
    register()
    with opened(ranks, kind, case) as a2a:
        for number, rnd in enumerate(rounds):
            play_late(a2a, ranks, case, rnd, number % case.size)


def play_late(a2a, ranks, case, rnd, late):
    """A round's sums; rank `late` waits before its combine until the others are in theirs."""
    mine = tokens_of(case, rnd, ranks.rank)
    recv = send(a2a, case, rnd, mine)
    a2a.check()
    y = experts(a2a, case, rnd, ranks.rank, recv)
    if ranks.rank == late:
        time.sleep(0.01)
    out = a2a.combine(y)
    a2a.check()
    same_values(f"combine of {rnd}", out, sums_of(case, rnd, ranks.rank, mine))


@pytest.mark.slow
@pytest.mark.parametrize("back", ["bf16", "mxfp8"])
def test_a_rank_that_does_not_combine_is_named_and_nothing_of_the_round_is_left(pool, back):
    pool.run(one_does_not_combine, back, ranks=3)


def one_does_not_combine(ranks, back):
    """Rows of expert 3, which rank 1 owns, are waited for; of those of rank 2, with expert 7, some
    are read, and the others lie in the inboxes when the round has failed, as do all of rank 1."""
    register()
    case = Case(3, capacity=8, combine_wire=back)
    with AllToAll(case.spec(), ranks.group, backend="simt", timeout=1) as a2a:
        x, ids, weights = inputs(case, 8)
        ids[::2, 0] = 3
        ids[:, 1] = 7
        a2a.dispatch(x, ids, weights)
        if ranks.rank != 1:
            a2a.combine(torch.full((3, 8, case.hidden), 77.0, dtype=torch.bfloat16))
            with pytest.raises(PeerTimeout) as caught:
                a2a.check()
            assert (caught.value.ranks, caught.value.phase) == ((1,), "combine")
        torch.distributed.barrier(ranks.group)
        a2a.reset()
        for late in range(3):
            play_late(a2a, ranks, case, Round(late, tokens=(8,)), late)
