"""The link's bound: what the wires between two GPUs allow, with no routing and no protocol.

Measured in the same run as everything else: how fast remote stores go when both sides store, and
how long the smallest exchange of a payload takes (csrc/cuda/link.h).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a.bench.check import CheckFailed
from moe_a2a.bench.graphs import StartLine, capture, replay_times
from moe_a2a.bench.symmetric import symmetric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Link", "LinkLimits", "no_link"]

_PAYLOADS = (1_920, 14_400, 57_600, 115_200, 460_800, 921_600, 1_843_200, 3_686_400)
_SHAPES = ((8, 256), (16, 256), (32, 512), (64, 512), (128, 512), (128, 1024))
_STORE_BYTES = 64 << 20
_STORE_SHAPES = ((32, 512), (64, 512), (132, 512), (132, 1024))
_LINE_BYTES = -(-_PAYLOADS[-1] // 120) * 128  # a line is 120 bytes of payload and 8 of epoch
_CAPTURED, _REPLAYS, _WARMUP = 40, 12, 3


class LinkLimits(NamedTuple):
    """Attributes:
    bytes_per_us: of remote stores, each way while both ways are busy.
    exchanges: (bytes each way, microseconds), ascending.
    """

    bytes_per_us: float
    exchanges: tuple[tuple[int, float], ...]

    def floor(self, nbytes: int) -> float:
        """Microseconds below which no exchange of so many bytes each way has been seen.

        Between the payloads measured the curve is interpolated, past the last it goes on at the
        bandwidth of stores; nowhere is it below the bytes over that bandwidth.
        """
        sizes, times = zip(*self.exchanges, strict=True)
        if nbytes <= sizes[0]:
            curve = times[0]
        elif nbytes >= sizes[-1]:
            curve = times[-1] + (nbytes - sizes[-1]) / self.bytes_per_us
        else:
            after = next(index for index, size in enumerate(sizes) if size >= nbytes)
            share = (nbytes - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
            curve = times[after - 1] + share * (times[after] - times[after - 1])
        return float(max(curve, nbytes / self.bytes_per_us))

    def as_dict(self) -> dict[str, Any]:
        return {"bytes_per_us": self.bytes_per_us, "exchanges": [list(e) for e in self.exchanges]}


def no_link(ep_size: int) -> str | None:
    """Why the bound can't be measured; None where it can."""
    if ep_size % 2:
        return f"the link's bound pairs up ranks, and there are {ep_size}"
    return None


class Link:
    """Rank 2n and rank 2n+1 of the default group. Collective, and so is every call."""

    def __init__(self, device: torch.device) -> None:
        from moe_a2a._ops import cuda_library

        self._library = cuda_library()
        rank = dist.get_rank()
        self._rank, peer = rank, rank ^ 1
        self._lines = symmetric(2 * _LINE_BYTES, device)
        self._target = symmetric(_STORE_BYTES, device)
        self._to = self._lines.regions[peer].data_ptr()
        self._from = self._lines.regions[rank].data_ptr()
        self._store_to = self._target.regions[peer].data_ptr()
        self._source = _numbers(_STORE_BYTES, rank).to(device)
        self._sink = torch.zeros(_PAYLOADS[-1], dtype=torch.uint8, device=device)
        self._state = torch.zeros(3, dtype=torch.int64, device=device)
        torch.cuda.synchronize()

    def exchange(self, nbytes: int, blocks: int, threads: int) -> None:
        """One exchange of ``nbytes`` each way on the current stream."""
        self._library.link_exchange(
            self._to, self._from, self._source.data_ptr(), self._sink.data_ptr(), nbytes,
            _LINE_BYTES, self._state.data_ptr(), blocks, threads, _stream(),
        )  # fmt: skip

    def meet(self) -> None:
        """For `StartLine`: the smallest exchange, with one block."""
        self.exchange(120, 1, 32)

    def limits(self, line: StartLine) -> LinkLimits:
        """Measures, and compares what arrived.

        Raises:
            CheckFailed: a payload did not arrive.
        """
        self._check()
        stores = min(
            self._time(lambda b=blocks, t=threads: self._store(b, t), line, 4)  # type: ignore[misc]
            for blocks, threads in _STORE_SHAPES
        )
        curve = [
            min(
                self._time(lambda n=n, b=b, t=t: self.exchange(n, b, t), line, _CAPTURED)  # type: ignore[misc]
                for b, t in _SHAPES
            )
            for n in _PAYLOADS
        ]
        self._check()
        return LinkLimits(_STORE_BYTES / stores, tuple(_ascending(_PAYLOADS, curve)))

    def _store(self, blocks: int, threads: int) -> None:
        self._library.link_store(
            self._store_to, self._source.data_ptr(), _STORE_BYTES, blocks, threads, _stream()
        )

    def _time(self, call: Callable[[], object], line: StartLine, times: int) -> float:
        """Microseconds of one call on the slowest rank."""
        call()
        graph = capture(call, times)
        own = statistics.median(replay_times(graph.replay, line, _REPLAYS, _WARMUP, times)) / 1e3
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return max(found)

    def _check(self) -> None:
        self._sink.zero_()
        dist.barrier()  # an exchange gives up after two seconds
        self.exchange(_PAYLOADS[-1], 128, 512)
        self._store(64, 512)
        torch.cuda.synchronize()
        dist.barrier()
        wanted = _numbers(_STORE_BYTES, self._rank ^ 1)
        stored = self._target.regions[self._rank].cpu()
        if int(self._state[2]) or not torch.equal(self._sink.cpu(), wanted[: self._sink.numel()]):
            raise CheckFailed("the link's exchange did not deliver its payload")
        if not torch.equal(stored, wanted):
            raise CheckFailed("the link's stores did not arrive")
        dist.barrier()


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _numbers(nbytes: int, rank: int) -> torch.Tensor:
    """uint8 [nbytes] that tell one rank and one place from another."""
    generator = torch.Generator().manual_seed(rank)
    words = torch.randint(-(2**62), 2**62, (nbytes // 8,), generator=generator)
    return words.view(torch.uint8)


def _ascending(sizes: Sequence[int], times: Iterable[float]) -> list[tuple[int, float]]:
    """A larger payload is never quicker; where it looks so, that is the spread."""
    found: list[tuple[int, float]] = []
    for size, taken in zip(sizes, times, strict=True):
        found.append((size, max(taken, found[-1][1]) if found else taken))
    return found
