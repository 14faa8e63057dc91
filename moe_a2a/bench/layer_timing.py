"""Timing a layer: its three phases one after the other, round after round, on all ranks at once."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

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
    combine; ``layer``: all three."""

    prepare: Quantiles
    experts: Quantiles
    finalize: Quantiles
    layer: Quantiles
    iterations: int

    def shares(self) -> dict[str, float]:
        """By phase, of the sum of the three medians."""
        medians = {phase: getattr(self, phase).median for phase in PHASES}
        total = sum(medians.values())
        return {phase: value / total if total else 0.0 for phase, value in medians.items()}


def measure_layer(
    phases: Sequence[Call], effort: Effort, line: StartLine | None
) -> list[LayerTimings]:
    """Times the three calls on every rank. Collective.

    Args:
        line: where the streams of GPUs meet, None on the CPU.

    Returns:
        By rank, the same on every rank.
    """
    loop = _on_host if line is None else _on_device
    warm = loop(phases, max(effort.warmup, 1), line)
    usual = torch.tensor(sorted(map(sum, warm))[len(warm) // 2])
    dist.all_reduce(usual, op=dist.ReduceOp.MAX)
    wanted = max(effort.iterations, int(effort.seconds * 1e9 / max(int(usual), 1)))
    affordable = max(_LEAST, int(_LONGEST / max(int(usual), 1)))
    rounds = loop(phases, min(wanted, affordable, _MOST), line)
    prepare, experts, finalize = (Quantiles.of(part) for part in zip(*rounds, strict=True))
    whole = Quantiles.of([sum(times) for times in rounds])
    own = LayerTimings(prepare, experts, finalize, whole, len(rounds))
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


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
    """The same between CUDA events; calls are eager, since experts may look at what they got."""
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
