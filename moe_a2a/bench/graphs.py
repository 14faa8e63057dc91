"""Timing on GPUs: CUDA graphs between events, on ranks that start together.

A replay's host cost is hidden: the stream sleeps first, so the host has queued everything by the
time the ranks meet. Times are nanoseconds.
"""

from __future__ import annotations

import time
import warnings
from itertools import pairwise, starmap
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a.bench.connect import shares_gpu
from moe_a2a.bench.timing import Quantiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_a2a.bench.cases import Effort

    Call = Callable[[], object]

__all__ = ["DeviceTimings", "StartLine", "by_rank", "capture", "measure_on_device", "replay_times"]

_AHEAD = 1_000_000  # cycles that the stream sleeps, half a millisecond
_BATCH = 8  # rounds between two looks at the start line, the first one not counted
_DRAIN = 16  # eager rounds between two synchronizations: the launch queue must not fill
_HOST_ROUNDS = 320


class DeviceTimings(NamedTuple):
    """Microseconds on one rank.

    ``dispatch`` and ``combine`` are what each adds alone, ``pair`` is both back to back; ``host_*``
    is what an eager call keeps the host for. ``captured``: whether replays of graphs were timed.
    """

    dispatch: Quantiles
    combine: Quantiles
    pair: Quantiles
    host_dispatch: Quantiles
    host_combine: Quantiles
    iterations: int
    captured: bool


class StartLine:
    """Where the ranks' streams meet. Call it, then record the first event.

    An all-reduce lets ranks go within a few microseconds of each other; ``exchange``, where there
    is one (link.py), within one.
    """

    def __init__(self, device: torch.device) -> None:
        self._shared = shares_gpu()
        self._word = torch.zeros(1, device=device)
        self.exchange: Call | None = None

    def __call__(self) -> None:
        if self._shared:
            torch.cuda.synchronize()
            dist.barrier()
            return
        torch.cuda._sleep(_AHEAD)  # type: ignore[no-untyped-call]
        dist.all_reduce(self._word)
        if self.exchange is not None:
            self.exchange()


def capture(call: Call, times: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of ``times`` calls."""
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the empty graph is empty
        # NCCL's watchdog thread looks at events all the time; only this thread is capturing.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(times):
                call()
    return graph


def replay_times(call: Call, line: StartLine, replays: int, warmup: int, per: int) -> list[int]:
    """Nanoseconds of ``call`` over ``per``, one sample a replay."""
    marks = []
    for _ in range(warmup + replays):
        start, end = _event(), _event()
        line()
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [_between(start, end) // per for start, end in marks[warmup:]]


def _alternate(first: Call, second: Call, line: StartLine, rounds: int) -> tuple[list[int], ...]:
    """Nanoseconds of each of two calls that take turns, at least ``rounds`` samples each."""
    found: tuple[list[int], ...] = ([], [])
    while len(found[0]) < rounds:
        marks = [_event() for _ in range(2 * _BATCH + 1)]
        line()
        marks[0].record()
        for index in range(_BATCH):
            first()
            marks[2 * index + 1].record()
            second()
            marks[2 * index + 2].record()
        torch.cuda.synchronize()
        times = list(starmap(_between, pairwise(marks)))
        # The first round of a batch carries what the ranks' starts differ by.
        found[0].extend(times[2::2])
        found[1].extend(times[3::2])
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _between(start: torch.cuda.Event, end: torch.cuda.Event) -> int:
    return round(float(start.elapsed_time(end)) * 1e6)


def _host_times(dispatch: Call, combine: Call, rounds: int) -> tuple[list[int], list[int]]:
    found: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    for index in range(rounds):
        start = clock()
        dispatch()
        between = clock()
        combine()
        end = clock()
        found[0].append(between - start)
        found[1].append(end - between)
        if index % _DRAIN == _DRAIN - 1:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return found


def measure_on_device(
    dispatch: Call, combine: Call, effort: Effort, pairs: int, line: StartLine, captured: bool
) -> list[DeviceTimings]:
    """Times the two calls on every rank, in graphs where ``captured``. Collective.

    Returns:
        By rank, the same on every rank.
    """
    host = _host_times(dispatch, combine, _DRAIN if shares_gpu() else _HOST_ROUNDS)

    def together() -> None:
        dispatch()
        combine()

    if captured:
        whole = capture(together, pairs)
        pair = replay_times(whole.replay, line, effort.iterations, effort.warmup, pairs)
        halves = capture(dispatch), capture(combine)
        first, second = _alternate(halves[0].replay, halves[1].replay, line, effort.iterations)
        nothing = [capture(lambda: None) for _ in range(2)]
        empty = _alternate(nothing[0].replay, nothing[1].replay, line, effort.iterations)
        spent = sorted([*empty[0], *empty[1]])[len(empty[0])]
    else:
        pair = replay_times(together, line, effort.iterations, effort.warmup, 1)
        first, second = _alternate(dispatch, combine, line, effort.iterations)
        spent = 0
    own = DeviceTimings(
        Quantiles.of([max(t - spent, 0) for t in first]),
        Quantiles.of([max(t - spent, 0) for t in second]),
        Quantiles.of(pair),
        Quantiles.of(host[0]),
        Quantiles.of(host[1]),
        len(pair),
        captured,
    )
    return by_rank(own)


def by_rank(own: DeviceTimings) -> list[DeviceTimings]:
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
