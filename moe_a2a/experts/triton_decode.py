"""Received rows of any wire as bf16, in one Triton kernel; what padding rows hold is not touched.

W ep_size, R runtime_max_tokens, H hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from moe_a2a.experts.triton_gemm import rounded, widened
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.received import Received

__all__ = ["as_bf16", "decode_rows"]

_COLUMNS = 2048  # of a program, at most
_TWO_TO_126 = tl.constexpr(2.0**126)
_TWO_TO_120 = tl.constexpr(2.0**120)


def as_bf16(recv: Received) -> Tensor:
    """bf16 [W*R, H], or more columns where bf16 arrived: to the bit ``recv.dequantize(bf16)``, but
    for padding rows, which are whatever memory held."""
    x = recv.x.flatten(0, 1)
    if x.dtype == torch.bfloat16:
        return x
    spec = recv.spec
    out = torch.empty((len(x), spec.hidden_size), dtype=torch.bfloat16, device=x.device)
    if not len(x):
        return out
    wire = "fp16" if recv.scales is None else spec.wire
    form = FORMATS[wire]
    per_scale = 0 if wire == "fp8" else form.block
    scales = recv.scales.flatten(0, 1) if recv.scales is not None else x
    block = min(_COLUMNS, triton.next_power_of_2(spec.hidden_size))
    decode_rows[(len(x), triton.cdiv(spec.hidden_size, block))](
        x if wire == "fp16" else x.view(torch.uint8), scales, recv.counts, recv.global_scale, out,
        recv.x.shape[1], x.stride(0), scales.stride(0),
        hidden=spec.hidden_size, wire=wire, per_scale=per_scale, block=block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _signed(magnitude, sign):
    """A minus would be a subtraction, and lose the sign of zero."""
    return (magnitude.to(tl.int32, bitcast=True) | (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(codes):
    """int32 codes -> fp32: a code in place is its value times 2^-126, a subnormal."""
    magnitude = ((codes & 7) << 22).to(tl.float32, bitcast=True) * _TWO_TO_126
    return _signed(magnitude, codes >> 3)


@triton.jit
def _e4m3(codes):
    """int32 codes -> fp32"""
    magnitude = ((codes & 127) << 20).to(tl.float32, bitcast=True) * _TWO_TO_120
    magnitude = tl.where((codes & 127) == 127, float("nan"), magnitude)
    return _signed(magnitude, codes >> 7)


@triton.jit
def _e8m0(codes):
    """int32 codes -> fp32 2^(e-127)"""
    bits = tl.where(codes == 0, 0x00400000, tl.where(codes == 255, 0x7FC00000, codes << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_rows(
    payload, scales, counts, global_scale, out,
    rows, payload_stride, scales_stride,
    hidden: tl.constexpr, wire: tl.constexpr, per_scale: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out bf16 [W*rows, hidden] of the rows below ``counts`` [W] of their source.

    payload: fp16, or the bytes of a row; scales: fp32 or bytes, one for ``per_scale`` columns, or
    for a row (0); global_scale: fp32 scalar or None.
    """
    row = tl.program_id(0)
    if row % rows >= tl.load(counts + row // rows):
        return
    row = row.to(tl.int64)
    first = tl.program_id(1) * block
    columns = first + tl.arange(0, block)
    x = payload + row * payload_stride
    if wire == "fp16":
        values = widened(tl.load(x + columns, mask=columns < hidden, other=0.0))
    else:
        if wire == "nvfp4" or wire == "mxfp4":
            pairs = first // 2 + tl.arange(0, block // 2)
            codes = tl.load(x + pairs, mask=pairs < hidden // 2, other=0).to(tl.int32)
            values = _e2m1(tl.join(codes & 15, codes >> 4).reshape(block))
        else:
            values = _e4m3(tl.load(x + columns, mask=columns < hidden, other=0).to(tl.int32))
        scale_at = scales + row * scales_stride
        if per_scale:
            at = first // per_scale + tl.arange(0, block // per_scale)
            scale = tl.load(scale_at + at, mask=at < hidden // per_scale, other=0)[:, None]
            values = values.reshape(block // per_scale, per_scale)
        else:
            scale = tl.load(scale_at)
        if wire == "nvfp4":
            values *= _e4m3(scale.to(tl.int32))
            if global_scale is not None:
                values = tl.math.div_rn(values, tl.load(global_scale))
        elif wire == "mxfp4" or wire == "mxfp8":
            values *= _e8m0(scale.to(tl.int32))
        else:
            values *= scale
        values = values.reshape(block)
    tl.store(out + row * hidden + columns, rounded(values, tl.bfloat16), mask=columns < hidden)
