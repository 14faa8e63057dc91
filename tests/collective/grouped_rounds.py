"""Rounds of rows grouped by expert that every rank can foresee.

T tokens of a rank, H hidden_size, W ep_size, R runtime_max_tokens, N places of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tests import oracle, oracle_grouped
from tests.collective import rounds

if TYPE_CHECKING:
    import numpy as np

    from moe_a2a import AllToAll, Grouped
    from moe_a2a.testing import RankContext
    from tests.collective.rounds import Case, Round


@dataclass(frozen=True)
class Outcome:
    """What a round comes to on one rank."""

    mine: oracle.Tokens
    lists: oracle_grouped.Lists
    rows: np.ndarray  # float32 [N, H], what the experts write
    sums: np.ndarray  # [T, H], in `result_dtype`
    returned: np.ndarray  # float32 [W, R, H], the same by way of combine(): y


def rows_dtype(rnd: Round) -> str:
    return rnd.output or "bf16"


def result_dtype(case: Case, rnd: Round) -> str:
    return case.combine_wire if case.combine_wire in rounds.TORCH else rows_dtype(rnd)


def foreseen(case: Case, rnd: Round, rank: int, align: int) -> Outcome:
    tokens = [rounds.tokens_of(case, rnd, peer) for peer in range(case.size)]
    summed = case.combine_wire if case.combine_wire in rounds.TORCH else "fp32"
    found = []
    for peer in range(case.size):
        arrives = rounds.expected(case, rnd, peer, tokens)
        own = case.spec().experts_of(peer)
        lists = oracle_grouped.group(arrives.ids, arrives.weights, arrives.counts, own, align)
        rng = rounds.number_generator(case, rnd, peer, 4)
        shape = (len(lists.row_index), case.hidden)
        rows = rounds.values(case, rnd, rng, shape, rows_dtype(rnd))
        y = oracle_grouped.sums(rows, lists, summed).reshape(case.size, -1, case.hidden)
        found.append((lists, rows, y))
    sums = oracle.combine(
        tokens[rank],
        [y for _, _, y in found],
        rank,
        num_experts=case.experts,
        combine_wire=case.combine_wire,
        dtype=result_dtype(case, rnd),
        active=rounds.active_set(case, rnd),
    )
    return Outcome(tokens[rank], *found[rank][:2], sums, found[rank][2])


def experts(case: Case, rnd: Round, rows: np.ndarray, grouped: Grouped) -> torch.Tensor:
    """[N, H] with NaN in every gap, in the memory that the round wants."""
    index = grouped.row_index
    there = rounds.floats(rows, rows_dtype(rnd)).to(index.device)
    there[index < 0] = torch.nan
    return rounds.placed(there, rnd.memory == "strided")


def check_lists(got: Grouped, want: oracle_grouped.Lists) -> None:
    if got.row_index.is_cuda:  # a copy must not stand in line behind a dispatch that waits
        torch.cuda.current_stream().synchronize()
    for name, array in want._asdict().items():
        rounds.same(name, getattr(got, name).cpu().numpy(), array)


def play(a2a: AllToAll, ranks: RankContext, case: Case, rnd: Round, align: int) -> torch.Tensor:
    """One round against the oracle; what came back."""
    want = foreseen(case, rnd, ranks.rank, align)
    recv = rounds.send(a2a, case, rnd, want.mine)
    lists = recv.group(align)
    check_lists(lists, want.lists)
    rows = experts(case, rnd, want.rows, lists)
    out = None
    if rnd.memory == "strided":
        dtype, shape = rounds.TORCH[result_dtype(case, rnd)], want.sums.shape
        out = rounds.placed(torch.full(shape, 5.0, dtype=dtype, device=rows.device), True)
    result = a2a.combine_grouped(rows, lists, out=out)
    a2a.check()
    assert out is None or result is out
    assert a2a.phase == "idle"
    rounds.same_values("combine_grouped", result, want.sums)
    return result


def play_rounds(ranks: RankContext, backend: str, case: Case, played: list, **options) -> None:
    """A rank function; ``played``: rounds, each with its align."""
    with rounds.opened(ranks, backend, case, **options) as a2a:
        for number, (rnd, align) in enumerate(played):
            try:
                play(a2a, ranks, case, rnd, align)
            except AssertionError as error:  # noqa: PERF203
                raise AssertionError(f"round {number} ({rnd}, align {align}): {error}") from None
