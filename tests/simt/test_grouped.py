"""Rows by local expert with the CUDA kernels on the CPU: the lists, and combine_grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a import Grouped, grouped
from moe_a2a.grouped import Choices, listed
from moe_a2a.spec import COMBINE_WIRES
from tests import oracle_grouped as oracle
from tests.collective import grouped_rounds
from tests.collective.rounds import Case, Round, same
from tests.collective.test_grouped import fewer_ranks, in_turn, one_is_missing, without_a_place
from tests.simt.backend import library, register
from tests.simt.playing import KINDS, NEEDS, on_a_device

pytestmark = NEEDS


def drawn(size, rows, top_k, experts, seed, most=None):
    """Choices of experts 3 to 3 + experts, and of others; padding rows name some of them too."""
    rng = np.random.default_rng([seed, size, rows, top_k, experts])
    ids = rng.integers(-1, most or experts + 6, (size, rows, top_k))
    if seed % 2:  # nearly all to a few experts
        ids = np.where(rng.random(ids.shape) < 0.8, 3 + ids % 4, ids)
    weights = rng.random(ids.shape, np.float32)
    counts = rng.integers(rows // 2, rows + 1, size) if rows else np.zeros(size)
    return ids.astype(np.int32), weights, counts.astype(np.int32)


def check(given, experts, align, first=3):
    choices = Choices(*(torch.from_numpy(array.copy()) for array in given), first, experts)
    got = Grouped(*listed(choices, align, library()))
    want = oracle.group(*given, range(first, first + experts), align)
    for name, array in want._asdict().items():
        same(f"{name} of {choices.topk_ids.shape}", getattr(got, name).numpy(), array)
    return want


@pytest.mark.parametrize("align", [1, 32, 128])
def test_lists_are_those_of_the_cpu(align, way):
    shapes = [(1, 1, 1, 1), (2, 9, 3, 5)]
    shapes += [(3, 40, 8, 64), (4, 5, 2, 0), (2, 0, 4, 7), (2, 70, 32, 33), (2, 512, 8, 361)]
    for seed, (size, rows, top_k, experts) in enumerate(shapes * 2):
        check(drawn(size, rows, top_k, experts, seed), experts, align)


@pytest.fixture(params=["one block", "three kernels"])
def way(request, monkeypatch):
    if request.param == "three kernels":
        monkeypatch.setattr(grouped, "_ONE_BLOCK", -1)


def test_many_segments():
    """Several passes of a warp over its own segment; more segments than lanes."""
    check(drawn(4, 1100, 8, 40, 2), 40, 128)
    check(drawn(2, 600, 8, 256, 3), 256, 16)


@pytest.mark.slow
def test_more_experts_than_shared_memory_holds():
    check(drawn(1, 300, 8, 8300, 2), 8300, 4)


def test_choices_without_a_place(way):
    given = drawn(2, 30, 4, 2, 2, most=5)
    given[0][:, :, :] = np.where(given[0] < 3, 3, given[0])
    given[2][:] = 30
    for align in (1, 8, 50):
        want = check(given, 2, align)
        assert (want.positions == -2).any()
        assert want.expert_offsets[-1] == len(want.row_index) // align * align


def play_grouped(ranks, kind, case, played):
    register()
    grouped_rounds.play_rounds(ranks, kind, case, played)


def registered(ranks, function, *args):
    register()
    function(ranks, *args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_every_combine_wire_from_every_dtype(pool, back, kind):
    case = Case(2, experts=9, top_k=7, hidden=384, capacity=12, combine_wire=back)
    played = [
        (Round(seed, output=dtype, memory=memory, specials=seed == 3, rows=rows), 16)
        for seed, (dtype, memory, rows) in enumerate(
            (dtype, memory, rows)
            for dtype in ("bf16", "fp16", "fp32")
            for memory, rows in (("own", None), ("strided", 5))
        )
    ]
    pool.run(play_grouped, kind, case, played, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_rows_of_several_runs(pool, back):
    """Few tokens, but R of a large round: some warps push while the others sum."""
    case = Case(2, experts=6, top_k=5, hidden=17536, capacity=120, combine_wire=back)
    played = [
        (Round(1, tokens=(9, 2), rows=120, output="fp32"), 1),
        (Round(2, tokens=(1, 7), rows=120, memory="strided"), 8),
    ]
    pool.run(play_grouped, "simt", case, played, ranks=2)


@pytest.mark.parametrize("back", ["bf16", "fp32", "mxfp8"])
def test_any_grid(pool, back):
    """One block: all push, then sum. More: some warps push, the last units come from a counter.
    Who sends most changes: nothing may lie in a place that was empty the round before."""
    case = Case(3, experts=12, top_k=8, hidden=640, capacity=60, combine_wire=back)
    turns = ((37, 3, 60), (60, 37, 3), (3, 60, 37))
    memory = ("own", "strided", "own")
    played = [(Round(n, tokens=turns[n], memory=memory[n]), 8) for n in range(3)]
    for blocks in (1, 2, 3):
        pool.run(on_a_device, 3 * blocks, "simt", case, played, play_grouped, ranks=3)


@pytest.mark.parametrize(
    "case",
    [
        Case(4, experts=3, top_k=2, capacity=9),  # a rank without experts
        Case(1, experts=32, top_k=32, capacity=5, combine_wire="fp8_block128"),
        Case(3, experts=40, top_k=32, capacity=9, hidden=128),
        Case(2, experts=6, top_k=2, capacity=300, hidden=16, combine_wire="fp16"),
    ],
    ids=str,
)
def test_geometries(pool, case):
    played = [
        (Round(1), 16),
        (Round(2, rows=1), 64),
        (Round(3, routing="nowhere"), 8),
        (Round(4, rows=0, tokens=(0,)), 8),
    ]
    pool.run(play_grouped, "simt", case, played, ranks=case.size)


def test_what_else_a_combine_is_held_to(pool):
    case = Case(3, experts=7, top_k=3, combine_wire="mxfp8")
    pool.run(registered, fewer_ranks, "simt", case, ranks=3)
    pool.run(registered, in_turn, "simt", Case(2, top_k=3, combine_wire="fp8_block128"), ranks=2)
    pool.run(registered, without_a_place, "simt", ranks=2)
    pool.run(registered, one_is_missing, "simt", ranks=2)
