"""What dispatch must deliver and combine must return, computed from every rank's inputs in numpy.

Written from docs/design.md; shares no code with moe_a2a. Everything is bytes or float32.
T tokens of a rank, K top_k, H hidden_size, E num_experts, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from tests import oracle_formats as formats

F32 = np.float32
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": F32}


@dataclass(frozen=True)
class Tokens:
    """One rank's dispatch call.

    `x` is float32 [T, H] of values that the input dtype holds exactly; where the caller quantized,
    `payload` and `scales` are the bytes [T, n] in its place.
    """

    x: np.ndarray
    ids: np.ndarray  # int64 [T, K]
    weights: np.ndarray  # float32 [T, K]
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # uint8 [T, n]
    payload: np.ndarray | None = None
    scales: np.ndarray | None = None

    def wire_rows(self, wire: str, global_scale: float, alignment: int) -> tuple[np.ndarray, ...]:
        if self.payload is not None and self.scales is not None:
            return self.payload, self.scales
        return formats.quantize(self.x, wire, global_scale, alignment)


@dataclass(frozen=True)
class Delivery:
    """What one rank receives: [W, R, ...], rows past counts[s] filled as `scrub="all"` does."""

    counts: np.ndarray
    payload: np.ndarray  # bytes
    scales: np.ndarray  # bytes, maybe none
    ids: np.ndarray
    weights: np.ndarray
    extra: dict[str, np.ndarray]

    def real(self) -> np.ndarray:
        """bool [W, R]"""
        return np.arange(self.ids.shape[1])[None, :] < self.counts[:, None]


def owners(num_experts: int, ep_size: int) -> list[int]:
    """Rank of every expert: with b = E // W and r = E % W the first r ranks own b + 1, others b."""
    base, remainder = num_experts // ep_size, num_experts % ep_size
    owned = [base + 1 if rank < remainder else base for rank in range(ep_size)]
    return [rank for rank, count in enumerate(owned) for _ in range(count)]


def destinations(ids: np.ndarray, owner: list[int], active: set[int]) -> list[list[int]]:
    """For each token the distinct active ranks that it goes to, ascending."""
    exists = range(len(owner))
    return [sorted({owner[i] for i in row if i in exists} & active) for row in ids.tolist()]


def dispatch(
    tokens: list[Tokens],
    me: int,
    rows: int,
    *,
    num_experts: int,
    wire: str,
    invalid: int = -1,
    active: set[int] | None = None,
    global_scale: float = 1.0,
    alignment: int = 32,
) -> Delivery:
    """What rank `me` receives; `wire` is what travels (bf16 where quantization is deferred)."""
    size, top_k = len(tokens), tokens[0].ids.shape[1]
    owner = owners(num_experts, size)
    active = set(range(size)) if active is None else active
    samples = tokens[me].wire_rows(wire, global_scale, alignment)
    payload, scales = (np.zeros((size, rows, part.shape[1]), np.uint8) for part in samples)
    ids = np.full((size, rows, top_k), invalid, np.int32)
    weights = np.zeros((size, rows, top_k), F32)
    extra = {n: np.zeros((size, rows, v.shape[1]), np.uint8) for n, v in tokens[me].extra.items()}
    counts = np.zeros(size, np.int32)
    for source in sorted(active):
        given = tokens[source]
        sent_payload, sent_scales = given.wire_rows(wire, global_scale, alignment)
        for t, ranks in enumerate(destinations(given.ids, owner, active)):
            if me not in ranks:
                continue
            at = source, counts[source]
            counts[source] += 1
            payload[at], scales[at] = sent_payload[t], sent_scales[t]
            for k, expert in enumerate(given.ids[t].tolist()):
                if 0 <= expert < num_experts and owner[expert] in active:
                    ids[at][k], weights[at][k] = expert, given.weights[t, k]
            for name in extra:
                extra[name][at] = given.extra[name][t]
    return Delivery(counts, payload, scales, ids, weights, extra)


def through_wire(rows: np.ndarray, combine_wire: str) -> np.ndarray:
    """float32 rows as they reach the sum."""
    if combine_wire in DTYPES:
        return rows
    payload, scales = formats.quantize(rows, combine_wire)
    return formats.dequantize(payload, scales, combine_wire, rows.shape[-1])


def combine(
    tokens: Tokens,
    outputs: list[np.ndarray],
    me: int,
    *,
    num_experts: int,
    combine_wire: str,
    dtype: str,
    active: set[int] | None = None,
) -> np.ndarray:
    """What rank `me` gets back, in `dtype`; `outputs[d]` is rank d's y as float32 [W, R, H]."""
    owner = owners(num_experts, len(outputs))
    active = set(range(len(outputs))) if active is None else active
    slot = [0] * len(outputs)
    total = np.zeros(tokens.x.shape, F32)
    # An inbox row each: a wire's blocks never cross rows, so that all may be coded at once.
    returned = [through_wire(y[me], combine_wire) for y in outputs]
    with np.errstate(all="ignore"):
        for t, ranks in enumerate(destinations(tokens.ids, owner, active)):
            for rank in ranks:
                total[t] = total[t] + returned[rank][slot[rank]]
                slot[rank] += 1
        return total.astype(DTYPES[dtype])
