"""Received rows by local expert, and sums of their weighted outputs: numpy, one choice at a time.

Written from docs/embedding.md; shares no code with moe_a2a. E experts of one rank, K top_k,
H hidden_size, W ep_size, R runtime_max_tokens, N places of the list.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.oracle import DTYPES

F32 = np.float32


class Lists(NamedTuple):
    row_index: np.ndarray  # int32 [N]
    expert_offsets: np.ndarray  # int32 [E + 1]
    row_weights: np.ndarray  # float32 [N]
    positions: np.ndarray  # int32 [W * R, K]


def group(
    ids: np.ndarray, weights: np.ndarray, counts: np.ndarray, experts: range, align: int
) -> Lists:
    """Of ids and weights [W, R, K]. Where places are too few, as CUDA has it: -2."""
    sources, rows, top_k = ids.shape
    size = sources * rows * min(top_k, len(experts)) + len(experts) * (align - 1)
    index, router = np.full(size, -1, np.int32), np.zeros(size, F32)
    positions = np.full((sources * rows, top_k), -1, np.int32)
    offsets, end = [0], size - size % align
    for expert in experts:
        at = offsets[-1]
        for source in range(sources):
            for slot in range(counts[source]):
                for choice in range(top_k):
                    if ids[source, slot, choice] != expert:
                        continue
                    row = source * rows + slot
                    positions[row, choice] = at if at < end else -2
                    if at < end:
                        index[at], router[at] = row, weights[source, slot, choice]
                    at += 1
        while at % align:
            at += 1
        offsets.append(at)
    return Lists(index, np.minimum(np.array(offsets), end).astype(np.int32), router, positions)


def gather(flat: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[W * R, n] -> [N, n]"""
    rows = [flat[row] if row >= 0 else np.zeros_like(flat[0]) for row in index]
    return np.array(rows, flat.dtype).reshape(len(index), flat.shape[1])


def sums(rows: np.ndarray, lists: Lists, dtype: str) -> np.ndarray:
    """float32 [W * R, H] that ``dtype`` holds: what experts with y would have written.

    ``rows`` is float32 [N, H].
    """
    total = np.zeros((len(lists.positions), rows.shape[1]), F32)
    with np.errstate(all="ignore"):
        for row, places in enumerate(lists.positions):
            if -2 in places:
                total[row] = np.nan
            for place in sorted(place for place in places if place >= 0):
                product = rows[place] * lists.row_weights[place]
                total[row] = total[row] + product
        return total.astype(DTYPES[dtype]).astype(F32)
