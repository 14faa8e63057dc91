"""What one would use on GPUs without this library: NCCL, and torch's symmetric memory.

bf16 rows both ways. Whatever does not belong to the wire (packing, splits, index lists) is done
beforehand and costs them nothing.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens; n
rows that a dispatch delivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_a2a.bench.check import destinations
from moe_a2a.bench.rivals import newest
from moe_a2a.bench.symmetric import symmetric

if TYPE_CHECKING:
    from moe_a2a.spec import Spec

__all__ = ["DeviceRival", "DeviceRound", "NcclAllToAll", "NcclGather", "SymmetricMemory"]

_WORD = 8
_SMALL = 1 << 20  # bytes to a peer up to which an SM kernel copies faster than the copy engine


class DeviceRound(NamedTuple):
    """What a rival moves, on this rank's GPU.

    Attributes:
        payload: [T, row] in the wire's storage dtype; scales: [T, s] or None.
        goes: bool [T, W] on the CPU; arriving: rows from each source; rows: R.
    """

    payload: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    goes: Tensor
    arriving: list[int]
    rows: int
    spec: Spec
    rank: int


class DeviceRival(Protocol):
    """``dispatch`` and ``combine`` are timed, the rest is not."""

    name: ClassVar[str]
    captured: ClassVar[bool]  # whether CUDA graphs may hold its calls
    ordered: ClassVar[bool]  # whether rows arrive in the source's order
    exact: ClassVar[bool]  # whether it adds in fp32 and in the oracle's order

    @staticmethod
    def unusable(spec: Spec) -> str | None:
        """Why not, in a sentence; None where it works."""
        ...

    def __init__(self, round: DeviceRound) -> None: ...

    def dispatch(self) -> Tensor:
        """Payload rows [n, row] as they arrived."""
        ...

    def scales(self) -> Tensor | None:
        """Their scales [n, s]."""
        ...

    def here(self) -> Tensor:
        """int64: which of them have an expert here, rank-major."""
        ...

    def stage(self, y: Tensor) -> None:
        """Takes what the experts made, bf16 [n, H], 0 in rows without an expert here."""
        ...

    def combine(self) -> None:
        """Sends it back."""
        ...

    def output(self) -> Tensor:
        """[T, H] bf16."""
        ...

    def close(self) -> None:
        """Collective."""
        ...


def _bf16_only(spec: Spec) -> str | None:
    if (spec.wire, spec.combine_wire) != ("bf16", "bf16"):
        return "moves bf16 both ways"
    return None


class _Packed:
    """Rows packed by destination, and the sum of what came back."""

    def __init__(self, round: DeviceRound) -> None:
        device = round.payload.device
        tokens = round.goes.t().nonzero()[:, 1].contiguous()
        self.tokens = tokens.to(device)
        self.sent: list[int] = round.goes.sum(0).tolist()
        self.arriving = round.arriving
        self.rows = round.payload.index_select(0, self.tokens)
        self._shape = round.payload.shape

    def summed(self, back: Tensor) -> Tensor:
        """Rows in rank order onto their tokens, fp32, rounded once."""
        total = torch.zeros(self._shape, device=back.device)
        first = 0
        for count in self.sent:  # one rank after another: index_add_ on a GPU has no order
            part = slice(first, first + count)
            total.index_add_(0, self.tokens[part], back[part].float())
            first += count
        return total.to(back.dtype)


class NcclAllToAll:
    """all_to_all_single of deduplicated rows, packed and with their splits known beforehand."""

    name: ClassVar[str] = "NCCL a2a, wire only"
    captured: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @staticmethod
    def unusable(spec: Spec) -> str | None:
        return _bf16_only(spec)

    def __init__(self, round: DeviceRound) -> None:
        self._packed = _Packed(round)
        hidden = round.payload.shape[1]
        self._rows = round.payload.new_empty(sum(round.arriving), hidden)
        self._back = torch.empty_like(self._packed.rows)

    def dispatch(self) -> Tensor:
        packed = self._packed
        dist.all_to_all_single(self._rows, packed.rows, packed.arriving, packed.sent)
        return self._rows

    def scales(self) -> Tensor | None:
        return None

    def here(self) -> Tensor:
        return torch.arange(self._rows.shape[0])

    def stage(self, y: Tensor) -> None:
        self._y = y

    def combine(self) -> None:
        dist.all_to_all_single(self._back, self._y, self._packed.sent, self._packed.arriving)

    def output(self) -> Tensor:
        return self._packed.summed(self._back)

    def close(self) -> None:
        pass


class NcclGather:
    """All ranks' rows and choices to everyone; back by reduce-scatter in bf16."""

    name: ClassVar[str] = "NCCL all-gather"
    captured: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @staticmethod
    def unusable(spec: Spec) -> str | None:
        return _bf16_only(spec)

    def __init__(self, round: DeviceRound) -> None:
        self._round = round
        self._all_gather = newest("all_gather_single", "all_gather_into_tensor")
        self._reduce_scatter = newest("reduce_scatter_single", "reduce_scatter_tensor")
        tokens, size = round.payload.shape[0], round.spec.ep_size
        most = torch.tensor([tokens])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        assert int(most) == tokens, "every rank brings as many tokens"
        self._rows = round.payload.new_empty(size * tokens, round.payload.shape[1])
        self._choices = torch.cat([round.topk_ids, round.topk_weights.view(torch.int32)], 1)
        self._all_choices = self._choices.new_empty(size * tokens, self._choices.shape[1])
        self._out = torch.empty_like(round.payload)

    def dispatch(self) -> Tensor:
        self._all_gather(self._rows, self._round.payload)
        self._all_gather(self._all_choices, self._choices)
        return self._rows

    def scales(self) -> Tensor | None:
        return None

    def here(self) -> Tensor:
        spec = self._round.spec
        ids = self._all_choices[:, : spec.top_k].cpu()
        goes = destinations(ids, spec.num_experts, spec.ep_size)
        return goes[:, self._round.rank].nonzero().squeeze(1)

    def stage(self, y: Tensor) -> None:
        self._y = y

    def combine(self) -> None:
        self._reduce_scatter(self._out, self._y)

    def output(self) -> Tensor:
        return self._out

    def close(self) -> None:
        pass


