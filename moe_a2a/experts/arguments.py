"""What callers may pass as weights and scales, checked once, where they are loaded.

E local experts.
"""

from __future__ import annotations

import torch

from moe_a2a.errors import PayloadError
from moe_a2a.wording import describe

__all__ = ["FLOATS", "check_shape", "decode_scales", "dense"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def dense(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout is not torch.strided:
        raise PayloadError(f"{name} is {describe(value)}: expected a dense tensor")
    return value.detach()


def check_shape(
    name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[object, ...]
) -> None:
    """Integers in ``shape`` are sizes, strings stand for any size."""
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits or value.dtype not in dtypes:
        wanted = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise PayloadError(
            f"{name} is {describe(value)}: expected {wanted} [{', '.join(map(str, shape))}]"
        )


def decode_scales(name: str, value: object, num_experts: int | str) -> torch.Tensor:
    """``value`` as fp32 [E], or a PayloadError."""
    scale = dense(name, value)
    check_shape(name, scale, (torch.float32,), (num_experts,))
    if scale.is_meta:  # no numbers to look at
        return scale
    good = scale.isfinite() & (scale > 0)
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise PayloadError(f"{name}[{at}] is {scale[at].item()}: expected a positive number")
    return scale
