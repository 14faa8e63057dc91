"""``bench --host-overhead``: the host time of a round in which nothing has to be waited for.

One rank, one token: what is left is Python, the call into C++ and two small copies. The unit is one
``clone()`` of the same row, measured in turn with it.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from moe_a2a.alltoall import AllToAll
from moe_a2a.bench.cases import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_a2a.bench.cases import Geometry

__all__ = ["print_host_overhead"]

_BATCH = 50  # calls between two looks at the clock
_SECONDS = 0.5


def print_host_overhead(geometry: Geometry, backends: tuple[str, ...], wire: str) -> None:
    """One line per backend: microseconds of a round, and how many clones that is."""
    torch.set_num_threads(1)
    spec = spec_of(geometry, 1, 1, wire, "bf16")
    x = torch.randn(1, geometry.hidden_size, dtype=torch.float32)
    x = x.to(torch.float16 if wire == "fp16" else torch.bfloat16)
    ids = torch.arange(geometry.top_k, dtype=torch.int32).unsqueeze(0)
    weights = torch.full((1, geometry.top_k), 1 / geometry.top_k)
    y = torch.randn(1, 1, geometry.hidden_size).to(torch.bfloat16)
    out = torch.empty(1, geometry.hidden_size, dtype=torch.bfloat16)
    for backend in backends:
        with AllToAll(spec, backend=backend) as a2a:

            def round_trip(a2a: AllToAll = a2a) -> None:
                a2a.dispatch(x, ids, weights)
                a2a.combine(y, out=out)

            took, clone = _in_turn(round_trip, x.clone)
        print(
            f"{backend}: a one-rank round (dispatch and combine) of one token takes {took:.2f} us, "
            f"{took / clone:.1f} times a clone() of its row ({clone:.2f} us)"
        )


def _in_turn(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median microseconds of a call of each."""
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end or len(samples[0]) < 5:
        for call, kept in zip((first, second), samples, strict=True):
            start = time.perf_counter_ns()
            for _ in range(_BATCH):
                call()
            kept.append((time.perf_counter_ns() - start) / _BATCH / 1e3)
    # The first of each is the warm-up.
    return statistics.median(samples[0][1:]), statistics.median(samples[1][1:])
