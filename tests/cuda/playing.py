"""Ranks as streams of one GPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_a2a.testing import RankContext, run_local
from tests.collective.places import meet

if TYPE_CHECKING:
    from collections.abc import Callable

GPU = torch.device("cuda", 0)
MILLISECOND = 1_800_000  # cycles of torch.cuda._sleep, about


def run_streams(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """`run_local` on the first GPU, with memory in torch's allocator for each stream."""
    return run_local(size, _warm, fn, args, device=GPU, timeout=timeout)


def _warm(ranks: RankContext, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # cudaMalloc behind the kernel of a rank that waits would make it wait in vain.
    small = [torch.empty(1 << 20, dtype=torch.uint8, device=GPU) for _ in range(32)]
    large = [torch.empty(9 << 20, dtype=torch.uint8, device=GPU) for _ in range(4)]
    del small, large
    meet(ranks)
    return fn(ranks, *args)


def in_turn(ranks: RankContext, call: Callable[[], Any]) -> Any:
    """`call()` of one rank after the other, on an idle device.

    For what waits for the whole device or asks that nobody else uses it: the begin of a capture.
    """
    result = None
    for turn in range(ranks.size):
        meet(ranks)
        if turn == ranks.rank:
            result = call()
    meet(ranks)
    return result


class InTurn:
    """Experts that one rank after the other calls, on an idle device: what Triton compiles and
    loads waits for the whole device, where a peer's kernel may be waiting for this rank."""

    def __init__(self, ranks: RankContext, experts: Any) -> None:
        self._ranks, self._experts = ranks, experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return partial(self._call, value) if name == "grouped_rows" else value

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._call(self._experts, *args, **keywords)

    def _call(self, compute: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        stream = torch.cuda.current_stream()

        def call() -> Any:
            result = compute(*args, **keywords)
            stream.synchronize()
            return result

        stream.synchronize()
        return in_turn(self._ranks, call)
