"""The wires bf16 and fp16: rows as they are, without scales.

H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.formats.base import WireFormat

__all__ = ["BF16", "FP16"]


@dataclass(frozen=True)
class _Plain(WireFormat):
    def scale_width(self, hidden_size: int, alignment: int) -> int:
        return 0

    def quantize(
        self,
        x: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        alignment: int,
        rule: str,
        ue8m0: bool,
    ) -> tuple[torch.Tensor, None]:
        return x.to(self.payload_dtype), None

    def dequantize(
        self,
        payload: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        hidden_size: int,
        global_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        return payload.to(torch.float32)


BF16 = _Plain(name="bf16", block=1, payload_dtype=torch.bfloat16, scale_dtype=None)
FP16 = _Plain(name="fp16", block=1, payload_dtype=torch.float16, scale_dtype=None)
