"""Many rounds of changing size with ranks that dawdle, and geometries that hypothesis thinks up."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_a2a import AllToAll
from moe_a2a.spec import COMBINE_WIRES
from tests.collective import rounds
from tests.collective.rounds import Case, Round, play_rounds
from tests.oracle_formats import WIRES

CASE = Case(4, experts=10, top_k=3, hidden=32, capacity=5, wire="mxfp4", combine_wire="fp32")


def dawdle(ranks, backend, count, milliseconds):
    own = random.Random(ranks.rank)
    with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=20) as a2a:
        for number in range(count):
            shared = random.Random(number)
            rnd = Round(
                number,
                rows=shared.randint(0, CASE.capacity),
                routing=shared.choice(("random", "hot", "invalid", "duplicates")),
            )
            everyone = [rounds.tokens_of(CASE, rnd, rank) for rank in range(4)]
            sleep_sometimes(own, milliseconds)
            recv = rounds.send(a2a, CASE, rnd, everyone[ranks.rank])
            # A rank that sleeps here reads its views while fast peers are at their combine.
            sleep_sometimes(own, milliseconds)
            want = rounds.expected(CASE, rnd, ranks.rank, everyone)
            rounds.check_delivery(CASE, rnd, recv, want)
            check_combine(a2a, ranks, rnd, recv, everyone)


def sleep_sometimes(own, milliseconds):
    if own.random() < 0.2:
        time.sleep(own.random() * milliseconds / 1000)


def check_combine(a2a, ranks, rnd, recv, everyone):
    out = a2a.combine(rounds.experts(a2a, CASE, rnd, ranks.rank, recv))
    sums = rounds.oracle.combine(
        everyone[ranks.rank],
        [rounds.outputs_of(CASE, rnd, rank) for rank in range(4)],
        ranks.rank,
        num_experts=CASE.experts,
        combine_wire="fp32",
        dtype="fp32",
    )
    rounds.same_values(f"combine of round {rnd.seed}", out, sums)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("shm", 500), ("collective", 60)])
def test_many_rounds_with_ranks_that_dawdle(pool, backend, count):
    pool.run(dawdle, backend, count, 4, ranks=4)


def fits(case: Case) -> bool:
    try:
        case.spec()
    except ValueError:
        return False
    return True


@st.composite
def cases(draw, sizes: tuple[int, ...] = (1, 2, 3, 4)) -> Case:
    size = draw(st.sampled_from(sizes))
    experts = draw(st.integers(1, 3 * size + 2))
    more = {
        "scrub": draw(st.sampled_from(("ids", "all"))),
        "alignment": draw(st.sampled_from((32, 96, 256))),
        "invalid_expert_id": draw(st.sampled_from((-1, experts, -9))),
        "allow_defer": draw(st.booleans()),
        "extra": draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), max_size=3)),
    }
    return Case(
        size,
        experts,
        draw(st.integers(1, min(experts, 6))),
        draw(st.sampled_from((16, 32, 128, 160, 256, 640))),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(WIRES)),
        draw(st.sampled_from(COMBINE_WIRES)),
        more,
    )


@st.composite
def round_of(draw, case: Case) -> Round:
    rows = draw(st.integers(0, case.capacity))
    sources = ("bf16",) if case.unquantized else ("bf16", "fp16", "fp32", "wire")
    defer = draw(st.booleans()) and case.more["allow_defer"]
    return Round(
        seed=draw(st.integers(0, 2**20)),
        tokens=tuple(draw(st.lists(st.integers(0, rows), min_size=1, max_size=4))),
        rows=rows,
        routing=draw(
            st.sampled_from(("random", "hot", "first", "nowhere", "duplicates", "invalid"))
        ),
        source="bf16" if defer else draw(st.sampled_from(sources)),
        output=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        wide_ids=draw(st.booleans()),
        strided=draw(st.booleans()),
        specials=draw(st.booleans()),
        memory=draw(st.sampled_from(("own", "buffer", "strided"))),
        defer=defer,
    )


@settings(max_examples=60)
@given(st.data())
def test_any_geometry_any_sequence_of_rounds(pool, data):
    case = data.draw(cases().filter(fits))
    sequence = data.draw(st.lists(round_of(case), min_size=1, max_size=4))
    backend = data.draw(st.sampled_from(("shm", "collective")))
    pool.run(play_rounds, backend, case, sequence, ranks=case.size)
