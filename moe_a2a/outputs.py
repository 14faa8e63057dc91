"""Memory for what dispatch and combine return.

Fresh memory of a few hundred KB costs a page fault every 4 KB wherever malloc gives freed blocks
back to the kernel: more time than the sum that fills it. So an output is handed out again once
nobody holds it any more.

Shape letters: T tokens of this rank, H hidden_size, W ep_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Counts", "Outputs"]

_BATCH = 64  # counts to an allocation, which takes a fifth of an eager call on CUDA
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


class Counts:
    """int32 tensors [W] of torch's allocator on one device: each is handed out once."""

    def __init__(self, ep_size: int, device: torch.device) -> None:
        self._size, self._device = ep_size, device
        self._cuda, self._index = device.type == "cuda", device.index or 0
        # By stream: memory belongs to the one that was current when it was allocated.
        self._ready: dict[int, list[Tensor]] = {}

    def take(self) -> Tensor:
        """[W], uninitialized."""
        stream = 0
        if self._cuda:
            # What a graph writes has to live in the graph's own memory.
            if torch._C._cuda_isCurrentStreamCapturing():
                return torch.empty(self._size, dtype=torch.int32, device=self._device)
            stream = torch._C._cuda_getCurrentRawStream(self._index)
        ready = self._ready.get(stream)
        if not ready:
            ready = self._ready[stream] = self._batch()
        return ready.pop()

    def _batch(self) -> list[Tensor]:
        with torch.inference_mode(False):  # they outlive the mode that the caller is in
            batch = torch.empty(_BATCH, self._size, dtype=torch.int32, device=self._device)
            return [row.detach() for row in batch.unbind()]


def _references(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count
