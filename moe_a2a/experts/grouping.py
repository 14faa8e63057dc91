"""Received rows sorted by local expert, on the device and without waiting for it.

n = W*R received rows, K top_k, E local experts, L = n * min(K, E) + E * (align - 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grouped", "group"]


class Grouped(NamedTuple):
    """Where the rows of each expert are.

    Attributes:
        row_index: int32 [L]: the received row, -1 in gaps and past the end.
        expert_offsets: int32 [E+1], multiples of align: where an expert's rows begin.
        row_weights: fp32 [L], 0 where row_index is -1.
        positions: int32 [n, K]: where a choice is; -1 where it is not of an expert here, -2 where
            there was no room (only tokens that name an expert twice can need more than L).
    """

    row_index: Tensor
    expert_offsets: Tensor
    row_weights: Tensor
    positions: Tensor


def group(local_ids: Tensor, weights: Tensor, num_experts: int, align: int) -> Grouped:
    """Inside an expert rows keep their order, and a row that names it twice is there twice.

    Args:
        local_ids: int32 [n, K]; outside 0..E-1 is no expert here.
        weights: fp32 [n, K].
        align: every expert's rows start at a multiple of it.
    """
    n, top_k = local_ids.shape
    device = local_ids.device
    length = n * min(top_k, num_experts) + num_experts * (align - 1)
    flat = local_ids.reshape(-1)
    here = (flat >= 0) & (flat < num_experts)
    keys, order = torch.where(here, flat, num_experts).sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=keys.dtype, device=device)
    starts = torch.searchsorted(keys, edges)
    sizes = (starts.diff() + align - 1) // align * align
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    offsets[1:] = sizes.cumsum(0)
    within = torch.arange(len(flat), device=device) - starts[keys.long()]
    places = offsets[keys.long()] + within
    mine = keys < num_experts
    fits = mine & (places < length)
    # One place past the end takes what has none: a mask would make the host wait for its count.
    target = torch.where(fits, places, length)
    row_index = torch.full((length + 1,), -1, dtype=torch.int32, device=device)
    row_index.scatter_(0, target, torch.where(fits, order // max(top_k, 1), -1).to(torch.int32))
    row_weights = torch.zeros(length + 1, dtype=torch.float32, device=device)
    row_weights.scatter_(0, target, weights.reshape(-1)[order])
    found = torch.where(fits, places, torch.where(mine, -2, -1)).to(torch.int32)
    positions = torch.empty_like(found).scatter_(0, order, found)
    return Grouped(
        row_index[:length],
        offsets.clamp(max=length).to(torch.int32),
        row_weights[:length],
        positions.view(n, top_k),
    )
