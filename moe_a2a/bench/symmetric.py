"""Memory that every rank's GPU can address: for the link's bound and for one rival."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_a2a.group import Group

__all__ = ["Symmetric", "symmetric"]

_TIMEOUT = 60.0  # seconds that a rank may come late


class Symmetric(NamedTuple):
    """One allocation on every rank.

    Attributes:
        regions: uint8 [nbytes] of each rank, by rank; this rank's own among them.
        handle: torch's, for ``barrier``.
    """

    regions: list[Tensor]
    handle: Any


def symmetric(nbytes: int, device: torch.device) -> Symmetric:
    """Zeroed memory of the default group. Collective."""
    import torch.distributed._symmetric_memory as symmetric_memory

    from moe_a2a.backends.symmetric import allocate

    group = Group(None, _TIMEOUT)
    memory = allocate(nbytes, device, group)
    # Not by `open_window`: a barrier of torch's needs a process group that torch knows.
    handle: Any = symmetric_memory.rendezvous(memory, dist.distributed_c10d._get_default_group())
    regions = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
    regions[group.rank] = memory
    dist.barrier()
    return Symmetric(regions, handle)
