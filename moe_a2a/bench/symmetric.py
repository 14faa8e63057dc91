"""Memory that every rank's GPU can address: for the link's bound and for one rival."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Symmetric", "symmetric"]


class Symmetric(NamedTuple):
    """One allocation on every rank.

    Attributes:
        regions: uint8 [nbytes] of each rank, by rank; this rank's own among them.
        handle: torch's, for ``barrier``; keeps the mappings.
    """

    regions: list[Tensor]
    handle: Any


def symmetric(nbytes: int, device: torch.device) -> Symmetric:
    """Zeroed memory of the default group. Collective, and so is its end: free it on every rank."""
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    group = dist.distributed_c10d._get_default_group()
    handle = _symmetric_memory.rendezvous(own, group.group_name)
    assert handle is not None
    own.zero_()
    torch.cuda.synchronize()
    dist.barrier()
    regions = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size())]
    regions[group.rank()] = own
    return Symmetric(regions, handle)
