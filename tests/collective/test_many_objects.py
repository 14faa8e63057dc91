"""Several AllToAll objects in one process share nothing, whatever groups they are on."""

from __future__ import annotations

from contextlib import ExitStack

import torch.distributed as dist

from moe_a2a.testing import RankContext
from tests.collective import rounds
from tests.collective.places import place_of
from tests.collective.rounds import Case, Round, play

DRAFT = Case(4, experts=6, top_k=1, hidden=64, wire="mxfp4", combine_wire="fp32")
TARGET = Case(4, experts=9, top_k=4, wire="nvfp4", combine_wire="fp8_block128")
THIRD = Case(4, hidden=32, capacity=3, more={"extra": {"id": 4}})


def interleaved(ranks, backend):
    """Rounds of three objects, nested in each other."""
    cases = (TARGET, DRAFT, THIRD)
    with ExitStack() as stack:
        exchanges = [
            stack.enter_context(rounds.opened(ranks, backend, case, timeout=10)) for case in cases
        ]
        for seed in range(4):
            for a2a, case in zip(exchanges, cases, strict=True):
                play(a2a, ranks, case, Round(seed))
            nested(exchanges, cases, ranks, Round(10 + seed))
        exchanges[0].reset()
        for a2a, case in zip(reversed(exchanges), reversed(cases), strict=True):
            play(a2a, ranks, case, Round(30))
        exchanges[1].close()
        play(exchanges[0], ranks, TARGET, Round(31))


def nested(exchanges, cases, ranks, rnd):
    """All dispatch, then all combine: what one received stays while the others exchange."""
    received = []
    for a2a, case in zip(exchanges, cases, strict=True):
        mine = rounds.tokens_of(case, rnd, ranks.rank)
        received.append(rounds.send(a2a, case, rnd, mine))
    for case, recv in zip(cases, received, strict=True):
        everyone = [rounds.tokens_of(case, rnd, rank) for rank in range(case.size)]
        want = rounds.expected(case, rnd, ranks.rank, everyone)
        rounds.check_delivery(case, rnd, recv, want)
    for a2a, case, recv in zip(exchanges, cases, received, strict=True):
        a2a.combine(rounds.experts(a2a, case, rnd, ranks.rank, recv))


def test_three_objects_interleave(pool, every_backend):
    pool.run(interleaved, every_backend, ranks=4)


def overlapping(ranks, backend):
    """Groups {0,1,2}, {1,2,3} and {3,0}: each of the first four ranks is in two of them."""
    members = ([0, 1, 2], [1, 2, 3], [3, 0])
    groups = [dist.new_group(m) for m in members]  # collective over the default group
    exchanges = []
    for group, ranks_in_it in zip(groups, members, strict=True):
        if ranks.rank in ranks_in_it:
            case = Case(len(ranks_in_it), experts=7, top_k=3)
            place = RankContext(dist.get_rank(group), len(ranks_in_it), group, 0)
            device = place_of(ranks, backend)  # by the rank in the pool, not in this group
            a2a = rounds.opened(place, backend, case, timeout=10, device=device)
            exchanges.append((a2a, place, case))
    for seed in range(5):
        for a2a, place, case in exchanges:
            play(a2a, place, case, Round(seed))
    for a2a, _, _ in exchanges:
        a2a.close()
    dist.barrier()
    for group, ranks_in_it in zip(groups, members, strict=True):
        if ranks.rank in ranks_in_it:
            dist.destroy_process_group(group)


def test_objects_on_overlapping_groups(pool, every_backend):
    pool.run(overlapping, every_backend)
