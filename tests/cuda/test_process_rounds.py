"""Rounds of rank processes over symmetric memory: a GPU each, or a share of one.

Processes that share a GPU wait a time slice for each other, so there are few rounds here; many are
in test_local_rounds. The collective tests run on this backend too, and in such processes.
"""

from __future__ import annotations

import random

import pytest

from tests.collective.places import place_of
from tests.collective.rounds import Case, Round, opened, play_rounds
from tests.collective.test_active_ranks import resets, shrink_and_grow
from tests.collective.test_many_objects import interleaved
from tests.conftest import GPUS
from tests.cuda.prepared import Log, Prepared, keep_up, play


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rounds(pool, size):
    rounds = [Round(1), Round(2, rows=1, specials=True), Round(3, routing="invalid", strided=True)]
    for wire, back in (("bf16", "bf16"), ("mxfp8", "fp32"), ("nvfp4", "mxfp8")):
        more = {"scrub": "all", "extra": {"id": 8}}
        case = Case(size, 2 * size + 1, 3, 128, 20, wire, back, more)
        pool.run(play_rounds, "nvlink", case, rounds, ranks=size)


def play_prepared(ranks, case, distinct, count):
    place, shared = place_of(ranks, "nvlink"), random.Random(1)
    pool = [Prepared(case, rnd, ranks.rank, place) for rnd in distinct]
    log = Log(count, place)
    with opened(ranks, "nvlink", case) as a2a:
        for number in range(count):
            play(a2a, shared.choice(pool), log)
            keep_up(number)
        a2a.check()
        log.check()


def test_small_and_large_rounds_alternate(pool):
    case = Case(2, 16, 4, 2048, 512, "bf16", "bf16")
    distinct = [Round(seed, rows=rows) for seed, rows in enumerate((1, 512, 8, 300, 64, 511))]
    pool.run(play_prepared, case, distinct, 1000 if GPUS > 1 else 60, ranks=2)


def test_active_ranks_and_resets(pool):
    case = Case(4, experts=9, top_k=3, wire="mxfp4", combine_wire="fp32")
    pool.run(shrink_and_grow, "nvlink", case, ranks=4)
    pool.run(resets, "nvlink", Case(2), 12, ranks=2)


def test_three_objects_interleave(pool):
    pool.run(interleaved, "nvlink", ranks=4)
