"""Rows grouped by expert on a GPU: the lists, the sums, and both in graphs whose inputs change."""

from __future__ import annotations

import pytest
import torch

from moe_a2a.grouped import Choices, listed
from moe_a2a.spec import COMBINE_WIRES
from tests.collective import grouped_rounds
from tests.collective.grouped_rounds import play_rounds
from tests.collective.places import meet, place_of
from tests.collective.rounds import Case, Round, call_of, opened, tokens_of
from tests.collective.test_grouped import (
    as_combine,
    fewer_ranks,
    in_turn,
    one_is_missing,
    refusals,
    without_a_place,
)
from tests.cuda import playing
from tests.cuda.playing import GPU, run_streams
from tests.cuda.prepared import keep_up
from tests.cuda.test_compile import ALONE
from tests.cuda.test_graphs import graph_of
from tests.oracle_formats import WIRES
from tests.simt.test_grouped import drawn


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_every_combine_wire_from_every_dtype(back, size):
    case = Case(size, experts=17, top_k=7, hidden=640, capacity=40, combine_wire=back)
    played = [
        (Round(seed, output=dtype, memory=memory, specials=seed % 3 == 2, rows=rows), 16)
        for seed, (dtype, memory, rows) in enumerate(
            (dtype, memory, rows)
            for dtype in ("bf16", "fp16", "fp32")
            for memory, rows in (("own", None), ("strided", 5), ("own", 1))
        )
    ]
    run_streams(size, play_rounds, "nvlink", case, played)


@pytest.mark.parametrize("wire", WIRES)
def test_every_wire(wire):
    case = Case(2, experts=7, top_k=3, wire=wire, combine_wire="fp32")
    run_streams(2, play_rounds, "nvlink", case, [(Round(1), 32), (Round(2), 128)])


@pytest.mark.parametrize("back", ["bf16", "mxfp8"])
def test_rows_as_wide_as_models_have(back):
    """Large rounds divide the warps of a block, and the last units come from a counter."""
    case = Case(2, 32, 8, 7168, 400, combine_wire=back)
    played = [(Round(1, tokens=(400,)), 128), (Round(2, rows=8), 32), (Round(3), 128)]
    run_streams(2, play_rounds, "nvlink", case, played)


@pytest.mark.parametrize(
    ("function", "case"),
    [
        (as_combine, Case(2, experts=8, top_k=6, hidden=256, capacity=10, combine_wire="mxfp8")),
        (as_combine, Case(2, experts=8, top_k=6, hidden=256, capacity=10)),
        (fewer_ranks, Case(3, experts=7, top_k=3, combine_wire="mxfp8")),
        (in_turn, Case(2, top_k=3, combine_wire="fp8_block128")),
    ],
)
def test_what_every_backend_is_held_to(function, case):
    more = ([Round(1), Round(2, output="fp32")],) if function is as_combine else ()
    run_streams(case.size, function, "nvlink", case, *more)


@pytest.mark.parametrize("function", [without_a_place, refusals, one_is_missing])
def test_mistakes_and_missing_ranks(function):
    run_streams(2, function, "nvlink")


@pytest.mark.parametrize(
    ("shape", "experts", "align"),
    [
        ((2, 9, 3), 5, 1),
        ((4, 1100, 8), 40, 128),
        ((8, 4096, 8), 512, 128),
        ((2, 4096, 32), 64, 32),
        ((1, 3000, 8), 9000, 4),  # more than shared memory holds
        ((4, 5, 2), 0, 32),
        ((2, 0, 4), 7, 32),
    ],
)
def test_lists_are_those_of_the_cpu(shape, experts, align):
    """Twice the same; nothing waits for the device."""
    arrays = drawn(*shape, experts, 2, most=max(4 * experts, 8))
    here = [torch.from_numpy(array.copy()) for array in arrays]
    there = [tensor.to(GPU) for tensor in here]
    want = listed(Choices(*here, 3, experts), align)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [listed(Choices(*there, 3, experts), align) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got in found:
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine.cpu(), theirs)


LISTS = ("row_index", "expert_offsets", "row_weights", "positions")


def layer_of(a2a, call):
    """Experts that halve their rows."""

    def layer():
        recv = a2a.dispatch(**call)
        lists = recv.group(16)
        rows, _ = recv.gather(lists)
        return a2a.combine_grouped(rows * 0.5, lists), lists

    return layer


def differ(one, other):
    """In any bit: rows that found no room in the lists are NaN."""
    return (one.view(torch.uint8) != other.view(torch.uint8)).any()


def play_graph(ranks, case, replays):
    """A graph of a whole layer, its inputs changed before each replay: as in eager code."""
    place, count = place_of(ranks, "nvlink"), 5
    routings = ("random", "hot", "invalid", "nowhere", "duplicates")
    rounds = [Round(seed, tokens=(9, 12), rows=12, routing=routings[seed]) for seed in range(count)]
    calls = [call_of(case, rnd, tokens_of(case, rnd, ranks.rank), place) for rnd in rounds]
    with opened(ranks, "nvlink", case) as a2a:
        grouped_rounds.play(a2a, ranks, case, Round(9, rows=12), 16)
        # What it copies to the host could stand behind a peer's kernel that waits for this rank.
        meet(ranks)
        eager = [layer_of(a2a, call)() for call in calls]
        given = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in calls[0].items()
        }
        graph, (out, lists) = playing.in_turn(ranks, lambda: graph_of(layer_of(a2a, given)))
        wrong = torch.zeros(count, 5, dtype=torch.int32, device=place)
        for number in range(replays):
            which = (number * 3 + number // 7) % count
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(calls[which][name])
            graph.replay()
            want, expected = eager[which]
            pairs = [(out, want)]
            pairs += [(getattr(lists, part), getattr(expected, part)) for part in LISTS]
            wrong[which] += torch.stack([differ(got, other) for got, other in pairs])
            keep_up(number)
        a2a.check()
        assert not wrong.any(), wrong.tolist()
        grouped_rounds.play(a2a, ranks, case, Round(10, rows=12), 16)
        meet(ranks)


@pytest.mark.parametrize("back", ["bf16", "mxfp8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_graph_with_other_ids_in_each_replay(size, back):
    case = Case(size, 9, 3, 256, 12, "bf16", back)
    run_streams(size, play_graph, case, 60)


def test_compiled_layers():
    torch.compiler.reset()
    torch.cuda.set_device(GPU)
    case = Case(1, 9, 3, 128, 12)
    with opened(ALONE, "nvlink", case) as a2a:

        def layer(x, ids, weights):
            recv = a2a.dispatch(x, ids, weights)
            lists = recv.group(8)
            rows, _ = recv.gather(lists)
            return a2a.combine_grouped(rows * 0.5, lists)

        fast = torch.compile(layer, fullgraph=True, backend="inductor")
        for seed in range(3):
            rnd = Round(seed, tokens=(12,))
            call = call_of(case, rnd, tokens_of(case, rnd, 0), GPU)
            given = [call[name] for name in ("x", "topk_ids", "topk_weights")]
            want = layer(*given)
            assert want.unique().numel() > 8, "this compares constants"
            assert torch.equal(fast(*given), want)
        a2a.check()
