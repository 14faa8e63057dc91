"""Rounds of ranks that are streams of one GPU, byte for byte against the oracle and `shm`.

A peer is microseconds away here, so this is where many rounds are played.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_a2a.spec import COMBINE_WIRES
from tests.collective.rounds import Case, Round, opened, play_rounds
from tests.collective.test_active_ranks import alone, resets, shrink_and_grow
from tests.collective.test_geometries import ROUTINGS
from tests.collective.test_many_objects import interleaved
from tests.collective.test_random_rounds import cases, fits, round_of
from tests.collective.test_wires import QUANTIZED
from tests.cuda.playing import GPU, MILLISECOND, run_streams
from tests.cuda.prepared import Log, Prepared, keep_up
from tests.oracle_formats import WIRES

EXTRAS = {"request": 8, "lora": 1, "odd": 130}


def play_all(ranks, cases_and_rounds, options=None):
    """The digests of all rounds."""
    found = []
    for case, rounds in cases_and_rounds:
        try:
            found += play_rounds(ranks, "nvlink", case, rounds, **(options or {}))
        except AssertionError as error:  # noqa: PERF203
            raise AssertionError(f"{case}: {error}") from None
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_with_every_combine_wire(wire, size):
    rounds = [Round(1), Round(2, specials=True, output="fp16"), Round(3, output="fp32", rows=1)]
    pairs = [(Case(size, wire=wire, combine_wire=back), rounds) for back in COMBINE_WIRES]
    run_streams(size, play_all, pairs)


def test_the_bytes_are_those_of_shm(pool):
    rounds = [Round(seed, rows=rows) for seed, rows in enumerate((24, 1, 23, 5, 24, 2))]
    for wire, back in (("bf16", "bf16"), ("nvfp4", "mxfp8"), ("mxfp8", "fp8_block128")):
        case = Case(4, experts=10, top_k=6, capacity=24, wire=wire, combine_wire=back)
        there = pool.run(play_rounds, "shm", case, rounds, ranks=4)
        assert run_streams(4, play_all, [(case, rounds)]) == there, (wire, back)


@pytest.mark.parametrize("wire", QUANTIZED)
def test_inputs_of_every_dtype_and_caller_quantized_rows(wire):
    rounds = [
        Round(seed, source=source, specials=source != "wire", strided=strided, rows=rows)
        for seed, source in enumerate(("fp16", "fp32", "wire", "bf16"))
        for strided in (False, True)
        for rows in (40, 3)
    ]
    more = {"scrub": "all", "extra": EXTRAS, "allow_defer": True}
    rounds += [Round(seed, defer=bool(seed % 2), rows=5 * seed + 1) for seed in range(5)]
    case = Case(2, wire=wire, hidden=256, capacity=40, more=more)
    run_streams(2, play_all, [(case, rounds)])


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
def test_plain_rows_keep_every_bit_and_may_be_strided(wire):
    rounds = [
        Round(n, specials=True, strided=n % 3 > 0, wide_ids=n % 2 > 0, rows=(40, 2)[n // 2 % 2])
        for n in range(8)
    ]
    more = {"extra": EXTRAS}
    run_streams(2, play_all, [(Case(2, wire=wire, capacity=40, more=more), rounds)])


def test_padded_columns_and_global_scales():
    padded = Case(2, hidden=2880, wire="mxfp8", combine_wire="mxfp8", more={"alignment": 256})
    rounds = [Round(1), Round(2, source="wire"), Round(3, specials=True), Round(4, rows=1)]
    scales = (None, 896.0, 1.0, 2.0**-20, 3.7e5)
    scaled = [
        Round(seed, global_scale=scale, specials=specials)
        for seed, scale in enumerate(scales)
        for specials in (False, True)
    ]
    run_streams(2, play_all, [(padded, rounds), (Case(2, wire="nvfp4"), scaled)])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_routing_at_every_world_size(size):
    rounds = [Round(n, routing=name, wide_ids=bool(n % 2)) for n, name in enumerate(ROUTINGS)]
    rounds += [Round(9, routing="invalid", wide_ids=True), Round(10, routing="invalid", rows=3)]
    few = [Round(1), Round(2, routing="hot"), Round(3, routing="duplicates")]
    counts = (size, max(size - 1, 1), 1, size + 1, 2 * size - 1, 61)
    pairs = [(Case(size, experts=2 * size + 1), rounds)]
    pairs += [(Case(size, experts=n, top_k=min(n, 3)), few) for n in counts]
    run_streams(size, play_all, pairs)


def test_hidden_sizes_top_k_and_invalid_ids():
    some = [Round(1), Round(2, strided=True), Round(3, rows=1), Round(4, routing="hot", rows=9)]
    pairs = [
        (Case(3, hidden=hidden, capacity=9, combine_wire=back), some)
        for hidden in (16, 32, 48, 112, 128, 240, 256, 496, 1040, 4096, 7168)
        for back in ("bf16", "fp32")
    ]
    odd = [Round(1, routing="distinct"), Round(2), Round(3, routing="invalid", wide_ids=True)]
    pairs += [(Case(3, experts=40, top_k=k), odd) for k in (1, 2, 3, 7, 31, 32)]
    invalid = [Round(1, routing="invalid"), Round(2, routing="invalid", wide_ids=True), Round(3)]
    pairs += [
        (Case(3, more={"invalid_expert_id": i}), invalid) for i in (8, 2**31 - 1, -7, -(2**31))
    ]
    run_streams(3, play_all, pairs)


def test_rounds_of_every_size():
    """R from 0 to the capacity and back, over both ways to move rows; T = 0 on some and on all."""
    rounds = [Round(rows, rows=rows, tokens=(rows,)) for rows in (0, 1, 96, 2, 95, 0, 48, 3, 49)]
    rounds += [Round(20, tokens=(0, 96)), Round(21, tokens=(96, 0)), Round(22, tokens=(0,))]
    rounds += [Round(23, rows=4, tokens=(0, 4, 1)), Round(24, rows=0, tokens=(0,), wide_ids=True)]
    pairs = [
        (Case(3, capacity=96, wire="fp8", more={"scrub": "all"}), rounds),
        (Case(3, capacity=96, wire="mxfp4", combine_wire="mxfp8"), rounds),
        (Case(3, capacity=96, experts=2, more={"scrub": "all", "extra": EXTRAS}), rounds),
    ]
    run_streams(3, play_all, pairs)


@pytest.mark.parametrize(("wire", "back"), [("bf16", "bf16"), ("nvfp4", "mxfp8")])
def test_rows_as_wide_as_models_have(wire, back):
    case = Case(2, 32, 8, 7168, 160, wire, back)
    rounds = [Round(1, tokens=(160,)), Round(2, rows=8), Round(3), Round(4, rows=1)]
    run_streams(2, play_all, [(case, rounds)])


@pytest.mark.parametrize("wire", ["bf16", "mxfp4"])
def test_active_ranks_shrink_and_a_reset_grows_them(wire):
    case = Case(4, experts=9, top_k=3, wire=wire, combine_wire="fp32")
    run_streams(4, shrink_and_grow, "nvlink", case)


def test_a_rank_may_be_active_alone_and_resets_in_any_phase():
    run_streams(3, alone, "nvlink", Case(3))
    run_streams(3, resets, "nvlink", Case(3), 24)


def test_three_objects_interleave():
    run_streams(4, interleaved, "nvlink")


def play_many(ranks, case, distinct, count):
    """`count` rounds drawn from `distinct`; ranks dawdle on the device before either half."""
    shared, own = random.Random(case.size), random.Random(ranks.rank)
    pool = [Prepared(case, rnd, ranks.rank, GPU) for rnd in distinct]
    log = Log(count, GPU)
    with opened(ranks, "nvlink", case) as a2a:
        for number in range(count):
            prepared = shared.choice(pool)
            if own.random() < 0.05:
                torch.cuda._sleep(int(own.random() * MILLISECOND / 4))
            recv = a2a.dispatch(**prepared.call)
            if own.random() < 0.05:  # it reads its views while fast peers are at their combine
                torch.cuda._sleep(int(own.random() * MILLISECOND / 4))
            delivery = prepared.wrong_delivery(recv)
            out = a2a.combine(prepared.y)
            log.note(str(prepared.rnd), delivery, prepared.wrong_sums(out))
            keep_up(number)
        a2a.check()
        log.check()


@pytest.mark.parametrize(("size", "count"), [(2, 3000), (3, 1000), (4, 1000), (8, 400)])
@pytest.mark.parametrize("wire", ["bf16", "mxfp4"])
def test_thousands_of_rounds_of_random_size(wire, size, count):
    shared = random.Random(size)
    case = Case(size, 2 * size + 1, 3, 64, 32, wire, "fp32", {"extra": {"id": 8}})
    distinct = [
        Round(
            seed,
            rows=shared.choice((0, 1, 2, 4, 8, 15, 16, 17, 31, 32)),
            routing=shared.choice(("random", "hot", "invalid", "duplicates", "nowhere")),
            specials=seed % 3 == 0,
        )
        for seed in range(24)
    ]
    run_streams(size, play_many, case, distinct, count)


def test_small_and_large_rounds_alternate():
    """Decode and prefill of one object: packets in one round, rows in place in the next."""
    case = Case(2, 16, 4, 2048, 512, "bf16", "bf16")
    distinct = [
        Round(seed, rows=rows) for seed, rows in enumerate((1, 512, 8, 300, 64, 500, 128, 511))
    ]
    run_streams(2, play_many, case, distinct, 400)


@settings(max_examples=60)
@given(st.data())
def test_any_geometry_any_sequence_of_rounds(data):
    case = data.draw(cases().filter(fits))
    sequence = data.draw(st.lists(round_of(case), min_size=1, max_size=4))
    run_streams(case.size, play_all, [(case, sequence)])
