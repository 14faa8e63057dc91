"""The wire mxfp4: E2M1 elements and an E8M0 scale per 32 columns, chosen by one of three rules.

H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_a2a.formats import blocks, e2m1, e8m0
from moe_a2a.formats.base import WireFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MXFP4"]

_RULES: Mapping[str, e8m0.Rule] = {"ceil": e8m0.CEIL_6, "even": e8m0.EVEN, "floor": e8m0.FLOOR}


@dataclass(frozen=True)
class _Mxfp4(WireFormat):
    def scale_width(self, hidden_size: int, alignment: int) -> int:
        return hidden_size // self.block

    def quantize(
        self,
        x: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        alignment: int,
        rule: str,
        ue8m0: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = blocks.split(x.to(torch.float32), self.block)
        scales = e8m0.choose(blocks.amax(rows), _RULES[rule])
        scaled = rows * e8m0.decode_inverse(scales).unsqueeze(-1)
        return e2m1.encode(scaled).flatten(-2), scales

    def dequantize(
        self,
        payload: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        hidden_size: int,
        global_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        assert scales is not None
        codes = blocks.split(e2m1.decode(payload), self.block)
        return (codes * e8m0.decode(scales).unsqueeze(-1)).flatten(-2)


MXFP4 = _Mxfp4(
    name="mxfp4",
    block=32,
    payload_dtype=torch.uint8,
    scale_dtype=torch.uint8,
    columns_per_element=2,
    rules=tuple(_RULES),
)
