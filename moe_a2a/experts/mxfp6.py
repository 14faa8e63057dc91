"""MXFP6: elements of six bits, E3M2 or E2M3, and an E8M0 scale per 32 columns. For experts only.

No wire carries them. Four codes fill three bytes, the first in the lowest bits: code i of a row
takes bits 6i to 6i+5 of its bytes read as one little-endian number.
N elements, H columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_a2a.formats import blocks, e8m0
from moe_a2a.formats.base import WireFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["E2M3", "E3M2", "MXFP6_E2M3", "MXFP6_E3M2", "Element"]

_FP32_MANTISSA = 23
_FP32_BIAS = 127
_SIGN, _LARGEST = 32, 31


@dataclass(frozen=True)
class Element:
    """A number of six bits: sign, exponent, mantissa; subnormals, neither infinity nor NaN.

    Attributes:
        mantissa: bits of the mantissa.
        bias: of the exponent.
    """

    mantissa: int
    bias: int

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 -> codes, uint8 of the same shape: nearest, ties to even, saturating.

        Zeros keep their sign; every NaN becomes the largest code, 31.
        """
        nan = x.isnan()
        # The scaled amax of a block may be past the largest code, an infinite element always is.
        a = x.abs().masked_fill(nan, torch.inf).clamp(max=self._value(_LARGEST))
        least = 1 - self.bias
        binade = ((a.view(torch.int32) >> _FP32_MANTISSA) - _FP32_BIAS).clamp_(min=least)
        # In units of its binade's step, a power of two, a number is exact and its half a tie; what
        # rounds up to the next binade carries into the code's exponent as it must.
        inverse_step = ((self.mantissa - binade + _FP32_BIAS) << _FP32_MANTISSA).view(torch.float32)
        steps = (a * inverse_step).round().to(torch.int32)
        codes = steps + ((binade - least) << self.mantissa)
        negative = x.signbit() & ~nan
        return (codes + negative * _SIGN).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, uint8 in 0..63 -> fp32 of the same shape, exact."""
        wide = codes.to(torch.int32)
        # As with E2M1: exponent and mantissa where fp32 has its own, then the biases' difference.
        bits = (wide & _LARGEST) << (_FP32_MANTISSA - self.mantissa)
        magnitude = bits.view(torch.float32) * 2.0 ** (_FP32_BIAS - self.bias)
        return torch.where(wide >= _SIGN, -magnitude, magnitude)

    def _value(self, code: int) -> float:
        exponent, mantissa = divmod(code, 1 << self.mantissa)
        return (2.0**-self.mantissa * mantissa + 1) * 2.0 ** (exponent - self.bias)

    def rules(self) -> Mapping[str, e8m0.Rule]:
        """The rules of mxfp4 for this element; the largest code has a mantissa of ones."""
        binade = (_LARGEST >> self.mantissa) - self.bias
        cut = _FP32_MANTISSA - self.mantissa
        return {
            "ceil": e8m0.Rule(binade, carry=(1 << cut) - 1),
            "even": e8m0.Rule(binade, carry=1 << (cut - 1)),
            "floor": e8m0.Rule(binade, carry=0),
        }


E3M2 = Element(mantissa=2, bias=3)
E2M3 = Element(mantissa=3, bias=1)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., N]` of codes -> bytes, uint8 `[..., 3N/4]`; N a multiple of 4."""
    a, b, c, d = (codes[..., i::4].to(torch.int32) for i in range(4))
    word = a | b << 6 | c << 12 | d << 18
    packed = torch.stack([word & 255, word >> 8 & 255, word >> 16], dim=-1)
    return packed.flatten(-2).to(torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes, uint8 `[..., 3N/4]` -> uint8 `[..., N]` of codes."""
    a, b, c = (packed[..., i::3].to(torch.int32) for i in range(3))
    word = a | b << 8 | c << 16
    codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1)
    return codes.flatten(-2).to(torch.uint8)


@dataclass(frozen=True)
class _Mxfp6(WireFormat):
    """`columns_per_element` has no meaning here: `payload_width` counts bytes."""

    element: Element = E3M2

    def payload_width(self, hidden_size: int, alignment: int) -> int:
        return hidden_size * 3 // 4

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
        scales = e8m0.choose(blocks.amax(rows), self.element.rules()[rule])
        scaled = rows * e8m0.decode_inverse(scales).unsqueeze(-1)
        return _pack(self.element.encode(scaled).flatten(-2)), scales

    def dequantize(
        self,
        payload: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        hidden_size: int,
        global_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        assert scales is not None
        codes = blocks.split(self.element.decode(_unpack(payload)), self.block)
        return (codes * e8m0.decode(scales).unsqueeze(-1)).flatten(-2)


def _format(name: str, element: Element) -> _Mxfp6:
    return _Mxfp6(
        name=name,
        block=32,
        payload_dtype=torch.uint8,
        scale_dtype=torch.uint8,
        rules=tuple(element.rules()),
        element=element,
    )


MXFP6_E3M2 = _format("mxfp6_e3m2", E3M2)
MXFP6_E2M3 = _format("mxfp6_e2m3", E2M3)
