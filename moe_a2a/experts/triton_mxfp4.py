"""MXFP4 times MXFP4, in Triton: rows quantized with the rule `even`, and a grouped GEMM of both.

n received rows, L grouped rows, E local experts; N rows and K columns of a matrix, multiples of
128. Experts start at multiples of 128 rows, so that the scales of a tile of 128 rows and 128
columns are 512 bytes in a row, in the order in which tensor cores read them
(`moe_a2a.formats.swizzle`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_a2a.experts.triton_gemm import activated, rounded, tile_of, widened

__all__ = ["activate_and_quantize", "quantize_rows", "scaled_gemm"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_INFINITY = tl.constexpr(0x7F800000)
_TWO_TO_MINUS_127 = tl.constexpr(0x00400000)


@triton.jit
def _power(exponent):
    """int32 e -> fp32 2^(e-127), 0 <= e <= 254"""
    return tl.where(exponent == 0, _TWO_TO_MINUS_127, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _quantize(x, rows: tl.constexpr, columns: tl.constexpr):
    """fp32 [rows, columns] -> packed codes uint8 [rows, columns/2], E8M0 bytes [rows, columns/32].

    To the bit what `moe_a2a.formats.quantize(x, "mxfp4", rule="even")` gives.
    """
    blocks = x.reshape(rows, columns // 32, 32)
    amax = tl.max(tl.where(blocks == blocks, tl.abs(blocks), 0.0), 2)
    bits = amax.to(tl.int32, bitcast=True)
    # Amax is rounded to the one bit of mantissa that E2M1 has; 4 = 2^2 is its largest binade.
    e = ((bits + (1 << 21)) >> 23) - 2
    e = tl.where(bits == _INFINITY, 254, tl.minimum(tl.maximum(e, 0), 254))
    scaled = blocks * _power(254 - e)[:, :, None]
    a = tl.abs(scaled)
    # Counting down from the largest code leaves NaN there, since no comparison with it holds.
    below = (a <= 0.25).to(tl.int32) + (a < 0.75).to(tl.int32) + (a <= 1.25).to(tl.int32)
    below += (a < 1.75).to(tl.int32) + (a <= 2.5).to(tl.int32) + (a < 3.5).to(tl.int32)
    below += (a <= 5.0).to(tl.int32)
    negative = (scaled.to(tl.int32, bitcast=True) < 0) & (scaled == scaled)
    codes = (7 - below) | (negative.to(tl.int32) << 3)
    low, high = tl.split(codes.reshape(rows, columns // 2, 2))
    return (low | (high << 4)).to(tl.uint8), e.to(tl.uint8)


@triton.jit
def _store(
    x, codes, scales, at, chunk, k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """fp32 [rows, columns] of the grouped rows ``at``, quantized to their places."""
    packed, e = _quantize(x, rows, columns)
    bytes_at = chunk * (columns // 2) + tl.arange(0, columns // 2)
    tl.store(codes + at.to(tl.int64)[:, None] * (k // 2) + bytes_at[None, :], packed)
    c = chunk * (columns // 32) + tl.arange(0, columns // 32)
    place = (at // 128).to(tl.int64) * (k // 128 * 512) + at % 32 * 16 + at % 128 // 32 * 4
    tl.store(scales + place[:, None] + (c // 4 * 512 + c % 4)[None, :], e)


@triton.jit
def quantize_rows(
    x, row_index, expert_offsets, codes, scales, length, x_stride,
    experts: tl.constexpr, k: tl.constexpr, x_columns: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """codes uint8 [L, K/2] and swizzled scales uint8 [L, K/32] of x [n, x_columns] by row_index.

    Rows of gaps and columns past x_columns are zero bytes; rows behind the last expert's are not
    written.
    """
    start = tl.program_id(0) * rows
    if start >= tl.load(expert_offsets + experts):
        return
    chunk = tl.program_id(1)
    at = start + tl.arange(0, rows)
    source = tl.load(row_index + at, mask=at < length, other=-1)
    at_columns = chunk * columns + tl.arange(0, columns)
    wanted = (source >= 0)[:, None] & (at_columns < x_columns)[None, :]
    x_at = x + source.to(tl.int64)[:, None] * x_stride + at_columns[None, :]
    values = widened(tl.load(x_at, mask=wanted, other=0.0))
    _store(values, codes, scales, at, chunk, k, rows, columns)


@triton.jit
def activate_and_quantize(
    gate_up, row_index, expert_offsets, codes, scales, length,
    experts: tl.constexpr, k: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr,
    limit: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The same of the activation of gate_up, fp32 [L, 2K], rounded to bf16 in between."""
    start = tl.program_id(0) * rows
    if start >= tl.load(expert_offsets + experts):
        return
    chunk = tl.program_id(1)
    at = start + tl.arange(0, rows)
    live = tl.load(row_index + at, mask=at < length, other=-1) >= 0
    at_columns = chunk * columns + tl.arange(0, columns)
    gate_at = gate_up + at.to(tl.int64)[:, None] * (2 * k) + at_columns[None, :]
    gate = tl.load(gate_at, mask=live[:, None], other=0.0)
    up = tl.load(gate_at + k, mask=live[:, None], other=0.0)
    h = widened(rounded(activated(gate, up, alpha, beta, limit), tl.bfloat16))
    _store(h, codes, scales, at, chunk, k, rows, columns)


