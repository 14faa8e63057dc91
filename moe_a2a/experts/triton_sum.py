"""The last step of grouped experts, in Triton: a token's rows, weighted and added.

n received rows, L grouped rows, K top_k, H hidden_size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_a2a.experts.triton_gemm import rounded, widened

__all__ = ["weighted_sum"]


_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _next(positions, at):
    """The least that is more than ``at``."""
    return tl.min(tl.where(positions > at, positions, _NONE), 0)


@triton.jit
def weighted_sum(
    rows, positions, weights, out, rows_stride, weights_stride, out_stride,
    hidden: tl.constexpr, top_k: tl.constexpr, top_k_up: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out [n, H] = the sum of a token's rows [L, H], fp32, from +0.0, rounded once.

    rows: bf16 or fp32. positions: int32 [n, K], -1 adds nothing, -2 (no room for it) makes the row
    NaN. Rows are grouped by expert and keep their order inside one, so ascending positions are
    ascending experts, then choices. To be launched without fused multiply-adds.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    choices = tl.arange(0, top_k_up)
    there = tl.load(positions + row * top_k + choices, mask=choices < top_k, other=-1)
    router = tl.load(weights + row * weights_stride + choices, mask=choices < top_k, other=0.0)
    total = tl.zeros((block,), tl.float32)
    if tl.min(there, 0) == -2:
        total += float("nan")
    at = _next(there, -1)
    while at != _NONE:
        weight = tl.sum(tl.where(there == at, router, 0.0), 0)
        y_at = rows + at.to(tl.int64) * rows_stride + columns
        total += widened(tl.load(y_at, mask=columns < hidden, other=0.0)) * weight
        at = _next(there, at)
    tl.store(out + row * out_stride + columns, rounded(total, out.dtype.element_ty),
             mask=columns < hidden)  # fmt: skip
