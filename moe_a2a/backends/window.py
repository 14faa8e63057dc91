"""Anonymous shared memory: one rank's window, and a peer's window seen from here.

memfd_create gives memory without a name, so a crash at any moment leaves nothing behind. A peer
opens it by way of /proc/PID/fd, which the kernel allows to the same user only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import NamedTuple

import torch

from moe_a2a.errors import StateError, WorkspaceError
from moe_a2a.memory import memory_available

__all__ = ["PeerWindow", "Ticket", "Window"]


class Ticket(NamedTuple):
    """What a peer needs to open a window, and to know that it is the right one."""

    pid: int
    descriptor: int
    inode: int


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE, _MADV_REMOVE = 0x10, 0x4000, 9
_MAP_FAILED = ctypes.c_void_p(-1).value


def _map_shared(descriptor: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] over the file; unmapped when the last view of it is gone.

    Not mmap.mmap, which keeps a duplicate of the descriptor for as long as the mapping lives.
    """
    address = _libc.mmap(None, nbytes, _READ_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, nbytes).atexit = False
    with torch.inference_mode(False):  # it outlives the mode that the caller is in
        return torch.frombuffer(memory, dtype=torch.uint8)


def _forget(address: int, nbytes: int) -> None:
    """Puts anonymous zeros over a mapping: the shared memory behind it is let go, and a tensor that
    still looks there reads zeros instead of faulting."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
    _libc.mmap(address, nbytes, _READ_WRITE, flags, -1, 0)


class Window:
    """This rank's window: zeroed, and really there as far as ``committed`` bytes.

    Raises:
        WorkspaceError: the memory is not to be had.
    """

    def __init__(self, nbytes: int, committed: int) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.memfd_create("moe_a2a", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, nbytes)
            # Without this a lack of memory would be a SIGBUS in the middle of a round.
            os.posix_fallocate(self._descriptor, 0, committed)
            self.tensor = _map_shared(self._descriptor, nbytes)
        except OSError as error:
            self.seal()
            raise WorkspaceError(
                f"a window of {committed:,} bytes was wanted: {error.strerror} "
                f"({memory_available():,} bytes are available)"
            ) from error
        self.address = self.tensor.data_ptr()
        self.nbytes = nbytes
        self.ticket = Ticket(os.getpid(), self._descriptor, os.fstat(self._descriptor).st_ino)

    def seal(self) -> None:
        """Closes the descriptor: from then on no further process can open the window."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def retire(self, keep: int) -> None:
        """Frees the memory behind all but the first ``keep`` bytes, for every process that maps it.

        A peer that still writes there gets fresh pages that nobody reads.
        """
        keep = -(-keep // mmap.PAGESIZE) * mmap.PAGESIZE
        if keep < self.nbytes:
            _libc.madvise(self.address + keep, self.nbytes - keep, _MADV_REMOVE)
            _forget(self.address + keep, self.nbytes - keep)

    def close(self) -> None:
        """Lets go of the memory here; views that someone still holds read zeros."""
        self.seal()
        _forget(self.address, self.nbytes)


class PeerWindow:
    """The first ``nbytes`` of a peer's window.

    Raises:
        StateError: the peer has ended, or the kernel forbids it.
    """

    def __init__(self, ticket: Ticket, nbytes: int) -> None:
        path = f"/proc/{ticket.pid}/fd/{ticket.descriptor}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StateError(
                f"the window of process {ticket.pid} can't be opened: {error.strerror}. The ranks "
                "must run as one user in one pid namespace; or that process has ended."
            ) from error
        try:
            if os.fstat(descriptor).st_ino != ticket.inode:
                raise StateError(f"process {ticket.pid} is no longer the one that made its window")
            self._tensor = _map_shared(descriptor, nbytes)
        finally:
            os.close(descriptor)
        self.address = self._tensor.data_ptr()
