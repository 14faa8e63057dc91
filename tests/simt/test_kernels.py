"""The CUDA kernels on the CPU: rank processes over shared memory, byte for byte as everywhere."""

from __future__ import annotations

import os

import pytest
import torch

from moe_a2a import AllToAll
from moe_a2a.errors import PeerTimeout, StateError
from moe_a2a.spec import COMBINE_WIRES
from moe_a2a.testing import RankPool
from tests.collective.rounds import Case, Round, play
from tests.conftest import PRELOAD
from tests.oracle_formats import WIRES
from tests.simt.backend import register
from tests.simt.playing import KINDS, NEEDS, inputs, limited, on_a_device, play_case

pytestmark = NEEDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_there_and_back(pool, wire, kind):
    rounds = [Round(1), Round(2, specials=True, output="fp16", rows=2), Round(3, rows=1)]
    for back in COMBINE_WIRES:
        case = Case(2, wire=wire, combine_wire=back, capacity=12)
        pool.run(play_case, kind, case, rounds, ranks=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        Case(3, experts=7, top_k=5, capacity=40),
        Case(4, experts=3, top_k=2, capacity=40, hidden=256, wire="nvfp4"),
        Case(4, experts=64, top_k=20, capacity=150, hidden=512, combine_wire="fp32"),
        Case(1, experts=4, top_k=4, capacity=40, combine_wire="mxfp8"),
        Case(8, experts=20, top_k=6, capacity=9, hidden=16),
    ],
    ids=str,
)
def test_geometries(pool, case, kind):
    rounds = [Round(n, rows=min(rows, case.capacity)) for n, rows in enumerate((150, 3, 17, 1))]
    pool.run(play_case, kind, case, rounds, ranks=case.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire", ["bf16", "mxfp8", "nvfp4"])
def test_extras_scrubbing_strides_deferral_and_wide_ids(pool, wire, kind):
    more = {"scrub": "all", "extra": {"a": 8, "odd": 131}, "allow_defer": True}
    rounds = [
        Round(n, strided=n % 2 > 0, wide_ids=n % 3 > 0, rows=(30, 2, 11)[n % 3], defer=n % 4 == 3)
        for n in range(6)
    ]
    case = Case(2, wire=wire, hidden=288, capacity=30, more=more)
    pool.run(play_case, kind, case, rounds, ranks=2)


@pytest.mark.parametrize("source", ["fp16", "fp32", "wire"])
def test_other_inputs(pool, source):
    for wire in ("fp8", "fp8_block128", "mxfp4"):
        case = Case(2, wire=wire, hidden=384, capacity=9)
        rounds = [Round(n, source=source, rows=rows) for n, rows in enumerate((9, 1))]
        pool.run(play_case, "simt", case, rounds, ranks=2)


# Rows that no inbox takes: every round goes in bulk.
IN_BULK = {"extra": {"large": 65_536}}


@pytest.mark.parametrize("source", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire not in ("bf16", "fp16")])
def test_rows_of_several_parts_from_every_input(pool, wire, source):
    rounds = [
        Round(1, source=source, specials=True, tokens=(5, 4)),
        Round(2, source=source, strided=True, rows=2),
        Round(3, source=source, rows=4, global_scale=3.0 if wire == "nvfp4" else None),
    ]
    for more in ({}, IN_BULK):
        case = Case(2, wire=wire, hidden=2688, capacity=5, more={"alignment": 512, **more})
        pool.run(play_case, "simt", case, rounds, ranks=2)


def test_more_scales_than_a_warp_keeps(pool):
    case = Case(2, wire="nvfp4", hidden=9216, capacity=20, more=IN_BULK)
    pool.run(play_case, "simt", case, [Round(1, tokens=(20, 3))], ranks=2)


@pytest.mark.parametrize("hidden", [4096, 3840])
def test_plain_rows_of_several_parts(pool, hidden):
    rounds = [Round(1, tokens=(9, 7)), Round(2, strided=True, rows=3)]
    pool.run(play_case, "simt", Case(2, hidden=hidden, capacity=9, more=IN_BULK), rounds, ranks=2)


@pytest.mark.parametrize(
    ("multiprocessors", "ranks"), [(400, 2), pytest.param(25, 5, marks=pytest.mark.slow)]
)
def test_slots_from_what_many_blocks_say(pool, multiprocessors, ranks):
    """More blocks than lanes, fewer tokens than blocks, several tiles a block, an odd rank."""
    case = Case(ranks, experts=2 * ranks, top_k=2, hidden=16, capacity=330, more=IN_BULK)
    tokens = [(330, 170, 33, 1, 0), (79, 81, 5, 2, 330), (1, 2, 3, 4, 5)]
    rounds = [
        Round(n, tokens=counts[:ranks], rows=max(counts), routing="invalid")
        for n, counts in enumerate(tokens)
    ]
    pool.run(on_a_device, multiprocessors, "simt", case, rounds, ranks=ranks)


