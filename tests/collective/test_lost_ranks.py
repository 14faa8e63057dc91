"""Ranks killed, stopped or asleep, at every point of their sequence of calls, rounds later too."""

from __future__ import annotations

import pytest

from moe_a2a.backends.failure import peer_timeout
from tests.collective.rounds import Case, Round
from tests.faults.episode import Act, Episode
from tests.faults.part import play_episode, says_all
from tests.faults.strike import POINTS, Strike

CASE = Case(4, experts=9, top_k=3, wire="fp8_block128", combine_wire="fp32")
LIMIT = 0.4
STRUCK = (Round(90, rows=6), Round(91, rows=5))
NAP = {"kill": 0.0, "stop": 0.0, "sleep": LIMIT + 0.8}


def rounds(first: int, count: int) -> tuple[Round, ...]:
    routings = ("random", "hot", "invalid")
    return tuple(Round(n, routing=routings[n % 3]) for n in range(first, first + count))


def losing(
    kinds: dict[int, str], point: str, *, after: int, apart: bool, delay: float = 0.002
) -> Act:
    """`after` so many rounds."""
    return Act(
        rounds(10, after),
        point,
        {rank: Strike(kind, delay, NAP[kind]) for rank, kind in kinds.items()},
        STRUCK,
        late={} if point in ("before", "between") else {3: 0.1},
        apart=rounds(40, 6) if apart else (),
        together=rounds(60, 2),
    )


def survive(crew, episode: Episode) -> None:
    """Also checks that the survivors named the same ranks, and that nothing is left of it."""
    exits = crew.run(episode.case.size, play_episode, episode)
    for rank, item in enumerate(exits):
        assert item.error is None, item.error
        assert item.exitcode == (-9 if rank in episode.killed() else 0), item
    tallies = [item.result for item in exits if item.result is not None]
    wrong = [tally.broken or tally.stalled for tally in tallies if tally.broken or tally.stalled]
    assert not wrong, wrong[0]
    assert not any(tally.left for tally in tallies), [tally.left for tally in tallies]
    for number, act in enumerate(episode.acts):
        named = {tally.named[number] for tally in tallies} - {None}
        if episode.backend == "shm" and act.point != "reset":
            assert len(named) == 1, f"act {number}: the survivors do not agree: {named}"


QUICK = ("dispatch", "reset")


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[] if p in QUICK else pytest.mark.slow) for p in POINTS]
)
def test_any_kind_at_any_point(crew, point):
    """Past epoch 2^32. Two at once that come back, then the process that has rank 0 is killed."""
    acts = (
        losing({1: "stop", 2: "sleep"}, point, after=5, apart=point != "dispatch"),
        losing({0: "kill"}, point, after=3, apart=True, delay=0.0005),
    )
    epoch = 2**32 - {"before": 11, "dispatch": 30, "between": 10, "combine": 20, "reset": 40}[point]
    survive(crew, Episode(CASE, acts, limit=LIMIT, epoch=epoch))


@pytest.mark.parametrize("point", ["before", pytest.param("between", marks=pytest.mark.slow)])
def test_a_rank_that_was_stopped_wakes_up(crew, point):
    """Where messages go by way of gloo."""
    acts = (losing({1: "stop"}, point, after=2, apart=True),)
    survive(crew, Episode(CASE, acts, backend="collective", limit=LIMIT))


def test_the_message_says_who_where_and_how_long():
    error = peer_timeout(
        backend="shm",
        rank=1,
        missing=[2, 5],
        phase=1,
        round=17,
        waited=30.004,
        limit=30.0,
        operations_ago=[0, 0, 1, 0, 0, -1],
    )
    assert (error.ranks, error.phase, error.round, error.waited) == ((2, 5), "dispatch", 17, 30.004)
    assert str(error).startswith(
        "dispatch of round 17 on rank 1 (shm): ranks 2, 5 are missing after 30.00 s (limit 30 s). "
        "All ranks must call the same sequence: this rank is at round 17 dispatch, rank 2 was last "
        "seen at round 16 combine, rank 5 was not seen since it opened or was reset."
    )
    assert "reset(active_ranks=...)" in str(error)
    says_all(error, 1, 30.0)


@pytest.mark.parametrize("part", ["on rank 1", "round 17", "30.00 s", "limit 30 s", "last seen"])
def test_a_message_without_one_of_its_parts_is_noticed(part):
    error = peer_timeout(
        backend="shm",
        rank=1,
        missing=[2],
        phase=1,
        round=17,
        waited=30.004,
        limit=30.0,
        operations_ago=[0, 0, 1],
    )
    error.args = (str(error).replace(part, ""),)
    with pytest.raises(AssertionError):
        says_all(error, 1, 30.0)
