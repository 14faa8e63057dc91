"""Rows grouped by expert, there and back, on every backend."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import PayloadError, PeerTimeout, StateError
from moe_a2a.spec import COMBINE_WIRES
from tests.collective import grouped_rounds, rounds
from tests.collective.grouped_rounds import foreseen, play_rounds
from tests.collective.places import meet
from tests.collective.rounds import TORCH, Case, Round, opened
from tests.oracle_formats import WIRES


@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_every_combine_wire_from_every_dtype(pool, every_backend, back):
    case = Case(3, experts=10, top_k=5, hidden=384, capacity=12, combine_wire=back)
    played = [
        (Round(seed, output=dtype, memory=memory, specials=seed % 3 == 2, rows=rows), align)
        for seed, (dtype, memory, rows, align) in enumerate(
            (dtype, memory, rows, align)
            for dtype in ("bf16", "fp16", "fp32")
            for memory, rows, align in (("own", None, 16), ("strided", 5, 32), ("own", 9, 128))
        )
    ]
    pool.run(play_rounds, every_backend, case, played, ranks=3)


@pytest.mark.parametrize("wire", WIRES)
def test_every_wire(pool, every_backend, wire):
    case = Case(2, experts=7, top_k=3, wire=wire, combine_wire="fp32")
    pool.run(play_rounds, every_backend, case, [(Round(1), 32), (Round(2), 128)], ranks=2)


@pytest.mark.parametrize(
    ("case", "routing", "align"),
    [
        (Case(4, experts=3, top_k=2), "distinct", 1),  # a rank without experts
        (Case(4, experts=3, top_k=2), "random", 32),
        (Case(1, experts=9, top_k=8), "distinct", 1),
        (Case(2, experts=64, top_k=32, capacity=20), "distinct", 1),
        (Case(2, experts=6, top_k=4), "duplicates", 16),
        (Case(3, experts=6, top_k=2), "hot", 8),
        (Case(3, experts=6, top_k=2), "nowhere", 8),
        (Case(3, more={"invalid_expert_id": 99}), "invalid", 8),
    ],
    ids=str,
)
def test_geometries_and_routings(pool, every_backend, case, routing, align):
    played = [
        (Round(1, routing=routing), align),
        (Round(2, routing=routing, rows=1), align),
        (Round(3, routing=routing, tokens=(0, case.capacity)), align),
        (Round(4, routing=routing, rows=0, tokens=(0,)), align),
    ]
    pool.run(play_rounds, every_backend, case, played, ranks=case.size)


def as_combine(ranks, backend, case, played):
    """The bits are those of combine on the sums."""
    quantized = case.combine_wire not in TORCH
    with opened(ranks, backend, case) as a2a:
        for rnd in played:
            grouped = grouped_rounds.play(a2a, ranks, case, rnd, 8)
            want = foreseen(case, rnd, ranks.rank, 8)
            rounds.send(a2a, case, rnd, want.mine)
            y = rounds.floats(want.returned, "fp32" if quantized else case.combine_wire)
            out = a2a.combine(y.to(a2a.device)).to(grouped.dtype)
            a2a.check()
            assert torch.equal(grouped.cpu(), out.cpu())


@pytest.mark.parametrize("back", COMBINE_WIRES)
def test_the_bits_are_those_of_combine(pool, every_backend, back):
    case = Case(2, experts=8, top_k=6, hidden=256, capacity=10, combine_wire=back)
    played = [Round(seed, output=("bf16", "fp32")[seed % 2]) for seed in range(4)]
    pool.run(as_combine, every_backend, case, played, ranks=2)


def fewer_ranks(ranks, backend, case):
    with opened(ranks, backend, case, timeout=20) as a2a:
        grouped_rounds.play(a2a, ranks, case, Round(1), 8)
        active = (True, False, True)
        if ranks.rank != 1:
            grouped_rounds.play(a2a, ranks, case, Round(2, active=active), 8)
        meet(ranks)
        a2a.reset()
        grouped_rounds.play(a2a, ranks, case, Round(3), 8)


def test_inactive_ranks_are_left_out(pool, every_backend):
    case = Case(3, experts=7, top_k=3, combine_wire="mxfp8")
    pool.run(fewer_ranks, every_backend, case, ranks=3)


def in_turn(ranks, backend, case):
    """With combine, and debug's poison and traces."""
    with opened(ranks, backend, case, debug=True) as a2a:
        for seed in range(6):
            rnd = Round(seed, rows=(6, 1, 4)[seed % 3])
            if seed % 2:
                rounds.play(a2a, ranks, case, rnd)
            else:
                grouped_rounds.play(a2a, ranks, case, rnd, 8)
        assert a2a.wait_times().combine[1 - ranks.rank].count == 6


def test_both_combines_take_turns_in_debug_mode(pool, every_backend):
    pool.run(in_turn, every_backend, Case(2, top_k=3, combine_wire="fp8_block128"), ranks=2)


