"""The wire formats once more, in numpy and ml_dtypes: an oracle that shares no code with moe_a2a.

Shared exponents come from tables of thresholds, elements from ml_dtypes' casts. Everything is
returned as raw bytes (uint8), so that one comparison covers every wire. H hidden_size.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

F32 = np.float32
WIRES = ("bf16", "fp16", "fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4")
_FLT_MAX = np.finfo(F32).max
_ONE_SIXTH = np.array(0x3E2AAAAB, np.uint32).view(F32)
_POWERS = np.ldexp(1.0, np.arange(-127, 128))  # float64, exact: entry e is 2^(e-127)
_BLOCK = {"fp8_block128": 128, "mxfp8": 32, "nvfp4": 16, "mxfp4": 32}


def e4m3(x: np.ndarray) -> np.ndarray:
    """float32 -> E4M3 bytes."""
    with np.errstate(invalid="ignore"):
        codes = np.clip(x, F32(-448), F32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def e4m3_value(codes: np.ndarray) -> np.ndarray:
    """E4M3 bytes -> float32."""
    return codes.view(ml_dtypes.float8_e4m3fn).astype(F32)


def e2m1(x: np.ndarray) -> np.ndarray:
    """float32 -> E2M1 codes, one per byte."""
    with np.errstate(invalid="ignore"):
        codes = np.clip(x, F32(-6), F32(6)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return np.where(np.isnan(x), np.uint8(7), codes)


def e2m1_value(codes: np.ndarray) -> np.ndarray:
    """E2M1 codes, one per byte -> float32."""
    return codes.view(ml_dtypes.float4_e2m1fn).astype(F32)


def e8m0_value(codes: np.ndarray) -> np.ndarray:
    """E8M0 bytes -> float32."""
    return codes.view(ml_dtypes.float8_e8m0fnu).astype(F32)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes `[..., H]` -> bytes `[..., H/2]`, the even element in the low half."""
    return codes[..., 1::2] * np.uint8(16) + codes[..., ::2]


def unpack(packed: np.ndarray) -> np.ndarray:
    """Bytes `[..., H/2]` -> codes `[..., H]`."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., ::2], codes[..., 1::2] = packed % 16, packed // 16
    return codes


def block_amax(blocks: np.ndarray) -> np.ndarray:
    """Largest magnitude over the last dimension; NaN doesn't count."""
    return np.where(np.isnan(blocks), F32(0), np.abs(blocks)).max(-1)


def exponent(amax: np.ndarray, wire: str, rule: str = "ceil") -> np.ndarray:
    """E8M0 byte of float32 amax, by definition: in float64, where every threshold is exact."""
    if rule == "ceil":  # the smallest e with amax <= largest element * 2^(e-127)
        largest = 448.0 if wire == "mxfp8" else 6.0
        e = np.searchsorted(largest * _POWERS, amax.astype(np.float64), side="left")
    else:  # the largest e at which amax has reached 4 (floor) or 3.5, which rounds to 4 (even)
        reached = 4.0 if rule == "floor" else 3.5
        e = np.searchsorted(reached * _POWERS, amax.astype(np.float64), side="right") - 1
        e = np.where(np.isinf(amax), 254, e)
    return np.clip(e, 0, 254).astype(np.uint8)


def quantize(
    x: np.ndarray,
    wire: str,
    global_scale: float = 1.0,
    alignment: int = 32,
    rule: str = "ceil",
    ue8m0: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[..., H]` -> payload bytes `[..., n]` and scale bytes `[..., k]`, maybe k = 0."""
    x = np.ascontiguousarray(x, F32)
    with np.errstate(all="ignore"):
        if wire in ("bf16", "fp16"):
            stored = x.astype(ml_dtypes.bfloat16 if wire == "bf16" else np.float16)
            return stored.view(np.uint8), np.zeros((*x.shape[:-1], 0), np.uint8)
        if wire == "mxfp8":
            padding = -x.shape[-1] % alignment
            x = np.concatenate([x, np.zeros((*x.shape[:-1], padding), F32)], -1)
        columns = _BLOCK.get(wire, x.shape[-1])
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // columns, columns)
        codes, scales = _encode(blocks, wire, F32(global_scale), rule, ue8m0)
    payload = codes.reshape(x.shape)
    payload = pack(payload) if wire in ("nvfp4", "mxfp4") else payload
    return payload, np.ascontiguousarray(scales).view(np.uint8)


def _encode(
    blocks: np.ndarray, wire: str, gs: np.float32, rule: str, ue8m0: bool
) -> tuple[np.ndarray, np.ndarray]:
    amax = block_amax(blocks)
    if wire in ("mxfp8", "mxfp4"):
        scales = exponent(amax, wire, rule)
        scaled = blocks * np.ldexp(F32(1), 127 - scales.astype(np.int32))[..., None]
        return (e4m3 if wire == "mxfp8" else e2m1)(scaled), scales
    if wire == "nvfp4":
        scales = e4m3(np.minimum(amax * _ONE_SIXTH * gs, F32(448)))
        sf = e4m3_value(scales)
        out = np.where((amax == 0) | (sf == 0), F32(0), F32(1) / (sf * (F32(1) / gs)))
        return e2m1(blocks * out[..., None]), scales
    m = np.minimum(np.maximum(amax, F32(1e-10)), _FLT_MAX)
    scales = m / F32(448)
    if ue8m0:
        mantissa, power = np.frexp(scales)
        scales = np.ldexp(F32(1), np.where(mantissa == 0.5, power - 1, power))
        return e4m3(blocks / scales[..., None]), scales
    return e4m3(blocks * (F32(448) / m)[..., None]), scales


def dequantize(
    payload: np.ndarray,
    scales: np.ndarray,
    wire: str,
    hidden_size: int | None = None,
    global_scale: float = 1.0,
) -> np.ndarray:
    """Payload and scale bytes -> float32 `[..., hidden_size]`."""
    if wire in ("bf16", "fp16"):
        return payload.view(ml_dtypes.bfloat16 if wire == "bf16" else np.float16).astype(F32)
    codes = unpack(payload) if wire in ("nvfp4", "mxfp4") else payload
    columns = _BLOCK.get(wire, codes.shape[-1])
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // columns, columns)
    with np.errstate(all="ignore"):
        if wire == "nvfp4":
            values = e2m1_value(blocks) * e4m3_value(scales)[..., None] / F32(global_scale)
        elif wire == "mxfp4":
            values = e2m1_value(blocks) * e8m0_value(scales)[..., None]
        elif wire == "mxfp8":
            values = e4m3_value(blocks) * e8m0_value(scales)[..., None]
        else:
            values = e4m3_value(blocks) * scales.view(F32)[..., None]
    return values.reshape(codes.shape)[..., :hidden_size]
