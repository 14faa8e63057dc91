"""E8M0 scales: byte e means 2^(e-127), 255 is NaN; and the rules that choose one for a block.

With amax = 1.m * 2^k every rule takes e = k + 127 - L, one more if the mantissa 1.m is large, where
2^L is the binade of the largest element. "One more if" is a carry out of the mantissa bits, so a
rule is the number that is added to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CEIL_448", "CEIL_6", "EVEN", "FLOOR", "Rule", "choose", "decode", "decode_inverse"]

_MANTISSA_BITS = 23
_INFINITY = 0x7F800000
_QUIET_NAN = 0x7FC00000
_TWO_TO_MINUS_127 = 0x00400000
_LARGEST = 254


@dataclass(frozen=True)
class Rule:
    """How a shared exponent follows from amax.

    Attributes:
        binade: L, the exponent of the largest element.
        carry: added to the fp32 bits of amax before the mantissa is cut off.
    """

    binade: int
    carry: int


CEIL_448 = Rule(binade=8, carry=0x7FFFFF - 0x600000)  # up where 1.m > 1.75: 448 = 1.75 * 2^8
CEIL_6 = Rule(binade=2, carry=0x7FFFFF - 0x400000)  # up where 1.m > 1.5: 6 = 1.5 * 2^2
EVEN = Rule(binade=2, carry=1 << 21)  # up where 1.m >= 1.75: amax rounded to E2M1's mantissa
FLOOR = Rule(binade=2, carry=0)


def choose(amax: torch.Tensor, rule: Rule) -> torch.Tensor:
    """fp32 amax >= 0, not NaN -> E8M0 bytes, uint8 of the same shape, in 0..254.

    Infinity gives 254. Zero and subnormals give 0; subnormals need no normalizing, since they
    clamp to 0 from whichever exponent at or below 0 they start.
    """
    bits = amax.view(torch.int32)
    exponent = ((bits + rule.carry) >> _MANTISSA_BITS) - rule.binade
    exponent = exponent.clamp_(0, _LARGEST).masked_fill_(bits == _INFINITY, _LARGEST)
    return exponent.to(torch.uint8)


def decode(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes, uint8 -> fp32 2^(e-127) of the same shape, exact; 255 -> NaN."""
    e = scales.to(torch.int32)
    bits = e << _MANTISSA_BITS
    bits = bits.masked_fill_(e == 0, _TWO_TO_MINUS_127).masked_fill_(e == 255, _QUIET_NAN)
    return bits.view(torch.float32)


def decode_inverse(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes, uint8 -> fp32 2^(127-e) of the same shape, exact; 255 -> NaN."""
    return decode(254 - scales)  # 255 wraps round to itself and stays NaN