@triton.jit
def _unswizzled(scales, tiles: tl.constexpr):
    """uint8 [512 * tiles] of 128 rows -> [128, 4 * tiles]"""
    parts = scales.reshape(tiles, 32, 4, 4)
    return parts.permute(2, 1, 0, 3).reshape(128, 4 * tiles)


@triton.jit
def _values(codes, scales, rows: tl.constexpr, columns: tl.constexpr):
    """What dot_scaled makes of its operands; only the interpreter, which has none, needs it."""
    code = tl.join(codes & 15, codes >> 4).to(tl.int32).reshape(rows, columns // 32, 32)
    value = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    value = tl.where(code >= 8, -value, value)
    return (value * _power(scales.to(tl.int32))[:, :, None]).reshape(rows, columns)


@triton.jit
def scaled_gemm(
    codes, code_scales, row_index, expert_offsets, payload, scales, bias, out,
    length, out_stride, group_m,
    experts: tl.constexpr, experts_up: tl.constexpr, n: tl.constexpr, k: tl.constexpr,
    out_columns: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """out [L, out_columns] = rows @ w.T + bias in fp32, rounded once; tiles of 128 x 128.

    codes [L, K/2] and payload [E, N, K/2] are packed, code_scales and scales [E, N, K/32] swizzled,
    each expert by itself; bias fp32 [E, N] or None. Rows of gaps are not stored.
    """
    start, tile, expert = tile_of(
        tl.program_id(0), expert_offsets, experts, experts_up, n // 128, 128, group_m
    )
    if expert == experts:
        return
    at = start + tl.arange(0, 128)
    rows = tl.load(row_index + at, mask=at < length, other=-1)
    if tl.max(rows, 0) < 0:
        return
    bytes_at = tl.arange(0, block_k // 2)
    w_rows = tile * 128 + tl.arange(0, 128)
    a_at = codes + at.to(tl.int64)[:, None] * (k // 2) + bytes_at[None, :]
    w_at = payload + (expert.to(tl.int64) * n + w_rows)[:, None] * (k // 2) + bytes_at[None, :]
    tiles: tl.constexpr = block_k // 128
    scales_at = tl.arange(0, 512 * tiles)
    a_scales_at = code_scales + (start // 128).to(tl.int64) * (k // 128 * 512) + scales_at
    w_scales_at = scales + (expert.to(tl.int64) * (n // 128) + tile) * (k // 128 * 512) + scales_at
    total = tl.zeros((128, 128), tl.float32)
    for _ in range(k // block_k):
        a, w = tl.load(a_at), tl.load(w_at)
        a_scale = _unswizzled(tl.load(a_scales_at), tiles)
        w_scale = _unswizzled(tl.load(w_scales_at), tiles)
        if _INTERPRETED:
            rows_w = _values(w, w_scale, 128, block_k)
            total = tl.dot(_values(a, a_scale, 128, block_k), rows_w.T, total)
        else:
            total = tl.dot_scaled(a, a_scale, "e2m1", w.T, w_scale, "e2m1", total)
        a_at += block_k // 2
        w_at += block_k // 2
        a_scales_at += 512 * tiles
        w_scales_at += 512 * tiles
    if bias is not None:
        total += tl.load(bias + expert * n + w_rows)[None, :]
    wanted = (rows >= 0)[:, None] & (w_rows < out_columns)[None, :]
    out_at = out + at.to(tl.int64)[:, None] * out_stride + w_rows[None, :]
    tl.store(out_at, rounded(total, out.dtype.element_ty), mask=wanted)
