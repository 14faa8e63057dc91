"""Numeric formats of the wire, in plain torch: any device, any leading dimensions, bit-exact.

H hidden_size, P payload elements per row, S scales per row. One file per wire format, one line per
format in `FORMATS`; docs/formats.md has the arithmetic.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError
from moe_a2a.formats.arguments import check_dequantize, check_quantize
from moe_a2a.formats.base import WireFormat
from moe_a2a.formats.bf16 import BF16, FP16
from moe_a2a.formats.fp8 import FP8, FP8_BLOCK128
from moe_a2a.formats.mxfp4 import MXFP4
from moe_a2a.formats.mxfp8 import MXFP8
from moe_a2a.formats.nvfp4 import NVFP4
from moe_a2a.formats.swizzle import swizzle, unswizzle
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FORMATS", "WireFormat", "dequantize", "quantize", "swizzle", "unswizzle"]

FORMATS: Mapping[str, WireFormat] = MappingProxyType(
    {
        "bf16": BF16,
        "fp16": FP16,
        "fp8": FP8,
        "fp8_block128": FP8_BLOCK128,
        "mxfp8": MXFP8,
        "nvfp4": NVFP4,
        "mxfp4": MXFP4,
    }
)


def quantize(
    x: torch.Tensor,
    wire: str,
    *,
    global_scale: torch.Tensor | None = None,
    alignment: int = 32,
    rule: str = "ceil",
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows in a wire format, and their scales.

    Args:
        x: bf16, fp16 or fp32, `[..., H]`, any strides. H is a multiple of the format's block;
            mxfp8 takes any H.
        wire: a key of `FORMATS`.
        global_scale: fp32, one element, on x's device: nvfp4's encode scale 448*6/amax of the
            tensor, in [2^-119, 2^118]; 1 where None. Not the decode scale of
            checkpoints, which is its inverse.
        alignment: mxfp8 rows are padded with zeros to a multiple of it, itself a positive multiple
            of 32.
        rule: mxfp4's shared exponent: "ceil", "even" or "floor".
        ue8m0: fp8_block128 with powers of two as its fp32 scales.

    Returns:
        Payload `[..., P]` and scales `[..., S]` (None for bf16 and fp16), both contiguous, in the
        format's storage dtypes. A bf16 or fp16 payload may share x's memory.

    Raises:
        GeometryError: unknown wire or rule, an H or alignment that doesn't fit, or a rule or
            ue8m0 that the wire has no use for.
        PayloadError: x or global_scale of another dtype or shape, or a global_scale with a wire
            other than nvfp4.
    """
    chosen = _format(wire)
    check_quantize(
        x, chosen, global_scale=global_scale, alignment=alignment, rule=rule, ue8m0=ue8m0
    )
    return chosen.quantize(
        x.detach().contiguous(),
        global_scale=global_scale,
        alignment=alignment,
        rule=rule,
        ue8m0=ue8m0,
    )


def dequantize(
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    wire: str,
    *,
    hidden_size: int | None = None,
    global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The rows that a payload and its scales stand for.

    Args:
        payload: the format's storage dtype, `[..., P]`.
        scales: the format's scale dtype, `[..., S]`; None for bf16 and fp16.
        wire: a key of `FORMATS`.
        hidden_size: columns to return. All that the payload holds where None; fewer only for
            mxfp8, whose rows are padded.
        global_scale: what `quantize` was given.
        dtype: torch.float32, or torch.bfloat16 or torch.float16, rounded once from fp32.

    Returns:
        Contiguous `[..., hidden_size]` in `dtype`. A value past the dtype's range is infinite:
        in mxfp8 and mxfp4 fp32's largest magnitudes round up to a code that means 2^128.

    Raises:
        GeometryError: unknown wire.
        PayloadError: a tensor of another dtype, shape or device, scales or a global_scale that are
            missing or superfluous, a hidden_size that the payload doesn't hold, or another dtype.
    """
    chosen = _format(wire)
    columns = check_dequantize(
        payload, scales, chosen, hidden_size=hidden_size, global_scale=global_scale, dtype=dtype
    )
    rows = chosen.dequantize(payload, scales, hidden_size=columns, global_scale=global_scale)
    return rows.to(dtype).contiguous()


def _format(wire: str) -> WireFormat:
    if not isinstance(wire, str) or wire not in FORMATS:
        raise GeometryError(f"wire={shown(wire)} is unknown: use one of {', '.join(FORMATS)}")
    return FORMATS[wire]
