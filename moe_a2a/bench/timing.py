"""Timing one point: dispatch and combine in turn, back to back, on all ranks at once.

No barriers between calls: each waits for every rank, so the ranks align themselves, as they do in
a model's layers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_a2a.bench.cases import Effort
    from moe_a2a.bench.graphs import DeviceTimings

__all__ = ["Quantiles", "Samples", "Timings", "measure", "slowest"]

_MOST = 20_000  # iterations


class Samples(NamedTuple):
    """Nanoseconds of this rank, one entry per iteration; a pair runs from dispatch to combine."""

    dispatch: list[int]
    combine: list[int]
    pair: list[int]


class Quantiles(NamedTuple):
    """Microseconds over the iterations of one rank."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(nanoseconds: Sequence[int]) -> Quantiles:
        ordered, last = sorted(nanoseconds), len(nanoseconds) - 1
        at = (round(last * share) for share in (0.5, 0.1, 0.9))
        return Quantiles(*(ordered[index] / 1e3 for index in at))


class Timings(NamedTuple):
    """Quantiles of one rank."""

    dispatch: Quantiles
    combine: Quantiles
    pair: Quantiles
    iterations: int

    @staticmethod
    def of(samples: Samples) -> Timings:
        dispatch, combine, pair = (Quantiles.of(part) for part in samples)
        return Timings(dispatch, combine, pair, len(samples.pair))


def measure(
    dispatch: Callable[[], object], combine: Callable[[], object], effort: Effort
) -> list[Timings]:
    """Times the two calls on every rank. Collective.

    Returns:
        By rank, the same on every rank.
    """
    warm = _loop(dispatch, combine, max(effort.warmup, 1))
    usual = torch.tensor(sorted(warm.pair)[len(warm.pair) // 2])
    if dist.is_initialized():
        dist.all_reduce(usual, op=dist.ReduceOp.MAX)
    wanted = max(effort.iterations, int(effort.seconds * 1e9 / max(int(usual), 1)))
    own = Timings.of(_loop(dispatch, combine, max(1, min(wanted, _MOST))))
    if not dist.is_initialized():
        return [own]
    found: list[Timings] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _loop(
    dispatch: Callable[[], object], combine: Callable[[], object], iterations: int
) -> Samples:
    samples, clock = Samples([], [], []), time.perf_counter_ns
    for _ in range(iterations):
        start = clock()
        dispatch()
        between = clock()
        combine()
        end = clock()
        samples.dispatch.append(between - start)
        samples.combine.append(end - between)
        samples.pair.append(end - start)
    return samples


def slowest(ranks: Sequence[Timings] | Sequence[DeviceTimings], part: str) -> Quantiles:
    """The figure of a point: quantiles of the rank whose median is the largest.

    ``part``: dispatch, combine or pair; of `DeviceTimings` also host_dispatch and host_combine.
    """
    found: list[Quantiles] = [getattr(timings, part) for timings in ranks]
    return max(found, key=lambda quantiles: quantiles.median)
