"""The wire mxfp8: E4M3 elements, an E8M0 scale per 32 columns, rows padded to `alignment`.

H hidden_size, Kp padded columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.formats import blocks, e4m3, e8m0
from moe_a2a.formats.base import WireFormat

__all__ = ["MXFP8"]


@dataclass(frozen=True)
class _Mxfp8(WireFormat):
    def payload_width(self, hidden_size: int, alignment: int) -> int:
        return -(-hidden_size // alignment) * alignment

    def scale_width(self, hidden_size: int, alignment: int) -> int:
        return self.payload_width(hidden_size, alignment) // self.block

    def quantize(
        self,
        x: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        alignment: int,
        rule: str,
        ue8m0: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        padding = self.payload_width(x.shape[-1], alignment) - x.shape[-1]
        columns = torch.nn.functional.pad(x, (0, padding)).to(torch.float32)
        rows = blocks.split(columns, self.block)
        scales = e8m0.choose(blocks.amax(rows), e8m0.CEIL_448)
        scaled = rows * e8m0.decode_inverse(scales).unsqueeze(-1)
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
        codes = blocks.split(e4m3.decode(payload), self.block)
        columns = (codes * e8m0.decode(scales).unsqueeze(-1)).flatten(-2)
        return columns[..., :hidden_size]


MXFP8 = _Mxfp8(
    name="mxfp8",
    block=32,
    payload_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.uint8,
    pads_columns=True,
)
