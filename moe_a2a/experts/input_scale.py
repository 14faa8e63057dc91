"""NVFP4 activations: one scale for all experts of a rank, from the one per expert of a checkpoint.

E experts.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import PayloadError
from moe_a2a.experts.arguments import decode_scales

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["shared_encode_scale"]


def shared_encode_scale(decode: Tensor, *, name: str = "decode") -> Tensor:
    """The encode scale with which the rows of no expert saturate: 1 / the largest decode scale.

    A decode scale is amax / (448 * 6) of what its expert was calibrated with, so the largest one
    covers the largest rows. The others lose a little precision in their block scales; the smallest
    one would clip. With the decode scales of all experts of the model, the result is also what
    every rank may pass to ``dispatch(global_scale=...)``, which has to be the same on all.

    Args:
        decode: fp32 [E], finite and positive.
        name: what messages call it.

    Returns:
        fp32 scalar on decode's device; 1 without experts. Warns (UserWarning) where they differ.

    Raises:
        PayloadError: another dtype or shape, a scale that is not a positive number, or a largest
            one so small that 1 over it is infinite.
    """
    scales = decode_scales(name, decode, "E")
    if not len(scales):
        return torch.ones((), dtype=torch.float32, device=scales.device)
    least, largest = scales.aminmax()
    encode = torch.ones_like(largest) / largest
    if not bool(encode.isfinite()):
        raise PayloadError(
            f"{name} is {largest.item():.4g} at most: 1 over it, the encode scale, must be finite"
        )
    if bool(least != largest):
        warnings.warn(
            f"{name} differs between experts ({least.item():.4g} to {largest.item():.4g}): the "
            "largest is used for all, so that none saturates",
            stacklevel=2,
        )
    return encode
