"""Ranks that open or call differently are told so, all of them, and can go on."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import (
    BackendUnavailable,
    GeometryError,
    PeerTimeout,
    StateError,
    WorkspaceError,
)
from moe_a2a.testing import run_ranks
from tests.collective.rounds import Case, Round, play, send, tokens_of
from tests.conftest import PRELOAD

CASE = Case(3, wire="nvfp4", more={"allow_defer": True})


def disagree(ranks, backend, by_rank, texts):
    """Each rank plays its own version of a round."""
    debug = {"debug": True} if "global" in texts[0] else {}
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=5, **debug) as a2a:
        play(a2a, ranks, CASE, Round(1))
        rnd = by_rank[ranks.rank]
        start = time.monotonic()
        with pytest.raises(StateError) as caught:
            send(a2a, CASE, rnd, tokens_of(CASE, rnd, ranks.rank))
        assert time.monotonic() - start < 4, "known at once, not when the wait expires"
        for text in (f"rank {ranks.rank}", "reset", *texts):
            assert text in str(caught.value).replace("Rank", "rank"), (text, str(caught.value))
        assert a2a.phase == "idle"
        with pytest.raises(StateError) as again:
            send(a2a, CASE, rnd, tokens_of(CASE, rnd, ranks.rank))
        assert str(again.value) == str(caught.value)
        a2a.reset()
        for seed in range(3):
            play(a2a, ranks, CASE, Round(seed))


@pytest.mark.parametrize(
    ("odd", "texts"),
    [
        ({"rows": 5}, ("runtime_max_tokens=5", "runtime_max_tokens=4")),
        ({"defer": True}, ("defer",)),
        ({"active": (True, True, False)}, ("0b11,", "0b111")),
        ({"global_scale": 3.0}, ("global scale",)),
    ],
)
def test_different_calls_in_one_round(pool, backend, odd, texts):
    plain = Round(2, rows=4, tokens=(3,), active=(True, True, True), global_scale=2.0)
    ranks = 3 if "active" not in odd else 2
    by_rank = [plain, replace(plain, **odd), plain][:ranks]
    if ranks == 2:
        pool.run(inactive_disagreement, backend, texts, ranks=3)
    else:
        pool.run(disagree, backend, by_rank, texts, ranks=3)


def inactive_disagreement(ranks, backend, texts):
    """Rank 1 leaves out rank 2, which makes no call; rank 0 does not."""
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=0.8) as a2a:
        if ranks.rank < 2:
            active = (True, True, ranks.rank == 0)
            rnd = Round(2, active=active)
            with pytest.raises((StateError, PeerTimeout)) as caught:
                send(a2a, CASE, rnd, tokens_of(CASE, rnd, ranks.rank))
            if ranks.rank == 1:
                assert all(text in str(caught.value) for text in texts), str(caught.value)
        dist.barrier(group=ranks.group)
        a2a.reset()
        play(a2a, ranks, CASE, Round(3))


def same_scale(ranks, backend):
    """1 is the default, so that a rank that says so agrees with one that says nothing."""
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=5, debug=True) as a2a:
        rnd = Round(2, global_scale=1.0 if ranks.rank == 0 else None)
        play(a2a, ranks, CASE, rnd)


def test_debug_accepts_a_default_spelled_out(pool, backend):
    pool.run(same_scale, backend, ranks=3)


def open_wrongly(ranks, backend):
    """Mistakes that all ranks see; the group is usable after each."""
    spec, odd = CASE.spec(), ranks.rank == 1

    def refused(error, text, given=spec, **options):
        start = time.monotonic()
        with pytest.raises(error) as caught:
            AllToAll(given, ranks.group, **{"backend": backend, "timeout": 5} | options)
        assert time.monotonic() - start < 4
        for part in text.split("|"):
            assert part in str(caught.value), (part, str(caught.value))
        return caught.value

    refused(GeometryError, "top_k|2|3", replace(spec, top_k=3) if odd else spec)
    refused(GeometryError, "wire|nvfp4|fp8", replace(spec, wire="fp8") if odd else spec)
    refused(GeometryError, "backend|shm|collective", backend="shm" if odd else "collective")
    refused(GeometryError, "debug|True|False", debug=odd)
    refused(GeometryError, "ep_size=4|3 ranks", replace(spec, ep_size=4))
    unknown = refused(BackendUnavailable, "carrier_pigeon|shm|collective", backend="carrier_pigeon")
    assert list(unknown.reasons) == ["carrier_pigeon"]
    unusable = refused(BackendUnavailable, "cuda", device="cuda")
    assert backend in unusable.reasons
    for timeout in (0, -1.0, float("nan"), "soon"):
        refused(GeometryError, "timeout|seconds", timeout=timeout)
    for blocks in (0, -3, 1.5, "many"):
        refused(GeometryError, "max_blocks|>= 1", max_blocks=blocks)
    refused(GeometryError, "device|nonsense", device="nonsense")
    with AllToAll(spec, ranks.group, backend=backend, timeout=5) as a2a:
        play(a2a, ranks, CASE, Round(3))


def test_wrong_constructor_arguments(pool, backend):
    pool.run(open_wrongly, backend, ranks=3)


def missing_at_opening(ranks, backend):
    if ranks.rank == 2:
        time.sleep(0.4)
    else:
        start = time.monotonic()
        with pytest.raises(PeerTimeout) as caught:
            AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=0.4)
        assert caught.value.ranks == (2,)
        assert (caught.value.phase, caught.value.round) == ("open", 0)
        assert 0.4 <= caught.value.waited <= time.monotonic() - start < 1.4
    dist.barrier(group=ranks.group)
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=3) as a2a:
        play(a2a, ranks, CASE, Round(3))


def refused_alone(ranks, backend):
    """Nobody waits for a rank that could not even begin."""
    start = time.monotonic()
    with pytest.raises(GeometryError, match="timeout=-1"):
        AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=-1 if ranks.rank == 1 else 5)
    assert time.monotonic() - start < 2
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=3) as a2a:
        play(a2a, ranks, CASE, Round(3))


def test_one_rank_refused_at_opening_is_told_to_all(pool, backend):
    pool.run(refused_alone, backend, ranks=3)


def test_after_a_rank_did_not_come_to_an_opening_all_can_open(backend):
    # Not in the pool, whose group every other test needs.
    exits = run_ranks(3, missing_at_opening, backend, preload=PRELOAD)
    assert [rank.error for rank in exits] == [None] * 3


def limits(ranks):
    spec, none = Spec(2, 2, 1, 16, 1), torch.zeros(0, 16, dtype=torch.bfloat16)
    ids, weights = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1)
    os.environ["MOE_A2A_TIMEOUT"] = "0.3"
    waits = []
    try:
        for options in ({}, {"timeout": 0.9}):
            with AllToAll(spec, ranks.group, **options) as a2a:
                assert a2a.backend == "shm", "auto takes the first usable backend"
                if ranks.rank == 0:
                    with pytest.raises(PeerTimeout) as caught:
                        a2a.dispatch(none, ids, weights)
                    waits.append(caught.value.waited)
                dist.barrier(group=ranks.group)
        os.environ["MOE_A2A_TIMEOUT"] = "soon"
        with pytest.raises(GeometryError, match="soon"):
            AllToAll(spec, ranks.group)
    finally:
        del os.environ["MOE_A2A_TIMEOUT"]
    return waits


def test_timeout_argument_beats_the_environment(pool):
    short, longer = pool.run(limits, ranks=2)[0]
    assert 0.3 <= short < 0.9 + 0.5
    assert 0.9 <= longer < 0.9 + 1


def too_large(ranks, backend, tokens):
    spec = Spec(ranks.size, 8, 2, 7168, tokens)
    start = time.monotonic()
    with pytest.raises(WorkspaceError) as caught:
        AllToAll(spec, ranks.group, backend=backend, timeout=20)
    assert time.monotonic() - start < 5
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=5) as a2a:
        play(a2a, ranks, CASE, Round(3))
    return str(caught.value)


@pytest.mark.parametrize("tokens", [10**6, 10**9])
def test_a_geometry_larger_than_memory(pool, backend, tokens):
    for text in pool.run(too_large, backend, tokens, ranks=3):
        assert "wanted" in text, text
        assert "available" in text, text
