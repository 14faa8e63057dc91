"""What callers may pass as weights and scales, checked once, where they are loaded.

E local experts.
"""

from __future__ import annotations

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.wording import describe, shown

__all__ = ["FLOATS", "check_shape", "decode_scales", "dense", "device_there", "place"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def place(device: object) -> torch.device:
    """``device`` as a torch.device, or a GeometryError; whether there is one is not asked."""
    why = ""
    if isinstance(device, (str, torch.device)):
        try:
            return torch.device(device)
        except RuntimeError as error:
            why = f"{str(error).splitlines()[0][:200]}; "
    raise GeometryError(f"device={shown(device)}: {why}must be a device such as 'cpu' or 'cuda:0'")


def device_there(device: object) -> torch.device:
    """The same, or a GeometryError too where this machine has no such CUDA device."""
    found = place(device)
    there = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= there:
        raise GeometryError(f"device={shown(device)}: this machine has {there} CUDA devices")
    return found


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
