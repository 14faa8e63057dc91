"""Memory for what combine returns.

Fresh memory of a few hundred KB costs a page fault every 4 KB wherever malloc gives freed blocks
back to the kernel: more time than the sum that fills it. So an output is handed out again once
nobody holds it any more.

Shape letters: T tokens of this rank, H hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Outputs"]

_SMALL = 1 << 16  # bytes up to which malloc keeps its blocks
_MINE = 2  # references to the storage of a tensor that nobody shares: its own, and the one asking


class Outputs:
    """Output tensors [T, H] of torch's allocator on one device.

    Keeps the last two: in ``out = a2a.combine(y)`` the one before is held until the next is there.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self._hidden, self._device = hidden_size, device
        self._keeps = device.type == "cpu"  # torch's CUDA allocator keeps its blocks itself
        self._kept: list[Tensor] = []

    def take(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """[tokens, H], uninitialized: memory that no tensor outside shares."""
        if not self._keeps or tokens * self._hidden * dtype.itemsize <= _SMALL:
            return torch.empty(tokens, self._hidden, dtype=dtype, device=self._device)
        for kept in self._kept:
            if kept.shape[0] == tokens and kept.dtype == dtype and _references(kept) == _MINE:
                # Another tensor on the same storage: it, and every view of it, is a reference.
                return kept.detach()
        with torch.inference_mode(False):  # it outlives the mode that the caller is in
            fresh = torch.empty(tokens, self._hidden, dtype=dtype)
        self._kept = [*self._kept[-1:], fresh]
        return fresh.detach()


def _references(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count