@pytest.mark.slow
def test_more_ranks_than_lanes():
    with RankPool(34, preload=PRELOAD) as pool:
        for capacity, more in ((40, {}), (4, IN_BULK)):
            case = Case(34, experts=68, top_k=6, hidden=64, capacity=capacity, more=more)
            pool.run(play_case, "simt", case, [Round(1, routing="invalid")], ranks=34)


@pytest.mark.parametrize(
    ("experts", "top_k"), [*((32, k) for k in (1, 2, 3, 4, 6, 7, 9, 12, 31)), (33, 6), (7, 4)]
)
@pytest.mark.parametrize("wide", [False, True])
def test_ids_of_any_width(pool, wide, experts, top_k):
    """More tokens than a block looks at in one go, tiles after the first; rows off any vector."""
    case = Case(2, experts=experts, top_k=top_k, hidden=16, capacity=3300)
    rounds = [
        Round(1, tokens=(3300, 1100), wide_ids=wide, routing="invalid"),
        Round(2, tokens=(500, 40), wide_ids=wide, strided=True),
        Round(3, tokens=(128, 97), rows=128, wide_ids=wide, routing="invalid"),
        Round(4, tokens=(1, 33), rows=40, wide_ids=wide, strided=True),
    ]
    pool.run(play_case, "simt", case, rounds, ranks=2)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_any_grid(pool, blocks):
    rounds = [Round(1), Round(2, rows=3), Round(3, rows=1)]
    for wire in ("bf16", "fp8"):
        case = Case(2, wire=wire, capacity=48)
        pool.run(limited, blocks, case, rounds, ranks=2)


@pytest.mark.parametrize(("wire", "back"), [("bf16", "bf16"), ("nvfp4", "mxfp8")])
def test_rows_of_a_real_model(pool, wire, back):
    case = Case(2, experts=256, top_k=8, hidden=7168, capacity=3, wire=wire, combine_wire=back)
    rounds = [Round(1, rows=rows) for rows in (3, 1, 2)]
    pool.run(play_case, "simt", case, rounds, ranks=2)


# Rounds of up to 1,024 tokens whose rows are not quantized: in packets, though they are large.
ALL_SIZES = [
    Round(1, tokens=(1024, 611), rows=1024),
    Round(2, tokens=(0, 2)),
    Round(3, tokens=(129, 300), rows=300, routing="invalid"),
    Round(4, tokens=(1500, 900)),
    Round(5, tokens=(513, 40), rows=1024, strided=True, wide_ids=True),
    Round(6, tokens=(128, 7), rows=128),
    Round(7, tokens=(33, 700), rows=700, routing="hot"),
    Round(8, tokens=(512, 1024), rows=1024, routing="nowhere"),
    Round(9, tokens=(1200, 900), rows=1200),
    Round(10, tokens=(1024, 1), rows=1024),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2, top_k=3, hidden=1024, capacity=1500),
        Case(2, experts=7, top_k=3, hidden=96, capacity=1500, more={"scrub": "all"}),
        Case(2, wire="fp8_block128", hidden=128, capacity=3000, more={"extra": {"odd": 131}}),
    ],
    ids=str,
)
def test_many_tokens_of_every_number(pool, case):
    """Small rounds, middling ones and those in bulk follow each other; what they leave is stale."""
    pool.run(play_case, "simt", case, ALL_SIZES, ranks=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        Case(3, experts=9, top_k=9, hidden=512, capacity=260),
        Case(4, experts=6, top_k=2, hidden=256, capacity=260, more={"scrub": "all"}),
        Case(5, experts=20, top_k=7, hidden=48, capacity=260, more={"extra": {"a": 8, "z": 515}}),
        Case(1, experts=4, top_k=4, hidden=256, capacity=260),
    ],
    ids=str,
)
def test_many_tokens_from_several_peers(pool, case, kind):
    rounds = [
        Round(1, tokens=(260, 130, 0, 31, 259)),
        Round(2, tokens=(1, 2, 3), rows=3),
        Round(3, tokens=(7, 260, 200, 1), wide_ids=True, routing="invalid"),
        Round(4, tokens=(140, 150, 129), rows=150, strided=True),
    ]
    pool.run(play_case, kind, case, rounds, ranks=case.size)


def test_many_tokens_that_the_caller_has_quantized(pool):
    case = Case(2, wire="mxfp8", hidden=256, capacity=400)
    rounds = [Round(n, source="wire", tokens=(400, 131), strided=n > 1) for n in (1, 2)]
    pool.run(play_case, "simt", case, rounds, ranks=2)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_many_tokens_on_any_grid(pool, blocks):
    case = Case(2, hidden=1024, capacity=300)
    rounds = [Round(1, tokens=(300, 129)), Round(2, tokens=(5, 200)), Round(3, rows=4)]
    pool.run(limited, blocks, case, rounds, ranks=2)


