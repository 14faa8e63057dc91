"""Timing a layer: its three phases one after the other, round after round, on all ranks at once.

On GPUs each phase, and the whole layer, is a CUDA graph where nothing in it waits for the device.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a.bench.graphs import capture
from moe_a2a.bench.timing import Quantiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_a2a.bench.cases import Effort
    from moe_a2a.bench.graphs import StartLine

    Call = Callable[[], object]

__all__ = ["PHASES", "LayerTimings", "measure_layer"]

PHASES = ("prepare", "experts", "finalize")
_MOST = 20_000  # rounds
_LEAST, _LONGEST = 5, 10e9  # rounds, and nanoseconds that more than those may take
_BATCH = 8  # rounds on a GPU between two looks at the start line, the first one not counted


class LayerTimings(NamedTuple):
    """Quantiles of one rank, microseconds. ``prepare``: quantize and dispatch; ``finalize``:
    combine; ``layer``: all three. ``captured``: whether replays of graphs were timed."""

    prepare: Quantiles
    experts: Quantiles
    finalize: Quantiles
    layer: Quantiles
    iterations: int
    captured: bool = False

    def shares(self) -> dict[str, float]:
        """By phase, of the sum of the three medians."""
        medians = {phase: getattr(self, phase).median for phase in PHASES}
        total = sum(medians.values())
        return {phase: value / total if total else 0.0 for phase, value in medians.items()}


def measure_layer(
    phases: Sequence[Call], effort: Effort, line: StartLine | None, captured: bool = False
) -> list[LayerTimings]:
    """Times the three calls on every rank. Collective.

    Args:
        line: where the streams of GPUs meet, None on the CPU.
        captured: in CUDA graphs; the last thing that runs is a whole layer.

    Returns:
        By rank, the same on every rank.
    """
    loop = _on_host if line is None else _on_device
    graphs = [capture(phase) for phase in phases] if captured else []
    calls = [graph.replay for graph in graphs] or phases
    warm = loop(calls, max(effort.warmup, 1), line)
    usual = torch.tensor(sorted(map(sum, warm))[len(warm) // 2])
    dist.all_reduce(usual, op=dist.ReduceOp.MAX)
    wanted = max(effort.iterations, int(effort.seconds * 1e9 / max(int(usual), 1)))
    affordable = max(_LEAST, int(_LONGEST / max(int(usual), 1)))
    count = min(wanted, affordable, _MOST)
    rounds = loop(calls, count, line)
    layers = [sum(times) for times in rounds]
    if captured:
        spent = _launches(count, line)
        rounds = [[max(time - spent, 0) for time in times] for times in rounds]
        whole = capture(lambda: [phase() for phase in phases])
        loop([whole.replay], max(effort.warmup, 1), line)
        layers = [max(time - spent, 0) for (time,) in loop([whole.replay], count, line)]
    prepare, experts, finalize = (Quantiles.of(part) for part in zip(*rounds, strict=True))
    own = LayerTimings(prepare, experts, finalize, Quantiles.of(layers), len(rounds), captured)
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _launches(rounds: int, line: StartLine | None) -> int:
    """Nanoseconds that a graph with nothing in it takes between two events."""
    nothing = [capture(lambda: None) for _ in PHASES]
    times = [t for each in _on_device([g.replay for g in nothing], rounds, line) for t in each]
    return sorted(times)[len(times) // 2]


def _on_host(phases: Sequence[Call], rounds: int, line: StartLine | None) -> list[list[int]]:
    """Nanoseconds of each phase, round by round."""
    found, clock = [], time.perf_counter_ns
    for _ in range(rounds):
        times, last = [], clock()
        for phase in phases:
            phase()
            now = clock()
            times.append(now - last)
            last = now
        found.append(times)
    return found


def _on_device(phases: Sequence[Call], rounds: int, line: StartLine | None) -> list[list[int]]:
    """The same between CUDA events."""
    found: list[list[int]] = []
    assert line is not None
    while len(found) < rounds:
        marks = []
        line()
        for _ in range(_BATCH):
            marks.append([_event() for _ in range(len(phases) + 1)])
            marks[-1][0].record()
            for phase, mark in zip(phases, marks[-1][1:], strict=True):
                phase()
                mark.record()
        torch.cuda.synchronize()
        # The first round carries what the ranks' starts differ by.
        found.extend(
            [round(float(a.elapsed_time(b)) * 1e6) for a, b in pairwise(events)]
            for events in marks[1:]
        )
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
