"""Every wire with every combine wire, byte for byte; inputs of every kind that a wire takes."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from moe_a2a.backends import shm
from moe_a2a.spec import COMBINE_WIRES
from tests.collective.rounds import Case, Round, play_rounds
from tests.oracle_formats import WIRES

QUANTIZED = [wire for wire in WIRES if wire not in ("bf16", "fp16")]


def play_cases(ranks, backend, cases, rounds):
    return [play_rounds(ranks, backend, case, rounds) for case in cases]


@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_with_every_combine_wire(pool, every_backend, wire):
    cases = [Case(3, wire=wire, combine_wire=combine_wire) for combine_wire in COMBINE_WIRES]
    rounds = [Round(1), Round(2, specials=True, output="fp16"), Round(3, output="fp32")]
    pool.run(play_cases, every_backend, cases, rounds, ranks=3)


def test_inputs_of_every_dtype_and_caller_quantized_rows(pool, every_backend):
    rounds = [
        Round(seed, source=source, specials=source != "wire", strided=strided)
        for seed, source in enumerate(("fp16", "fp32", "wire", "bf16"))
        for strided in (False, True)
    ]
    more = {"scrub": "all", "extra": {"request": 8, "lora": 1}}
    cases = [Case(2, wire=wire, hidden=256, more=more) for wire in QUANTIZED]
    pool.run(play_cases, every_backend, cases, rounds, ranks=2)


def test_plain_rows_keep_every_bit_and_may_be_strided(pool, every_backend):
    more = {"extra": {"b": 3, "a": 130}}
    cases = [Case(2, wire=wire, more=more) for wire in ("bf16", "fp16")]
    rounds = [Round(n, specials=True, strided=True, wide_ids=bool(n % 2)) for n in range(4)]
    pool.run(play_cases, every_backend, cases, rounds, ranks=2)


def test_mxfp8_rows_padded_to_256_columns(pool, every_backend):
    case = Case(2, hidden=2880, wire="mxfp8", combine_wire="mxfp8", more={"alignment": 256})
    assert case.spec().row_bytes == (3072, 96)
    rounds = [Round(1), Round(2, source="wire"), Round(3, specials=True)]
    pool.run(play_rounds, every_backend, case, rounds, ranks=2)


def test_deferred_rounds_travel_as_bf16_between_quantized_ones(pool, every_backend):
    more = {"allow_defer": True, "scrub": "all"}
    rounds = [Round(seed, defer=bool(seed % 2), rows=seed + 1) for seed in range(4)]
    cases = [Case(2, wire=wire, more=more) for wire in QUANTIZED]
    pool.run(play_cases, every_backend, cases, rounds, ranks=2)


def test_nvfp4_global_scale(pool, every_backend):
    scales = (None, 896.0, 1.0, 2.0**-20, 3.7e5)
    rounds = [Round(seed, global_scale=scale) for seed, scale in enumerate(scales)]
    rounds += [replace(rnd, specials=True) for rnd in rounds]
    pool.run(play_rounds, every_backend, Case(2, wire="nvfp4"), rounds, ranks=2)


def play_both(ranks, case, rounds):
    shm = play_rounds(ranks, "shm", case, rounds)
    assert shm == play_rounds(ranks, "shm", case, rounds), "two runs differ"
    assert shm == play_rounds(ranks, "collective", case, rounds), "the backends differ"


def test_backends_and_runs_agree_to_the_bit(pool):
    for combine_wire in ("bf16", "fp32", "mxfp8"):
        case = Case(4, experts=10, top_k=6, wire="nvfp4", combine_wire=combine_wire)
        pool.run(play_both, case, [Round(seed) for seed in range(3)], ranks=4)


def play_streaming(ranks, cases, rounds):
    """As in rounds larger than the caches, whose rows are written past them."""
    with mock.patch.object(shm, "_cached_bytes", lambda: 0, create=True):
        for case in cases:
            play_rounds(ranks, "shm", case, rounds)


def test_rows_written_past_the_caches(pool):
    more = {"scrub": "all", "extra": {"a": 1, "b": 67, "c": 130}}
    pairs = [("bf16", "fp32"), ("fp8", "fp16"), ("mxfp8", "mxfp8"), ("nvfp4", "fp8_block128")]
    cases = [
        Case(3, wire=wire, combine_wire=back, hidden=hidden, more=more)
        for wire, back in [*pairs, ("mxfp4", "bf16")]
        for hidden in (128, 640)
    ]
    rounds = [Round(n, strided=n % 2 == 1, memory=("own", "strided")[n % 2]) for n in range(4)]
    pool.run(play_streaming, cases, rounds, ranks=3)
