"""The `nvlink` backend with its kernels on the CPU, and shared memory in place of a GPU's."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch

from moe_a2a import backends
from moe_a2a.backends.nvlink import Nvlink
from moe_a2a.backends.symmetric import SymmetricWindow
from moe_a2a.backends.window import PeerWindow, Ticket, Window
from tests.simt.build import build


@cache
def library() -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(build()))


class Simt(Nvlink):
    name: ClassVar[str] = "simt"
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)

    @staticmethod
    def unusable(spec, group):
        return None

    @classmethod
    def open(cls, opening):
        return cls(opening)

    def _load(self):
        return library()

    def _open_window(self, nbytes, group):
        own = Window(nbytes, nbytes)
        tickets = [reply["ticket"] for reply in group.exchange({"ticket": own.ticket})]
        peers = {
            rank: PeerWindow(Ticket(*ticket), nbytes)
            for rank, ticket in enumerate(tickets)
            if rank != group.rank
        }
        addresses = [
            own.address if rank == group.rank else peers[rank].address for rank in range(group.size)
        ]
        group.agree(None)
        return SymmetricWindow(own.tensor, addresses, (own, peers))

    def _host_memory(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def _facts(self):
        return {"device": "cpu", "lines": self.lines}  # one device: grids are small

    def _stream(self):
        return 0

    def _wait_for_stream(self):
        pass

    def _drain(self):
        pass

    def _ended(self):
        return lambda: True


class Packets16(Simt):
    """Low-latency packets of 16 bytes."""

    name: ClassVar[str] = "simt16"
    lines: ClassVar[bool] = False


def register() -> None:
    """In this process."""
    backends.BACKENDS["simt"] = "tests.simt.backend:Simt"
    backends.BACKENDS["simt16"] = "tests.simt.backend:Packets16"
