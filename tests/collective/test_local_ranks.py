"""Ranks as threads of one process: how they find each other, and what becomes of errors and hangs.

The rounds that they play are in tests/cuda, on the backend that takes such a group.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from moe_a2a import AllToAll, Spec
from moe_a2a.backends import BACKENDS
from moe_a2a.errors import BackendUnavailable, GeometryError, PeerTimeout, WorkspaceError
from moe_a2a.group import Group, LocalRank
from moe_a2a.testing import RankHung, RankRaised, run_local


def introductions(ranks, times):
    """Opens several groups on one store, one after the other."""
    names, squares = [], []
    for step in range(times):
        group = Group(ranks.group, 10)
        assert (group.rank, group.size) == (ranks.rank, ranks.size)
        assert group.local
        assert group.process_group is None
        group.introduce({"square": ranks.rank**2})
        assert len({(facts["host"], facts["pid"]) for facts in group.facts}) == 1
        squares.append([facts["square"] for facts in group.facts])
        assert group.exchange({"step": step}) == [{"step": step}] * ranks.size
        names.append(group.name)
    return names, squares, ranks.seed


@pytest.mark.parametrize("size", [1, 2, 8])
def test_ranks_find_each_other(size):
    results = run_local(size, introductions, 3)
    assert len({seed for *_, seed in results}) == 1
    for names, squares, _ in results:
        assert squares == [[rank**2 for rank in range(size)]] * 3
        assert names == results[0][0]
        assert size == 1 or len(set(names)) == 3


def test_groups_of_one_process_have_names_of_their_own():
    names, stores = set(), [HashStore() for _ in range(2)]

    def open_in_both(ranks):
        for store in stores:
            names.add(Group(LocalRank(ranks.rank, 2, store), 10).name)

    run_local(2, open_in_both)
    assert len(names) == 2


def one_has_a_problem(ranks):
    group = Group(ranks.group, 10)
    group.agree(None)
    with pytest.raises(WorkspaceError, match="^too small" if ranks.rank else "^rank 1: too small"):
        group.agree(WorkspaceError("too small") if ranks.rank == 1 else None)
    return threading.current_thread().name


def test_a_problem_of_one_is_raised_by_all():
    assert run_local(2, one_has_a_problem) == ["rank 0", "rank 1"]


def all_but_one_open(ranks):
    if ranks.rank != 1:
        with pytest.raises(PeerTimeout) as caught:
            Group(ranks.group, 0.3)
        assert caught.value.ranks == (1,)


def test_a_rank_that_does_not_open_is_named():
    run_local(3, all_but_one_open)


def refused(ranks, backend):
    with pytest.raises(BackendUnavailable, match="threads of one process") as caught:
        AllToAll(Spec(2, 4, 2, 128, 4), ranks.group, backend=backend, timeout=10)
    assert "processes" in caught.value.reasons[backend]
    with pytest.raises(GeometryError, match=r"ep_size=3.*2 ranks"):
        AllToAll(Spec(3, 4, 2, 128, 4), ranks.group, backend=backend, timeout=10)


@pytest.mark.parametrize("backend", [name for name in ("shm", "collective") if name in BACKENDS])
def test_backends_between_processes_say_so(backend):
    run_local(2, refused, backend)


OPENING = """
import threading
from moe_a2a import AllToAll, Spec

def open_one(gate):
    gate.wait()
    with AllToAll(Spec(1, 4, 2, 128, 4)):
        opened.append(1)

opened, gate = [], threading.Barrier(8)
threads = [threading.Thread(target=open_one, args=(gate,)) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(opened) == 8, opened
"""


def test_the_first_exchanges_of_a_process_may_be_opened_by_several_threads():
    """What is made once per process, at first use, is made once."""
    done = subprocess.run([sys.executable, "-c", OPENING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def raise_one(ranks):
    if ranks.rank == 1:
        raise KeyError("the reason")
    time.sleep(0.1)


def leave_one(ranks, gate):
    if ranks.rank == 1:
        name_of_the_waiting_function(gate)
    return ranks.rank


def name_of_the_waiting_function(gate):
    gate.wait(60)


def test_exceptions_and_hangs_are_told():
    with pytest.raises(RankRaised, match=r"(?s)rank 1 raised.*in raise_one.*the reason") as caught:
        run_local(3, raise_one)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.rank == 1
    gate = threading.Event()
    with pytest.raises(RankHung, match=r"(?s)ranks 1 .*name_of_the_waiting_function") as hung:
        run_local(2, leave_one, gate, timeout=0.3)
    assert hung.value.ranks == (1,)
    gate.set()
    assert run_local(2, leave_one, gate) == [0, 1]
    with pytest.raises(ValueError, match="size=0"):
        run_local(0, leave_one)


def test_the_first_exception_is_raised_and_late_ranks_are_named(monkeypatch):
    monkeypatch.setattr("moe_a2a.local_ranks.AFTER_ERROR", 0.2)
    gate = threading.Event()

    def call(ranks):
        if ranks.rank == 0:
            raise ValueError("at once")
        name_of_the_waiting_function(gate)

    with pytest.raises(RankRaised, match=r"(?s)at once.*ranks 1 still run.*name_of_the_waiting"):
        run_local(2, call)
    gate.set()


def test_cuda_that_started_with_few_queues_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    with pytest.raises(RuntimeError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=32.*before CUDA starts"):
        run_local(2, raise_one, device="cuda:0")


def test_a_process_group_is_not_local(pool):
    assert pool.run(kind_of_group, ranks=2) == [(False, True)] * 2
    alone = Group(LocalRank(0, 1, None), 1)
    assert (alone.local, alone.store, Group(None, 1).local) == (True, None, False)


def kind_of_group(ranks):
    group = Group(ranks.group, 10)
    return group.local, group.process_group is ranks.group
