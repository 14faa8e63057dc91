"""Memory of a CUDA device that the other ranks of a group can store to.

The one file that knows `torch.distributed._symmetric_memory`, whose name says what its makers
promise about it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_a2a.errors import MoeA2AError, StateError, WorkspaceError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.group import Group

__all__ = ["SymmetricWindow", "open_window"]

# Windows of ranks that are threads of this process, until all have taken them.
_handed_over: dict[tuple[str, int], Tensor] = {}
_lock = threading.Lock()
# Windows that this process has shared with other processes so far, in any group.
_shared = 0


class SymmetricWindow(NamedTuple):
    """This rank's window, zeroed, and where every rank's lies in this rank's address space.

    Attributes:
        tensor: uint8 [nbytes].
        addresses: by rank.
        keep: what must live as long as the addresses are used.
    """

    tensor: Tensor
    addresses: list[int]
    keep: object


def open_window(nbytes: int, device: torch.device, group: Group) -> SymmetricWindow:
    """Collective over the group.

    Raises:
        WorkspaceError: on every rank, if any has too little memory.
        StateError: on every rank, if the ranks could not find each other.
    """
    global _shared
    problem: MoeA2AError | None = None
    tensor = torch.empty(0)
    try:
        tensor = _allocate(nbytes, device, shared=group.size > 1 and not group.local)
    except torch.OutOfMemoryError:
        there = torch.cuda.mem_get_info(device)[0]
        problem = WorkspaceError(
            f"a window of {nbytes:,} bytes is wanted on {device}; {there:,} bytes are free there. "
            "Lower max_tokens_per_rank, or use a narrower wire (python -m moe_a2a plan)."
        )
    group.agree(problem)
    # Data of symmetric memory is whatever was there.
    tensor.zero_()
    torch.cuda.current_stream(device).synchronize()
    if group.size == 1:
        return SymmetricWindow(tensor, [tensor.data_ptr()], None)
    if group.local:
        return _among_threads(tensor, group)
    assert group.process_group is not None
    require_same_history(group, _shared)
    _shared += 1
    import torch.distributed._symmetric_memory as symmetric_memory

    handle: Any = symmetric_memory.rendezvous(tensor, group.process_group)
    addresses = [int(pointer) + int(handle.offset) for pointer in handle.buffer_ptrs]
    return SymmetricWindow(tensor, addresses, handle)


def require_same_history(group: Group, shared: int) -> None:
    """torch numbers the keys by which ranks exchange their handles per process, whatever the group:
    ranks that have done so a different number of times would wait for each other's keys for ever.

    Raises:
        StateError: on every rank, if ``shared``, windows before this one, differs between them.
    """
    counts = [reply["shared"] for reply in group.exchange({"shared": shared})]
    if len(set(counts)) > 1:
        listed = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(counts))
        raise StateError(
            "the ranks of this group have opened windows with other processes a different number "
            f"of times ({listed}), and torch's symmetric memory then can't match them. Open the "
            "objects of larger groups first, or as many on every rank."
        )


def _allocate(nbytes: int, device: torch.device, *, shared: bool) -> Tensor:
    if not shared:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def _among_threads(tensor: Tensor, group: Group) -> SymmetricWindow:
    with _lock:
        _handed_over[group.name, group.rank] = tensor
    group.agree(None)
    with _lock:
        tensors = [_handed_over[group.name, rank] for rank in range(group.size)]
    group.agree(None)
    with _lock:
        del _handed_over[group.name, group.rank]
    return SymmetricWindow(tensor, [other.data_ptr() for other in tensors], tensors)
