"""A layer of experts once more, in numpy and float64: shares no code with moe_a2a.

T tokens, K top_k, E experts, H hidden_size, I intermediate size; a matrix is N rows of K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests import oracle_formats as wires

F32, F64 = np.float32, np.float64
SIXES = {"mxfp6_e3m2": ml_dtypes.float6_e3m2fn, "mxfp6_e2m3": ml_dtypes.float6_e2m3fn}
FORMATS = ("bf16", "fp32", "fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4", *SIXES)
_PLAIN = {"bf16": ml_dtypes.bfloat16, "fp32": F32}


@dataclass(frozen=True)
class Layer:
    """All experts of the model, decoded: float64 w13 [E, 2I, H], w2 [E, H, I], biases or 0."""

    w13: np.ndarray
    w2: np.ndarray
    b13: np.ndarray | None = None  # [E, 2I]
    b2: np.ndarray | None = None  # [E, H]
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = np.inf


def six_value(codes: np.ndarray, name: str) -> np.ndarray:
    """Codes, one per byte -> float32."""
    return codes.view(SIXES[name]).astype(F32)


def six_codes(x: np.ndarray, name: str) -> np.ndarray:
    """float32 -> codes, one per byte; NaN is code 31."""
    largest = six_value(np.array([31], np.uint8), name)[0]
    with np.errstate(invalid="ignore"):
        codes = np.clip(x, -largest, largest).astype(SIXES[name]).view(np.uint8) & 63
    return np.where(np.isnan(x), np.uint8(31), codes)


def six_pack(codes: np.ndarray) -> np.ndarray:
    """`[..., N]` codes -> `[..., 3N/4]` bytes: a stream of bits, lowest first."""
    bits = np.unpackbits(codes[..., None], axis=-1, count=6, bitorder="little")
    return np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def six_unpack(packed: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(packed, axis=-1, bitorder="little")
    groups = bits.reshape(*packed.shape[:-1], -1, 6)
    return np.packbits(groups, axis=-1, bitorder="little")[..., 0]


def six_exponent(amax: np.ndarray, name: str, rule: str) -> np.ndarray:
    """E8M0 byte by definition: where amax stands among thresholds that float64 holds exactly."""
    largest = float(six_value(np.array([31], np.uint8), name)[0])
    binade = 2.0 ** np.floor(np.log2(largest))
    amax = amax.astype(F64)
    if rule == "ceil":
        e = np.searchsorted(largest * np.exp2(np.arange(-127.0, 128)), amax, side="left")
    else:  # "even" takes the next binade from where amax rounds up to it
        step = {"mxfp6_e3m2": 1 / 4, "mxfp6_e2m3": 1 / 8}[name]
        reached = binade if rule == "floor" else binade * (1 - step / 4)
        e = np.searchsorted(reached * np.exp2(np.arange(-127.0, 128)), amax, side="right") - 1
    return np.where(np.isinf(amax), 254, np.clip(e, 0, 254)).astype(np.uint8)


def quantize(x: np.ndarray, name: str, gs: float = 1.0, rule: str = "ceil"):
    """float32 `[..., K]` -> payload and scale bytes, of a wire or MXFP6."""
    if name not in SIXES:
        return wires.quantize(x, name, gs, rule=rule)
    blocks = np.ascontiguousarray(x, F32).reshape(*x.shape[:-1], -1, 32)
    scales = six_exponent(wires.block_amax(blocks), name, rule)
    with np.errstate(all="ignore"):
        scaled = blocks * np.ldexp(F32(1), 127 - scales.astype(np.int32))[..., None]
    return six_pack(six_codes(scaled, name).reshape(x.shape)), scales


def dequantize(payload: np.ndarray, scales: np.ndarray, name: str, gs: float = 1.0) -> np.ndarray:
    """Payload and scale bytes -> float32 `[..., K]`."""
    if name == "fp32":
        return payload.view(F32)
    if name not in SIXES:
        return wires.dequantize(payload, scales, name, None, gs)
    values = six_value(six_unpack(payload), name).reshape(*scales.shape, 32)
    with np.errstate(over="ignore"):
        return (values * wires.e8m0_value(scales)[..., None]).reshape(*scales.shape[:-1], -1)


def weights(
    payload: np.ndarray, scales: np.ndarray, name: str, decode: np.ndarray | None = None
) -> np.ndarray:
    """Bytes [E, N, ...] -> float64 [E, N, K]; `decode` [E] multiplies expert by expert."""
    experts = []
    for e in range(len(payload)):
        values = dequantize(payload[e], scales[e] if scales.size else scales, name).astype(F64)
        experts.append(values if decode is None else values * F64(decode[e]))
    return np.stack(experts)


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(F32).astype(ml_dtypes.bfloat16).astype(F64)


def activation(layer: Layer, gate_up: np.ndarray) -> np.ndarray:
    """[n, 2I] -> [n, I]"""
    half = gate_up.shape[-1] // 2
    g = np.minimum(gate_up[..., :half], layer.limit)
    u = np.minimum(np.maximum(gate_up[..., half:], -layer.limit), layer.limit)
    return g / (1 + np.exp(-layer.alpha * g)) * (u + layer.beta)


def expert(layer: Layer, e: int, x: np.ndarray, seen=None) -> np.ndarray:
    """One expert on rows [n, H]. `seen(h, 2)` is what hardware makes of w2's rows: rounding and
    quantization, or nothing; matrices are rounded to bf16 with it too."""
    w13, w2 = layer.w13[e], layer.w2[e]
    if seen is not None:
        x, w13, w2 = seen(x, 1), seen(w13, 0), seen(w2, 0)
    h = x @ w13.T + (0 if layer.b13 is None else layer.b13[e])
    h = activation(layer, h)
    h = h if seen is None else seen(h, 2)
    return h @ w2.T + (0 if layer.b2 is None else layer.b2[e])


def run(layer: Layer, x: np.ndarray, ids: np.ndarray, router: np.ndarray, seen=None):
    """float64 [T, H] of all tokens on one process, and the sum of its terms' magnitudes."""
    out = np.zeros((len(x), layer.w2.shape[1]))
    size = np.zeros_like(out)
    for e in range(len(layer.w13)):
        t, k = (ids == e).nonzero()
        if len(t):
            terms = router[t, k, None].astype(F64) * expert(layer, e, x[t].astype(F64), seen)
            np.add.at(out, t, terms)
            np.add.at(size, t, np.abs(terms))
    return out, size


def hardware(name13: str, name2: str, weight: str, arrived: str, gs=(1.0, 1.0), rule="ceil"):
    """`seen` for `run`: rows are quantized to `name13` unless they arrived so, then to `name2`."""

    def quantized(x, name, scale):
        if name in _PLAIN or name == "fp16":
            return x
        return dequantize(*quantize(x.astype(F32), name, scale, rule), name, scale).astype(F64)

    def seen(x, which):
        rounded = (lambda x: x) if weight == "fp32" else bf16
        if which == 1 and name13 != arrived:
            x = quantized(x, name13, gs[0])
        if which == 2:
            x = quantized(rounded(x), name2, gs[1])
        return rounded(x)

    return seen


def far_rows(x: np.ndarray, y: np.ndarray, limit: float) -> int:
    """Rows further apart than `limit`. Where rounding differs in its last bit a code may tip over
    now and then, which moves a whole row: a handful is no fault, and no other row may be far."""
    return sum(distance(*pair) > limit for pair in zip(x, y, strict=True))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2): 0 for equal, 1 for unrelated."""
    size = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / size) if size else 0.0