def without_a_place(ranks, backend):
    """A row one of whose choices stands nowhere comes back as NaN, and no other does."""
    case = Case(2, experts=2, top_k=2, combine_wire="fp32")
    x = torch.ones(3, case.hidden, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 1], [0, -1], [1, 0]]), torch.ones(3, 2)
    with opened(ranks, backend, case) as a2a:
        call = [tensor.to(a2a.device) for tensor in (x, ids, weights)]
        lists = a2a.dispatch(*call).group(8)
        rows = torch.ones(len(lists.row_index), case.hidden, device=a2a.device)
        if ranks.rank == 1:
            lists.positions[case.capacity, lists.positions[case.capacity] >= 0] = -2
        out = a2a.combine_grouped(rows, lists).cpu()
        a2a.check()
    if ranks.rank == 1:  # the owner's own first token
        assert out[0].isnan().all()
        assert torch.equal(out[1:], torch.tensor([[1.0], [2.0]]).expand(2, case.hidden))
    else:
        assert torch.equal(out, torch.tensor([[2.0], [1.0], [2.0]]).expand(3, case.hidden))


def test_rows_without_a_place_are_nan(pool, every_backend):
    pool.run(without_a_place, every_backend, ranks=2)


def refusals(ranks, backend):
    case = Case(2, experts=4, top_k=2, combine_wire="bf16")
    rnd = Round(1, rows=4, tokens=(4,))
    want = foreseen(case, rnd, ranks.rank, 8)
    with opened(ranks, backend, case, timeout=20) as a2a:
        with pytest.raises(StateError, match="combine_grouped in phase 'idle': dispatch comes"):
            a2a.combine_grouped(None, None)
        recv = rounds.send(a2a, case, rnd, want.mine)
        lists = recv.group(8)
        rows = grouped_rounds.experts(case, rnd, want.rows, lists)
        other = grouped_rounds.experts(case, rnd, want.rows, lists).float()
        wrong = [
            ((rows, None), "grouped is NoneType"),
            ((rows[1:], lists), r"rows is bfloat16.*\[\d+, 128\]"),
            ((rows.double(), lists), "rows is float64.*bfloat16 or float16 or float32"),
            ((rows[:, 1:], lists), "rows is bfloat16"),
            ((rows.T.contiguous().T, lists), "contiguous"),
            ((rows, replaced(lists, "positions", lists.positions[1:])),
             r"grouped.positions is int32 \[7, 2\].*\[8, 2\]"),
            ((rows, replaced(lists, "positions", lists.positions.long())), "positions is int64"),
            ((rows, replaced(lists, "positions", lists.positions.T.contiguous().T)), "positions"),
            ((rows, replaced(lists, "row_weights", lists.row_weights.double())), "row_weights"),
            ((rows, replaced(lists, "row_weights", lists.row_weights[1:])), "row_weights"),
        ]  # fmt: skip
        for (given, grouped), text in wrong:
            with pytest.raises(PayloadError, match=text):
                a2a.combine_grouped(given, grouped)
        with pytest.raises(PayloadError, match="rows requires grad"):
            a2a.combine_grouped(other.clone().requires_grad_(), lists)
        for out, text in (
            (torch.empty(4, 128, device=rows.device), "out is float32.*bfloat16"),
            (rows[:4], "out shares memory with rows"),
            (torch.empty(3, 128, dtype=torch.bfloat16, device=rows.device), "out is bfloat16"),
        ):
            with pytest.raises(PayloadError, match=text):
                a2a.combine_grouped(rows, lists, out=out)
        result = a2a.combine_grouped(other, lists)
        assert result.dtype == torch.bfloat16
        a2a.check()
        rounds.same_values("after refusals", result, want.sums)


def replaced(lists, name, value):
    parts = {field: getattr(lists, field) for field in vars(lists)} | {name: value}
    return type(lists)(**parts)


def test_wrong_arguments_change_nothing(pool, every_backend):
    pool.run(refusals, every_backend, ranks=2)


def test_rows_may_not_lie_in_the_receive_views():
    with AllToAll(Spec(1, 2, 1, 64, 4)) as a2a:
        x, weights = torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(4, 1)
        recv = a2a.dispatch(x, torch.tensor([[0], [0], [1], [1]]), weights)
        lists = recv.group(1)
        with pytest.raises(PayloadError, match="rows lies in the receive views"):
            a2a.combine_grouped(recv.x.view(4, 64), lists)
        inside = replaced(lists, "positions", recv.topk_ids.view(4, 1))
        with pytest.raises(PayloadError, match=r"grouped.positions lies in the receive views"):
            a2a.combine_grouped(recv.x.view(4, 64).clone(), inside)
        assert torch.equal(a2a.combine_grouped(recv.x.view(4, 64).clone(), lists), x)


def one_is_missing(ranks, backend):
    case = Case(2)
    with opened(ranks, backend, case, timeout=1) as a2a:
        want = foreseen(case, Round(1), ranks.rank, 8)
        lists = rounds.send(a2a, case, Round(1), want.mine).group(8)
        if ranks.rank == 0:
            with pytest.raises(PeerTimeout) as caught:
                a2a.combine_grouped(grouped_rounds.experts(case, Round(1), want.rows, lists), lists)
                a2a.check()
            assert (caught.value.ranks, caught.value.phase) == ((1,), "combine")
        meet(ranks)
        a2a.reset()
        grouped_rounds.play(a2a, ranks, case, Round(2), 8)


def test_a_rank_that_does_not_come_is_named(pool, every_backend):
    pool.run(one_is_missing, every_backend, ranks=2)
