"""E4M3 elements: one sign, four exponent and three mantissa bits, no infinity, NaN 0x7F."""

from __future__ import annotations

import torch

__all__ = ["MAX", "decode", "encode"]

MAX = 448.0


def encode(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> float8_e4m3fn of the same shape: nearest, ties to even, clamped to +-448.

    Zeros keep their sign. Every NaN becomes 0x7F, whatever its sign.
    """
    # Libraries disagree on what a cast does past 448, so nothing past it reaches the cast.
    codes = x.clamp(-MAX, MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill_(codes == 0xFF, 0x7F).view(torch.float8_e4m3fn)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn, or its bytes as uint8, -> fp32 of the same shape, exact."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)
