"""A grouped GEMM over packed four-bit weights, in Triton: decoded in registers, never in memory.

L grouped rows, E local experts, N rows of a matrix (of one of its two parts where it is gated),
K columns.

The tensor cores see the product turned round, ``w [N, K] @ x.T [K, M]``: few rows then fill the
narrow side of an instruction (8 to 256) instead of the wide one (64), and decoded weights enter
from the registers in which they were made instead of by way of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grouped_gemm"]

# The interpreter has no inline assembly, and its bf16 is neither rounded to nearest nor subnormal.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SIGN_AND_MAGNITUDE = tl.constexpr(0x81C081C0)  # of E2M1, where bf16 has them, in both halves
_TWO_TO_126 = tl.constexpr(0x7E807E80)
_TWO_TO_120 = tl.constexpr(0x7B807B80)
_TWO_TO_117 = tl.constexpr(0x7A007A00)
_NAN = tl.constexpr(0x7FC07FC0)
_HALVED = tl.constexpr(128)  # rows of the smallest tile that is halved


@triton.jit
def _low(pairs):
    return pairs.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _high(pairs):
    return (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _pairs(low, high):
    low_bits = low.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low_bits | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def widened(x):
    """bf16, fp16 or fp32 -> fp32"""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even"""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)
        narrow = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _times(pairs, factors):
    """Two bf16 products in each word, rounded to nearest; subnormal operands count."""
    if _INTERPRETED:
        low = widened(_low(pairs)) * widened(_low(factors))
        high = widened(_high(pairs)) * widened(_high(factors))
        products = _pairs(rounded(low, tl.bfloat16), rounded(high, tl.bfloat16))
    else:
        products = tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [pairs, factors],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return products


@triton.jit
def _product(w, x, total):
    """total + w @ x"""
    return tl.dot(widened(w), widened(x), total) if _INTERPRETED else tl.dot(w, x, total)


@triton.jit
def _factors(scales, nvfp4: tl.constexpr, wide: tl.constexpr):
    """uint32 [N] of four scale bytes -> pairs of bf16 factors [N, 16], one for each word.

    A code in place is its value times 2^-126, a subnormal: the biases of E2M1 and bf16 differ by
    that much. Normalizing it and scaling it are one product where the factor is a bf16.
    """
    shifts = (tl.arange(0, 16) % 4) * 8
    byte = (scales[:, None] >> shifts[None, :]) & 255
    if nvfp4:
        # E4M3 in place is its value times 2^-120. Values come out 2^-9 of theirs, so that no
        # factor overflows.
        f = _times((byte & 127) * 0x00100010, tl.full(byte.shape, _TWO_TO_120, tl.uint32))
        f = _times(f, tl.full(byte.shape, _TWO_TO_117, tl.uint32))
        f = tl.where((byte & 127) == 127, _NAN, f)
    elif wide:
        f = tl.where(byte == 0, 0x00400040, byte * 0x00800080)
        f = tl.where(byte == 255, _NAN, f)
    else:
        f = (byte + 126) * 0x00800080
    return f


