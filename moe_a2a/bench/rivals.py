"""What one would use without this library: torch.distributed on gloo. bf16 rows both ways.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size; n rows that
a dispatch delivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_a2a.bench.check import destinations

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_a2a.bench.inputs import Inputs

__all__ = ["RIVALS", "Rival", "Round", "newest"]


class Round(NamedTuple):
    """What a rival moves. goes: bool [T, W]; arriving: rows from each source."""

    inputs: Inputs
    goes: Tensor
    arriving: list[int]
    num_experts: int
    rank: int
    ep_size: int


class Rival(Protocol):
    """``dispatch`` and ``combine`` are timed, the rest is not."""

    name: ClassVar[str]
    exact: ClassVar[bool]  # whether it adds in the oracle's order

    def __init__(self, round: Round) -> None: ...

    def dispatch(self) -> Tensor:
        """Rows [n, H] as they arrived."""
        ...

    def here(self) -> Tensor:
        """int64: which of them have an expert here, rank-major."""
        ...

    def combine(self, y: Tensor) -> None:
        """Sends y [n, H] back, 0 in rows without an expert here."""
        ...

    def output(self) -> Tensor:
        """[T, H] bf16."""
        ...


class WireOnly:
    """all_to_all_single of deduplicated rows, packed and with their splits known beforehand."""

    name: ClassVar[str] = "gloo a2a, wire only"
    exact: ClassVar[bool] = True

    def __init__(self, round: Round) -> None:
        self._tokens, self._tokens_of = _by_destination(round.goes)
        self._packed = round.inputs.x[self._tokens]
        self._arriving, self._shape = round.arriving, round.inputs.x.shape
        hidden = self._shape[1]
        self._rows = torch.empty(sum(self._arriving), hidden, dtype=torch.bfloat16)
        self._back = torch.empty_like(self._packed)

    def dispatch(self) -> Tensor:
        dist.all_to_all_single(self._rows, self._packed, self._arriving, self._tokens_of)
        return self._rows

    def here(self) -> Tensor:
        return torch.arange(self._rows.shape[0])

    def combine(self, y: Tensor) -> None:
        dist.all_to_all_single(self._back, y, self._tokens_of, self._arriving)

    def output(self) -> Tensor:
        return _summed(self._shape, self._tokens, self._back)


class Whole:
    """all_to_all_single and what belongs to it: routing, packing, counts, ids, weights, sum."""

    name: ClassVar[str] = "gloo a2a, whole"
    exact: ClassVar[bool] = True

    def __init__(self, round: Round) -> None:
        self._inputs, self._size = round.inputs, round.ep_size
        base, more = divmod(round.num_experts, round.ep_size)
        owned = [base + (rank < more) for rank in range(round.ep_size)]
        owner = torch.arange(round.ep_size).repeat_interleave(torch.tensor(owned))
        # One place more at the end: -1 routes nowhere.
        self._owner = torch.cat([owner, torch.tensor([round.ep_size])])

    def dispatch(self) -> Tensor:
        x, ids, weights = self._inputs
        goes = torch.zeros(ids.shape[0], self._size + 1, dtype=torch.bool)
        goes.scatter_(1, self._owner[ids.long()], True)
        self._tokens, self._sent = _by_destination(goes[:, : self._size])
        counts = torch.empty(self._size, dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(self._sent))
        self._arrived = counts.tolist()
        rows = torch.empty(sum(self._arrived), x.shape[1], dtype=x.dtype)
        packed = x.index_select(0, self._tokens)
        dist.all_to_all_single(rows, packed, self._arrived, self._sent)
        choices = torch.cat([ids, weights.view(torch.int32)], 1).index_select(0, self._tokens)
        self.choices = torch.empty(rows.shape[0], choices.shape[1], dtype=torch.int32)
        dist.all_to_all_single(self.choices, choices, self._arrived, self._sent)
        return rows

    def here(self) -> Tensor:
        return torch.arange(sum(self._arrived))

    def combine(self, y: Tensor) -> None:
        back = torch.empty(self._tokens.shape[0], y.shape[1], dtype=y.dtype)
        dist.all_to_all_single(back, y, self._sent, self._arrived)
        self._out = _summed(self._inputs.x.shape, self._tokens, back)

    def output(self) -> Tensor:
        return self._out


class GatherScatter:
    """All ranks' rows and choices to everyone; back by reduce-scatter in fp32."""

    name: ClassVar[str] = "gloo all-gather"
    exact: ClassVar[bool] = False

    def __init__(self, round: Round) -> None:
        self._round = round
        self._all_gather: Callable[..., object] = newest(
            "all_gather_single", "all_gather_into_tensor"
        )
        self._reduce_scatter: Callable[..., object] = newest(
            "reduce_scatter_single", "reduce_scatter_tensor"
        )
        try:
            self._reduce_scatter(torch.zeros(1), torch.zeros(round.ep_size))
        except RuntimeError:  # gloo of older torch has none
            self._reduce_scatter = self._by_all_reduce

    def dispatch(self) -> Tensor:
        x, ids, weights = self._round.inputs
        size, tokens = self._round.ep_size, x.shape[0]
        rows = torch.empty(size * tokens, x.shape[1], dtype=x.dtype)
        self._all_gather(rows, x)
        self.choices = torch.empty(size * tokens, 2 * ids.shape[1], dtype=torch.int32)
        self._all_gather(self.choices, torch.cat([ids, weights.view(torch.int32)], 1))
        return rows

    def here(self) -> Tensor:
        ids = self.choices[:, : self.choices.shape[1] // 2]
        goes = destinations(ids, self._round.num_experts, self._round.ep_size)
        return goes[:, self._round.rank].nonzero().squeeze(1)

    def combine(self, y: Tensor) -> None:
        total = torch.empty(self._round.inputs.x.shape)
        self._reduce_scatter(total, y.float())
        self._out = total.to(y.dtype)

    def _by_all_reduce(self, total: Tensor, partial: Tensor) -> None:
        dist.all_reduce(partial)
        total.copy_(partial.chunk(self._round.ep_size)[self._round.rank])

    def output(self) -> Tensor:
        return self._out


RIVALS: tuple[type[Rival], ...] = (
    WireOnly,
    Whole,
    GatherScatter,
)


def _by_destination(goes: Tensor) -> tuple[Tensor, list[int]]:
    """Tokens in the order of their destinations (int64), and how many go to each."""
    tokens = goes.t().nonzero()[:, 1].contiguous()
    return tokens, goes.sum(0).tolist()


def _summed(shape: torch.Size, tokens: Tensor, back: Tensor) -> Tensor:
    """Rows in rank order onto their tokens, fp32, rounded once."""
    return torch.zeros(shape).index_add_(0, tokens, back.float()).to(back.dtype)


def newest(*names: str) -> Callable[..., object]:
    """The first function of that name that this torch has: it renames collectives."""
    found: Callable[..., object] = next(
        getattr(dist, name) for name in names if hasattr(dist, name)
    )
    return found
