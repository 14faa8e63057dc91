"""E2M1 elements, two to a byte: codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign.

N elements.
"""

from __future__ import annotations

import torch

__all__ = ["decode", "encode"]


def encode(x: torch.Tensor) -> torch.Tensor:
    """fp32 `[..., N]` -> packed codes, uint8 `[..., N/2]`: nearest, ties to even, saturating at 6.

    N is even; the low half of a byte is the element with the even index. Zeros keep their sign
    (code 8). Every NaN becomes code 7, whatever its sign.
    """
    a = x.abs()
    # Counting down from the top code leaves NaN there, since no comparison with it holds.
    below_top = (a <= 0.25).to(torch.uint8)
    below_top += a < 0.75
    below_top += a <= 1.25
    below_top += a < 1.75
    below_top += a <= 2.5
    below_top += a < 3.5
    below_top += a <= 5.0
    negative = x.signbit() & ~x.isnan()
    codes = (7 - below_top) | (negative.to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes, uint8 `[..., N/2]` -> fp32 `[..., N]`, exact."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int32)
    # E2M1's exponent and mantissa, put where fp32 has its own, are the value times 2^-126: the
    # biases differ by 126 and fp32's subnormals carry E2M1's. A table would need a copy from the
    # host, which a CUDA graph can't capture.
    magnitude = ((codes & 7) << 22).view(torch.float32) * 2.0**126
    return torch.where(codes >= 8, -magnitude, magnitude)