@pytest.mark.parametrize("hidden", [32, 384, 1024])
def test_many_tokens_with_a_warp_for_each_run(pool, hidden):
    """More multiprocessors: warps send and receive."""
    case = Case(3, top_k=4, hidden=hidden, capacity=160, more={"scrub": "all"})
    rounds = [Round(1, tokens=(160, 131, 3)), Round(2, tokens=(12, 160), wide_ids=True)]
    pool.run(on_a_device, 72, "simt", case, rounds, ranks=3)


def test_inactive_ranks(pool):
    active = (True, False, True)
    pool.run(without_one, Case(3, capacity=8), active, ranks=3)
    pool.run(without_one, Case(3, capacity=200, more={"scrub": "all"}), active, ranks=3)


def without_one(ranks, case, active):
    register()
    with AllToAll(case.spec(), ranks.group, backend="simt", timeout=20) as a2a:
        play(a2a, ranks, case, Round(1))
        if active[ranks.rank]:
            for rows in (case.capacity, 1):
                play(a2a, ranks, case, Round(2, rows=rows, active=active))


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_wrap_around(pool, kind):
    pool.run(wrap_around, kind, ranks=2)


def wrap_around(ranks, kind):
    """From 3 operations before 2^32 on, over packets and headers of as many rounds."""
    register()
    case = Case(2, capacity=8)
    with AllToAll(case.spec(), ranks.group, backend=kind, timeout=20) as a2a:
        play(a2a, ranks, case, Round(0))
        torch.distributed.barrier(ranks.group)
        impl = a2a._impl
        impl._library.restart(impl._endpoint, 2**32 - 3, 1, 1, 0)
        torch.distributed.barrier(ranks.group)
        for n in range(1, 6):
            play(a2a, ranks, case, Round(n, rows=(8, 1)[n % 2]))


@pytest.mark.slow
def test_a_rank_that_stays_away_is_named_and_all_go_on(pool):
    pool.run(one_stays_away, ranks=3)


def one_stays_away(ranks):
    register()
    case = Case(3, capacity=200)
    for rows in (200, 8, 1):
        with AllToAll(case.spec(), ranks.group, backend="simt", timeout=1) as a2a:
            play(a2a, ranks, case, Round(1, rows=rows))
            if ranks.rank != 1:
                a2a.dispatch(*inputs(case, rows), runtime_max_tokens=rows)
                with pytest.raises(PeerTimeout) as caught:
                    a2a.check()
                assert caught.value.ranks == (1,)
                assert (caught.value.phase, caught.value.round) == ("dispatch", 2)
                with pytest.raises(PeerTimeout):
                    a2a.dispatch(*inputs(case, rows), runtime_max_tokens=rows)
            torch.distributed.barrier(ranks.group)
            a2a.reset()
            play(a2a, ranks, case, Round(2, rows=rows))


@pytest.mark.parametrize(
    ("case", "warp"),
    [
        (Case(2, hidden=17536, capacity=120), 8),
        (Case(2, capacity=500, wire="mxfp8", hidden=256), -1),
    ],
    ids=["bulk", "packets"],
)
def test_a_block_that_is_dead_in_part_announces_nothing(pool, case, warp):
    """A warp that begins late sees that the rank has given up: it sends less than the others."""
    pool.run(dead_in_part, case, warp, ranks=2)


def dead_in_part(ranks, case, warp):
    register()
    with AllToAll(case.spec(), ranks.group, backend="simt", timeout=1, max_blocks=1) as a2a:
        play(a2a, ranks, case, Round(1))
        if ranks.rank == 0:
            os.environ["MOE_SIMT_FAILS_BEFORE_WARP"] = str(warp)
        try:
            a2a.dispatch(*inputs(case, case.capacity))
        finally:
            os.environ.pop("MOE_SIMT_FAILS_BEFORE_WARP", None)
        if ranks.rank == 1:
            with pytest.raises(PeerTimeout) as caught:
                a2a.check()
            assert caught.value.ranks == (0,)
        torch.distributed.barrier(ranks.group)


def test_ranks_that_disagree_both_hear_of_it(pool):
    pool.run(disagree, ranks=2)


def disagree(ranks):
    register()
    case = Case(2, capacity=8)
    with AllToAll(case.spec(), ranks.group, backend="simt", timeout=5) as a2a:
        a2a.dispatch(*inputs(case, 1), runtime_max_tokens=1 + ranks.rank)
        with pytest.raises(StateError, match="runtime_max_tokens=2"):
            a2a.check()
