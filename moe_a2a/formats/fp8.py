"""The wires fp8 and fp8_block128: E4M3 elements under an fp32 scale per row, or per 128 columns.

H hidden_size, N scales per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.formats import blocks, e4m3
from moe_a2a.formats.base import WireFormat

__all__ = ["FP8", "FP8_BLOCK128"]

_SMALLEST_AMAX = 1e-10
_LARGEST_AMAX = torch.finfo(torch.float32).max


def _next_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """Smallest power of two >= x, for normal positive fp32 x."""
    return ((x.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


@dataclass(frozen=True)
class _ScaledE4M3(WireFormat):
    row_wise: bool = False

    def _columns_per_scale(self, hidden_size: int) -> int:
        return hidden_size if self.row_wise else self.block

    def scale_width(self, hidden_size: int, alignment: int) -> int:
        return hidden_size // self._columns_per_scale(hidden_size)

    def quantize(
        self,
        x: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        alignment: int,
        rule: str,
        ue8m0: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = blocks.split(x.to(torch.float32), self._columns_per_scale(x.shape[-1]))
        m = blocks.amax(rows).clamp(_SMALLEST_AMAX, _LARGEST_AMAX)
        # Division by a tensor, both times: with a Python number on either side torch multiplies
        # by a reciprocal, which rounds twice.
        largest_code = torch.full_like(m, e4m3.MAX)
        scales = m / largest_code
        if ue8m0:
            scales = _next_power_of_two(scales)
            scaled = rows / scales.unsqueeze(-1)
        else:
            scaled = rows * (largest_code / m).unsqueeze(-1)
        return e4m3.encode(scaled).flatten(-2), scales

    def dequantize(
        self,
        payload: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        hidden_size: int,
        global_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        assert scales is not None
        codes = blocks.split(e4m3.decode(payload), self._columns_per_scale(hidden_size))
        return (codes * scales.unsqueeze(-1)).flatten(-2)


FP8 = _ScaledE4M3(
    name="fp8",
    block=1,
    payload_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float32,
    row_wise=True,
)
FP8_BLOCK128 = _ScaledE4M3(
    name="fp8_block128",
    block=128,
    payload_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float32,
    takes_ue8m0=True,
)
