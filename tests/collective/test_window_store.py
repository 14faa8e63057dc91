"""Ranks exchange the handles of their windows whatever each has exchanged in other groups before.

torch maps windows on GPUs only. What it does with the group's store is played here: its C++ stores
call the Python one, under the keys of one release or another.
"""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch._C import _distributed_c10d as c10d
from torch.torch_version import TorchVersion

from moe_a2a.backends.symmetric import rendezvous
from moe_a2a.errors import PeerTimeout, StateError
from moe_a2a.group import Group

RELEASES = [TorchVersion(text) for text in ("2.9.1", "2.12.0+cu130", "2.13.0")]


class Torch:
    """Stands for `_SymmetricMemory` of a release, in a process that has made ``number`` exchanges.

    ``stop`` is called between the exchange of handles and the barrier.
    """

    def __init__(self, release, number, stop=lambda: None):
        self.release, self.number, self.stop = release, number, stop
        self.known = {}

    def set_group_info(self, name, rank, size, store):
        assert self.release < "2.11"
        assert name not in self.known
        self.known[name] = rank, size, store

    def rendezvous(self, tensor, name):
        if self.release < "2.11":
            self.rank, size, store = self.known[name]
        else:
            group = c10d._resolve_process_group(name)
            self.rank, size, store = group.rank(), group.size(), group.get_group_store()
        self.ranks = range(size)
        handles = self.all_gather(store, bytes(tensor.tolist()))
        self.stop()
        if self.release >= "2.13":
            self.barrier(store)
        else:
            self.all_gather(store, b"\0\0\0\0")
        return SimpleNamespace(handles=handles)

    def numbered(self, store):
        self.number += 1
        return c10d.PrefixStore(f"CUDASymmetricMemory/{self.number - 1}", store)

    def all_gather(self, store, value):
        store = self.numbered(store)
        store.set(str(self.rank), value)
        if self.release >= "2.13":
            return store.multi_get([str(rank) for rank in self.ranks])
        values = []
        for rank in self.ranks:
            if rank != self.rank:
                store.wait([str(rank)])
            values.append(store.get(str(rank)))
        return values

    def barrier(self, store):
        store = self.numbered(store)
        if store.add("num_members", 1) == len(self.ranks):
            store.set("last_member", "1")
        store.wait(["last_member"], timedelta(seconds=300))


def exchange(group, torch_there, turn=0):
    """Gets all ranks' handles of this turn, and leaves no name behind."""
    names = []

    def register(name, registered, register=c10d._register_process_group):
        names.append(name)
        register(name, registered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", torch_there.release)
        patch.setattr(c10d, "_SymmetricMemory", torch_there)
        patch.setattr(c10d, "_register_process_group", register)
        try:
            handle = rendezvous(torch.tensor([group.rank, turn, 255], dtype=torch.uint8), group)
        finally:
            for name in names:
                with pytest.raises(RuntimeError, match=name):
                    c10d._resolve_process_group(name)
    assert handle.handles == [bytes([rank, turn, 255]) for rank in range(group.size)]


def of_different_pasts(ranks, release):
    torch_there = Torch(release, number=3 * ranks.rank)
    for _ in range(2):
        group = Group(ranks.group, 5)
        group.agree(None)
        before = group.store.num_keys()
        for turn in range(3):
            exchange(group, torch_there, turn)
        group.agree(None)
        assert group.store.num_keys() <= before + group.size, "of agreements; the rest is gone"


@pytest.mark.parametrize("release", RELEASES)
def test_ranks_with_different_pasts_find_each_other(pool, release):
    pool.run(of_different_pasts, release, ranks=3)


def meanwhile(ranks, release):
    """Others may open windows between two exchanges of this one."""
    torch_there = Torch(release, 7)

    def elsewhere():
        torch_there.number += ranks.rank

    torch_there.stop = elsewhere
    exchange(Group(ranks.group, 5), torch_there)


@pytest.mark.parametrize("release", RELEASES)
def test_numbers_may_jump(pool, release):
    pool.run(meanwhile, release, ranks=3)


def one_fails(ranks, release):
    def fail():
        raise RuntimeError("no room for a mapping\nframe #0")

    group = Group(ranks.group, 20)
    stop = fail if ranks.rank == 1 else lambda: None
    start = time.monotonic()
    with pytest.raises(StateError, match="no room for a mapping") as caught:
        exchange(group, Torch(release, 0, stop))
    assert time.monotonic() - start < 10, "the others are told, and do not wait for the timeout"
    assert "frame" not in str(caught.value)
    assert ranks.rank == 1 or "rank 1" in str(caught.value)
    group.agree(None)


@pytest.mark.parametrize("release", RELEASES)
def test_what_fails_on_one_rank_fails_on_all(pool, release):
    pool.run(one_fails, release, ranks=3)


def one_is_away(ranks, release):
    group = Group(ranks.group, 0.5)
    if ranks.rank == 2:
        return
    with pytest.raises(PeerTimeout) as caught:
        exchange(group, Torch(release, ranks.rank))
    assert caught.value.ranks == (2,)
    assert caught.value.waited < 5


@pytest.mark.parametrize("release", RELEASES)
def test_waits_for_a_rank_that_is_away_end(pool, release):
    pool.run(one_is_away, release, ranks=3)
