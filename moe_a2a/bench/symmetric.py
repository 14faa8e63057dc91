"""Memory that every rank's GPU can address: for the link's bound and for one rival."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_a2a.group import Group

if TYPE_CHECKING:
    from moe_a2a.backends.symmetric import SymmetricWindow

__all__ = ["Symmetric", "symmetric"]

_TIMEOUT = 60.0  # seconds that a rank may come late


class Symmetric(NamedTuple):
    """One allocation on every rank.

    Attributes:
        regions: uint8 [nbytes] of each rank, by rank; this rank's own among them.
        handle: torch's, for ``barrier``.
        window: keeps the mappings.
    """

    regions: list[Tensor]
    handle: Any
    window: SymmetricWindow


def symmetric(nbytes: int, device: torch.device) -> Symmetric:
    """Zeroed memory of the default group. Collective."""
    from moe_a2a.backends.symmetric import open_window

    group = Group(None, _TIMEOUT)
    window = open_window(nbytes, device, group)
    handle: Any = window.keep
    regions = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
    regions[group.rank] = window.tensor
    dist.barrier()
    return Symmetric(regions, handle, window)
