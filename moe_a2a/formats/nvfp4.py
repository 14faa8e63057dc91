"""The wire nvfp4: E2M1 elements, an E4M3 scale per 16 columns, one fp32 encode scale per tensor.

H hidden_size.

Global scales lie in [2^-119, 2^118], as 448*6/amax does for any tensor whose amax is at least
2^-106. Then sf * (1/gs) lies in [2^-127, 2^128) for every sf but 0, so that the factor `out` is
finite and positive. An infinite element has sf = 448 and saturates; where sf is 0 the elements are
finite or NaN, so x * 0 is a zero with x's sign, or NaN. Outside that range `out` may be 0 or
infinite under other sf: nothing raises, and an element whose product is 0 * inf gets code 7 like
any NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_a2a.formats import blocks, e2m1, e4m3
from moe_a2a.formats.base import WireFormat

__all__ = ["NVFP4"]

# 0x3E2AAAAB, the fp32 nearest to 1/6; the product with it, not amax / 6, is the definition.
_ONE_SIXTH = 11184811 * 2.0**-26


def _global_scale(given: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if given is None:
        return torch.ones((), dtype=torch.float32, device=device)
    return given.reshape(())


@dataclass(frozen=True)
class _Nvfp4(WireFormat):
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
        gs = _global_scale(global_scale, x.device)
        scales = e4m3.encode(blocks.amax(rows) * _ONE_SIXTH * gs)
        sf = e4m3.decode(scales)
        out = torch.ones_like(sf) / (sf * (torch.ones_like(gs) / gs))
        # sf is 0 where amax is, too: one comparison covers both cases of a zero factor.
        out = out.masked_fill_(sf == 0, 0.0)
        return e2m1.encode(rows * out.unsqueeze(-1)).flatten(-2), scales.view(torch.uint8)

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
        gs = _global_scale(global_scale, payload.device)
        return (codes * e4m3.decode(scales).unsqueeze(-1) / gs).flatten(-2)


NVFP4 = _Nvfp4(
    name="nvfp4",
    block=16,
    payload_dtype=torch.uint8,
    scale_dtype=torch.uint8,
    columns_per_element=2,
    takes_global_scale=True,
)
