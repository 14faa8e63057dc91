"""``doctor``: what is installed here, which backends work, and a round to prove it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from moe_a2a import backends, experts
from moe_a2a._build import build_cpu, cache_directory
from moe_a2a.alltoall import AllToAll
from moe_a2a.bench.cases import PRESETS, Effort, Sweep
from moe_a2a.bench.check import CheckFailed, Oracle
from moe_a2a.bench.inputs import InputSource
from moe_a2a.bench.machine import machine, versions
from moe_a2a.bench.points import check_backend
from moe_a2a.errors import BuildError, MoeA2AError
from moe_a2a.memory import memory_available

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["print_diagnosis"]

_TOKENS, _WIRE = 16, "nvfp4"


def print_diagnosis() -> bool:
    """Prints all of it; returns whether any backend is usable and came through its test round."""
    facts = machine()
    _print_pairs({**versions(), "cache": str(cache_directory())})
    _print_pairs(
        {
            "processor": f"{facts['cpu']}, {facts['cores']} cores",
            "memory": f"{facts['memory_bytes']:,} bytes, {memory_available():,} available",
        }
    )
    print("\nCPU library")
    _build()
    device_types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    working = False
    for device_type in device_types:
        print(f"\nbackends for {device_type} tensors")
        found = backends.reasons(tuple(backends.BACKENDS), device_type)
        results = {name: _state(name, reason, device_type) for name, reason in found.items()}
        working |= any(text.startswith("usable") for text in results.values())
        _print_pairs(results)
        print(f"\nexperts for {device_type} tensors")
        _print_pairs(
            {
                name: "usable" if why is None else f"not usable: {why}"
                for name, why in experts.reasons(None, device_type, None).items()
            }
        )
    return working


def _print_pairs(pairs: Mapping[str, str]) -> None:
    width = max([10, *map(len, pairs)]) + 2
    for name, text in pairs.items():
        print(f"  {name:<{width}}{text}", flush=True)


def _build() -> None:
    start = time.monotonic()
    try:
        build_cpu()
    except BuildError as error:
        print(f"  does not compile: {error}")
    else:
        print(f"  compiled or found in the cache in {time.monotonic() - start:.2f} s")


def _state(name: str, reason: str | None, device_type: str) -> str:
    if reason is not None:
        return f"not usable: {reason}"
    if device_type != "cpu":
        return "usable (not tried: the test round is on the CPU)"
    try:
        microseconds = _test_round(name)
    except (MoeA2AError, CheckFailed) as error:
        return f"fails its test round: {error}"
    return f"usable; test round of one rank, {_TOKENS} tokens, {_WIRE}: {microseconds:.0f} us"


def _test_round(backend: str) -> float:
    """Checks every byte of a one-rank round, then times another: microseconds."""
    sweep = Sweep(
        PRESETS["deepseek-v3"], 1, (_TOKENS,), (_WIRE,), "bf16", (backend,), "uniform", 0,
        rivals=False, effort=Effort(1, 0.0, 1),
    )  # fmt: skip
    spec = sweep.spec(_WIRE)
    inputs = InputSource(sweep).of(0, _TOKENS, _WIRE)
    oracle = Oracle(spec, 0, [inputs], backend)
    with AllToAll(spec, backend=backend) as a2a:
        y = check_backend(a2a, oracle, inputs, _TOKENS)
        start = time.perf_counter_ns()
        a2a.dispatch(*inputs)
        a2a.combine(y)
        return (time.perf_counter_ns() - start) / 1e3
