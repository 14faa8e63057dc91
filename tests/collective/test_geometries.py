"""World sizes, experts that do not divide, routing at its extremes, rounds of every size."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.testing import run_ranks
from tests.collective.rounds import Case, Round, play_rounds
from tests.conftest import PRELOAD, sizes

ROUTINGS = ("random", "hot", "first", "nowhere", "duplicates", "invalid", "distinct")


def play_cases(ranks, backend, cases_and_rounds):
    return [play_rounds(ranks, backend, case, rounds) for case, rounds in cases_and_rounds]


def test_every_routing_at_every_world_size(pool, every_backend):
    rounds = [Round(n, routing=name, wide_ids=bool(n % 2)) for n, name in enumerate(ROUTINGS)]
    rounds += [Round(9, routing="invalid", wide_ids=True), Round(10, routing="invalid")]
    for size in sizes(every_backend, 1, 2, 3, 4, 8):
        pool.run(play_rounds, every_backend, Case(size, experts=2 * size + 1), rounds, ranks=size)


@pytest.mark.parametrize("size", [3, 4])
def test_experts_that_do_not_divide_or_are_few(pool, every_backend, size):
    rounds = [Round(1), Round(2, routing="hot"), Round(3, routing="duplicates")]
    counts = (size, size - 1, 1, size + 1, 2 * size - 1, 61)
    cases = [(Case(size, experts=n, top_k=min(n, 3)), rounds) for n in counts]
    pool.run(play_cases, every_backend, cases, ranks=size)


def test_top_k_from_1_to_32(pool, every_backend):
    rounds = [Round(1, routing="distinct"), Round(2), Round(3, routing="invalid", wide_ids=True)]
    cases = [(Case(3, experts=40, top_k=k), rounds) for k in (1, 2, 7, 31, 32)]
    pool.run(play_cases, every_backend, cases, ranks=3)


def test_rounds_of_every_size(pool, every_backend):
    """R from 0 to the capacity and back; T = R, T = 0 on some ranks and on all."""
    rounds = [Round(rows, rows=rows, tokens=(rows,)) for rows in (0, 1, 6, 2, 5, 0, 3)]
    rounds += [Round(20, tokens=(0, 6)), Round(21, tokens=(6, 0)), Round(22, tokens=(0,))]
    rounds += [Round(23, rows=4, tokens=(0, 4, 1)), Round(24, rows=0, tokens=(0,), wide_ids=True)]
    cases = [
        (Case(3, wire="fp8", more={"scrub": "all"}), rounds),
        (Case(3, wire="mxfp4", combine_wire="mxfp8"), rounds),
        (Case(3, capacity=6, experts=2), rounds),
    ]
    pool.run(play_cases, every_backend, cases, ranks=3)


def test_invalid_expert_id(pool, every_backend):
    rounds = [Round(1, routing="invalid"), Round(2, routing="invalid", wide_ids=True), Round(3)]
    for invalid in (8, 2**31 - 1, -7, -(2**31)):
        case = Case(3, more={"invalid_expert_id": invalid})
        pool.run(play_rounds, every_backend, case, rounds, ranks=3)


def whole_tokens(ranks):
    """Enough ranks for every bit of a mask; one round in full, checked by its sums."""
    size, hidden = ranks.size, 16
    spec = Spec(size, size + 3, 4, hidden, 3, combine_wire="fp32")
    ids = torch.tensor([[0, size + 2, 31, 40], [-1, -1, ranks.rank, 63], [62, 63, 64, 65]])
    with AllToAll(spec, ranks.group, backend="shm", timeout=40) as a2a:
        for number in range(3):
            x = torch.full((3, hidden), float(ranks.rank + number), dtype=torch.bfloat16)
            recv = a2a.dispatch(x, ids, torch.ones(3, 4))
            here = recv.counts.tolist()
            for source, count in enumerate(here):
                assert (recv.x[source, :count] == source + number).all()
            out = a2a.combine(recv.x.float())
            distinct = [len({owner_of_67(e, size) for e in row if e >= 0}) for row in ids.tolist()]
            want = torch.tensor(distinct)[:, None] * float(ranks.rank + number)
            assert torch.equal(out, want.expand(3, hidden)), (ranks.rank, number)
    return sum(here)


def owner_of_67(expert: int, size: int) -> int:
    return expert // 2 if expert < 6 else expert - 3  # 3 ranks own two experts, the rest one


@pytest.mark.slow
def test_64_ranks():
    exits = run_ranks(64, whole_tokens, preload=PRELOAD, timeout=60)
    assert [rank.error for rank in exits if rank.exitcode] == []
    # The second row goes to two ranks, except where expert `rank` and expert 63 live together.
    assert sum(rank.result for rank in exits) == 64 * (4 + 2 + 4) - 1


def test_more_ranks_than_a_mask_has_bits_still_have_a_workspace():
    """ep_size <= 64 is a rule of the one-sided backends only."""
    spec = Spec(ep_size=72, num_experts=288, top_k=8, hidden_size=128, max_tokens_per_rank=4)
    assert spec.workspace_bytes() > 72 * 4 * 256