@triton.jit
def _decode(
    words, first, second, decode_scale,
    nvfp4: tl.constexpr, wide: tl.constexpr, warps: tl.constexpr,
):  # fmt: skip
    """uint32 words [N, 16] and factors of the codes with s = 0 and 1 -> bf16 [N, 128].

    Rows of ``words`` are in the order of `_rows`, those of the result ascend.
    """
    rows: tl.constexpr = words.shape[0]
    p0 = words & _SIGN_AND_MAGNITUDE
    p1 = (words << 3) & _SIGN_AND_MAGNITUDE
    p2 = (words << 6) & _SIGN_AND_MAGNITUDE
    p3 = ((words << 1) & 0x80008000) | ((words >> 5) & 0x01400140) | ((words >> 3) & 0x00800080)
    if wide:
        normal = tl.full(words.shape, _TWO_TO_126, tl.uint32)
        p0, p1 = _times(p0, normal), _times(p1, normal)
        p2, p3 = _times(p2, normal), _times(p3, normal)
    p0, p1 = _times(p0, first), _times(p1, first)
    p2, p3 = _times(p2, second), _times(p3, second)
    zero = tl.join(tl.join(_low(p0), _high(p0)), tl.join(_low(p1), _high(p1)))
    one = tl.join(tl.join(_low(p2), _high(p2)), tl.join(_low(p3), _high(p3)))
    values = tl.join(zero, one)  # [N, (t, i), c, h, s]
    if nvfp4:
        values = rounded(widened(values) * decode_scale, tl.bfloat16)
    values = values.reshape(rows // (16 * warps), 2, warps, 8, 4, 4, 2, 2, 2)
    return values.permute(0, 2, 1, 3, 5, 8, 7, 4, 6).reshape(rows, 128)


@triton.jit
def _rows(block_n: tl.constexpr, warps: tl.constexpr):
    """The rows of a tile in the order in which a coalesced load gives them to threads.

    Eight rows go to each warp, while a tensor core wants rows r and r + 8 of sixteen in the same
    thread: loading in this order instead, no row changes threads.
    """
    r = tl.arange(0, block_n)
    warp = r // 8 % warps
    return (r // (16 * warps) * warps + warp) * 16 + r // (8 * warps) % 2 * 8 + r % 8


@triton.jit
def activated(gate, up, alpha: tl.constexpr, beta: tl.constexpr, limit: tl.constexpr):
    """As `moe_a2a.experts.Activation`; no limit where it is None."""
    if limit is not None:
        every: tl.constexpr = tl.PropagateNan.ALL
        gate = tl.minimum(gate, limit, propagate_nan=every)
        up = tl.clamp(up, -limit, limit, propagate_nan=every)
    return gate * tl.sigmoid(alpha * gate) * (up + beta)


@triton.jit
def tile_of(
    pid, expert_offsets, experts: tl.constexpr, experts_up: tl.constexpr,
    tiles_n: tl.constexpr, block_m: tl.constexpr, group_m,
):  # fmt: skip
    """First row, tile of columns and expert of a program; no rows are left where expert = E.

    ``group_m`` tiles of rows take turns before the next columns, so that the weights they share
    are still in L2.
    """
    within = pid % (group_m * tiles_n)
    start = (pid // (group_m * tiles_n) * group_m + within % group_m) * block_m
    each = tl.arange(0, experts_up)
    ends = tl.load(expert_offsets + 1 + each, mask=each < experts, other=0x7FFFFFFF)
    return start, within // group_m, tl.sum((ends <= start).to(tl.int32), 0)


@triton.jit
def _tile(
    x, row_index, words, scales, decode_scale, bias, out, length, x_stride, out_stride,
    start, tile, expert, n: tl.constexpr, k: tl.constexpr,
    x_columns: tl.constexpr, out_columns: tl.constexpr, gather: tl.constexpr,
    gated: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr, limit: tl.constexpr,
    nvfp4: tl.constexpr, wide: tl.constexpr, far: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, warps: tl.constexpr,
):  # fmt: skip
    """``block_m`` rows from ``start`` on times ``block_n`` rows of an expert's matrix."""
    at = start + tl.arange(0, block_m)
    rows = tl.load(row_index + at, mask=at < length, other=-1)
    live = rows >= 0
    # Lanes without a row of their own get zeros where that saves reading, and another's row where
    # it would cost more than it saves; their results are not stored.
    masked: tl.constexpr = block_m < _HALVED
    source = tl.where(live, rows, 0) if gather else tl.minimum(at, length - 1)
    columns = tl.arange(0, 128)
    if far:
        source = source.to(tl.int64)
    # One base that moves and offsets that don't take half the registers of pointers.
    offsets = source[:, None] * x_stride + columns[None, :]
    parts: tl.constexpr = 2 if gated else 1
    planes: tl.constexpr = 2 if nvfp4 else 1
    chunk_rows: tl.constexpr = n * parts
    w_rows = tile * block_n + _rows(block_n, warps)
    first_row = expert.to(tl.int64) * (k // 128) * chunk_rows
    w_at = words + (first_row + w_rows)[:, None] * 16 + tl.arange(0, 16)[None, :]
    s_at = scales + first_row * planes + w_rows
    g = tl.load(decode_scale + expert) if nvfp4 else 1.0
    total = tl.zeros((block_n, block_m), tl.float32)
    upper = tl.zeros((block_n, block_m), tl.float32)
    for chunk in range(k // 128):
        if masked or x_columns < k:
            wanted = live[:, None] | (not masked)
            if x_columns < k:
                wanted = wanted & (columns[None, :] < x_columns - chunk * 128)
            xs = tl.load(x + offsets, mask=wanted, other=0.0).T
        else:
            xs = tl.load(x + offsets).T
        w = tl.load(w_at).to(tl.uint32, bitcast=True)
        f = _factors(tl.load(s_at).to(tl.uint32, bitcast=True), nvfp4, wide)
        f2 = f
        if nvfp4:
            f2 = _factors(tl.load(s_at + chunk_rows).to(tl.uint32, bitcast=True), nvfp4, wide)
        total = _product(_decode(w, f, f2, g, nvfp4, wide, warps), xs, total)
        if gated:
            w = tl.load(w_at + n * 16).to(tl.uint32, bitcast=True)
            f = _factors(tl.load(s_at + n).to(tl.uint32, bitcast=True), nvfp4, wide)
            f2 = f
            if nvfp4:
                s = tl.load(s_at + chunk_rows + n).to(tl.uint32, bitcast=True)
                f2 = _factors(s, nvfp4, wide)
            upper = _product(_decode(w, f, f2, g, nvfp4, wide, warps), xs, upper)
        x += 128
        w_at += chunk_rows * 16
        s_at += chunk_rows * planes
    w_rows = tile * block_n + tl.arange(0, block_n)
    if bias is not None:
        bias_at = bias + expert * chunk_rows + w_rows
        total += tl.load(bias_at)[:, None]
        if gated:
            upper += tl.load(bias_at + n)[:, None]
    if gated:
        total = activated(total, upper, alpha, beta, limit)
    out_at = out + at.to(tl.int64)[None, :] * out_stride + w_rows[:, None]
    wanted = live[None, :]
    if out_columns < n:
        wanted = wanted & (w_rows[:, None] < out_columns)
    tl.store(out_at, rounded(total, out.dtype.element_ty), mask=wanted)


@triton.jit
def grouped_gemm(
    x, row_index, expert_offsets, words, scales, decode_scale, bias, out,
    length, x_stride, out_stride, group_m,
    experts: tl.constexpr, experts_up: tl.constexpr, n: tl.constexpr, k: tl.constexpr,
    x_columns: tl.constexpr, out_columns: tl.constexpr, gather: tl.constexpr,
    gated: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr, limit: tl.constexpr,
    nvfp4: tl.constexpr, wide: tl.constexpr, far: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, warps: tl.constexpr,
):  # fmt: skip
    """out [L, n] = x @ w.T + bias of each row's expert; gated: the activation of both halves.

    Rows of ``out`` whose row_index is -1 stay as they are. x: bf16, [rows, x_columns] by row_index
    where ``gather``, else [L, x_columns]; columns of w past x_columns meet zeros. ``far``: x has
    more than 2^31 elements.
    bias: fp32 [E, n] ([E, 2n] gated) or None.
    """
    start, tile, expert = tile_of(
        tl.program_id(0), expert_offsets, experts, experts_up, n // block_n, block_m, group_m
    )
    if expert == experts:
        return
    at = start + tl.arange(0, block_m)
    rows = tl.load(row_index + at, mask=at < length, other=-1)
    # An expert's rows come before its gaps.
    live = tl.sum((rows >= 0).to(tl.int32), 0)
    if live == 0:
        return
    # Where products and not weights take the time, half a tile is worth code of its own: it ends
    # the rows of half of the experts.
    if block_m >= _HALVED and live <= block_m // 2:
        _tile(
            x, row_index, words, scales, decode_scale, bias, out, length, x_stride, out_stride,
            start, tile, expert, n, k, x_columns, out_columns, gather, gated, alpha, beta, limit,
            nvfp4, wide, far, block_m // 2, block_n, warps,
        )  # fmt: skip
    else:
        _tile(
            x, row_index, words, scales, decode_scale, bias, out, length, x_stride, out_stride,
            start, tile, expert, n, k, x_columns, out_columns, gather, gated, alpha, beta, limit,
            nvfp4, wide, far, block_m, block_n, warps,
        )  # fmt: skip
