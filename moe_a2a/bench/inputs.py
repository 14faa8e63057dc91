"""The tokens that a rank brings to a round: every rank can make those of every other.

Shape letters: T tokens of this rank, K top_k, H hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_a2a.bench.routing import DISTRIBUTIONS, Choices, draw, load_recorded

if TYPE_CHECKING:
    from moe_a2a.bench.cases import Sweep

__all__ = ["InputSource", "Inputs", "global_scale_of"]


class Inputs(NamedTuple):
    """x: bf16 (fp16 on that wire) [T, H]; topk_ids: int32 [T, K]; topk_weights: float32 [T, K]."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def global_scale_of(wire: str) -> Tensor | None:
    """float32 scalar, nvfp4's encode scale for values up to 32; None with the other wires."""
    return torch.tensor(448.0 * 6.0 / 32.0) if wire == "nvfp4" else None


class InputSource:
    """Inputs by rank, a pure function of the sweep's seed, the rank and T.

    Raises:
        UsageError: the routing file does not fit.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._recorded = None
        if sweep.routing not in DISTRIBUTIONS:
            self._recorded = load_recorded(sweep.routing, sweep.geometry)

    def of(self, rank: int, tokens: int, wire: str) -> Inputs:
        seed = (self._sweep.seed * 1_000_003 + rank) * 1_000_003 + tokens
        generator = torch.Generator().manual_seed(seed % 2**63)
        choices = self._choices(rank, tokens, generator)
        x = torch.randn(tokens, self._sweep.geometry.hidden_size, generator=generator)
        # Rows of unlike magnitude, so that a scale that went to the wrong row shows.
        x *= torch.exp2(torch.randint(-3, 4, (tokens, 1), generator=generator).float())
        dtype = torch.float16 if wire == "fp16" else torch.bfloat16
        return Inputs(x.to(dtype), *choices)

    def _choices(self, rank: int, tokens: int, generator: torch.Generator) -> Choices:
        if self._recorded is not None:
            return self._recorded.slice_of(rank, tokens)
        return draw(self._sweep.routing, self._sweep.geometry, tokens, generator)