class _Copy(NamedTuple):
    """int64 [n, words]: ``source`` to ``target``, which is a peer's memory. every: 0..n-1."""

    target: Tensor
    source: Tensor
    every: Tensor

    def run(self) -> None:
        if self.target.numel() * _WORD > _SMALL:
            self.target.copy_(self.source)
        else:
            torch.index_select(self.source, 0, self.every, out=self.target)


class SymmetricMemory:
    """Packed rows copied into the peers' memory, then torch's barrier.

    The strongest that torch offers within a host without multicast and without NVSHMEM: small
    copies are a kernel's remote stores, large ones the copy engine's.
    """

    name: ClassVar[str] = "symmetric memory"
    captured: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @staticmethod
    def unusable(spec: Spec) -> str | None:
        return _bf16_only(spec)

    def __init__(self, round: DeviceRound) -> None:
        self._packed = packed = _Packed(round)
        self._rank, size = round.rank, round.spec.ep_size
        found: list[Any] = [None] * size
        dist.all_gather_object(found, (packed.sent, packed.arriving))
        hidden, device = round.payload.shape[1], round.payload.device
        # Where each rank's rows begin at each destination, and where mine begin on their way back.
        at = [sum(found[to][1][: self._rank]) for to in range(size)]
        back_at = [sum(found[to][0][: self._rank]) for to in range(size)]
        most = max(max(sum(sent), sum(arrived)) for sent, arrived in found)
        half = most * hidden * 2
        self._memory = symmetric(2 * half, device)
        there = [r[:half].view(torch.bfloat16).view(most, hidden) for r in self._memory.regions]
        back = [r[half:].view(torch.bfloat16).view(most, hidden) for r in self._memory.regions]
        self._rows = there[self._rank][: sum(packed.arriving)]
        self._back = back[self._rank][: sum(packed.sent)]
        self._sends = _copies(packed.rows, packed.sent, there, at)
        self._y = torch.zeros_like(self._rows)
        self._returns = _copies(self._y, packed.arriving, back, back_at)

    def dispatch(self) -> Tensor:
        self._move(self._sends)
        return self._rows

    def _move(self, copies: list[_Copy]) -> None:
        for copy in copies:
            copy.run()
        # One barrier an operation is enough: whoever writes into this memory next has left the
        # barrier of the operation after, and its readers entered that when they were done.
        self._memory.handle.barrier(channel=0)

    def scales(self) -> Tensor | None:
        return None

    def here(self) -> Tensor:
        return torch.arange(self._rows.shape[0])

    def stage(self, y: Tensor) -> None:
        self._y.copy_(y)

    def combine(self) -> None:
        self._move(self._returns)

    def output(self) -> Tensor:
        return self._packed.summed(self._back)

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()


def _copies(rows: Tensor, counts: list[int], windows: list[Tensor], at: list[int]) -> list[_Copy]:
    """Consecutive ``rows``, ``counts[to]`` of them to each window, there from row ``at[to]`` on."""
    found, first = [], 0
    words = rows.view(torch.int64)  # an element is what a thread of index_select copies
    for window, count, start in zip(windows, counts, at, strict=True):
        if count:
            target = window[start : start + count].view(torch.int64)
            every = torch.arange(count, device=rows.device)
            found.append(_Copy(target, words[first : first + count], every))
        first += count
    return found
