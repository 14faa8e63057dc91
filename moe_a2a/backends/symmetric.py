"""Memory of a CUDA device that the other ranks of a group can store to.

The one file that knows `torch.distributed._symmetric_memory`, whose name says what its makers
promise about it.
"""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_a2a.errors import MoeA2AError, StateError, WorkspaceError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.group import Group

__all__ = ["SymmetricWindow", "allocate", "open_window"]

# Windows of ranks that are threads of this process, until all have taken them.
_handed_over: dict[tuple[str, int], Tensor] = {}
_lock = threading.Lock()


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
        StateError: on every rank, if torch can't map the windows on one of them.
        PeerTimeout: ``ranks`` did not come within the group's timeout.
    """
    tensor = allocate(nbytes, device, group)
    if group.size == 1:
        return SymmetricWindow(tensor, [tensor.data_ptr()], None)
    if group.local:
        return _among_threads(tensor, group)
    handle = rendezvous(tensor, group)
    addresses = [int(pointer) + int(handle.offset) for pointer in handle.buffer_ptrs]
    return SymmetricWindow(tensor, addresses, handle)


def allocate(nbytes: int, device: torch.device, group: Group) -> Tensor:
    """Zeroed uint8 [nbytes] that the group's ranks can be given the addresses of. Collective.

    Raises:
        WorkspaceError: on every rank, if any has too little memory.
    """
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
    return tensor


def _allocate(nbytes: int, device: torch.device, *, shared: bool) -> Tensor:
    if not shared:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def rendezvous(tensor: Tensor, group: Group) -> Any:
    """torch's handle of the ranks' tensors, for their addresses only. Collective.

    torch finds the store to exchange handles in by the name of a process group. It gets one that
    has nothing but a `WindowStore` (which says why), and exists for this call.

    Raises:
        StateError: on every rank, if torch fails on one of them.
        PeerTimeout: ``ranks`` did not come within the group's timeout.
    """
    from torch._C import _distributed_c10d as c10d

    from moe_a2a.backends.window_store import WindowStore

    store = WindowStore(group)
    # torch before 2.11 never forgets a name. No slash: it may come up in keys.
    name: Any = f"moe_a2a-{uuid.uuid4().hex}"
    registered = c10d.ProcessGroup(store, group.rank, group.size)
    c10d._register_process_group(name, registered)
    handle: Any = None
    problem: StateError | None = None
    try:
        # Where torch before 2.11 looks. (TorchVersion compares numbers.) Later ones would take it
        # as a wish to compare how many allocations the ranks have made, again per process.
        if torch.__version__ < "2.11":
            c10d._SymmetricMemory.set_group_info(name, group.rank, group.size, store)
        handle = c10d._SymmetricMemory.rendezvous(tensor, name)
    except StateError as error:  # another rank's
        problem = error
    except RuntimeError as error:
        first = str(error).partition("\n")[0]  # C++ frames follow
        text = f"torch can't map the windows of the ranks: {first}"
        store.fail(f"rank {group.rank}: {text}")
        problem = StateError(text)
        problem.__cause__ = error
    finally:
        c10d._unregister_process_group(name)
    group.agree(problem)
    store.clear()
    return handle


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
