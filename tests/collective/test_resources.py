"""Nothing outlives an object: no descriptor, no shared memory, no process, whatever ended it."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import GeometryError, WorkspaceError
from tests.collective.footprint import footprint, resident, settled
from tests.collective.rounds import Case, Round, play

CASE = Case(3, wire="fp8", more={"extra": {"id": 8}})


def opened_and_closed(ranks, backend):
    shm_files = sorted(path.name for path in Path("/dev/shm").iterdir())
    before = footprint()
    a2a = AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=5)
    play(a2a, ranks, CASE, Round(1))
    if backend == "shm":
        assert any("memfd" in kind for kind in footprint() - before), "this looks at nothing"
        assert not any("descriptor /memfd" in kind for kind in footprint() - before)
    a2a.close()
    assert not settled(before), "after close"
    a2a = AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=5)
    recv = a2a.dispatch(*nothing(), extra={"id": torch.zeros(0, 8, dtype=torch.uint8)})
    a2a.reset()
    del a2a
    assert recv.x.view(torch.uint8).sum() >= 0
    del recv
    assert not settled(before), "after a reset and the destructor"
    assert sorted(path.name for path in Path("/dev/shm").iterdir()) == shm_files


def nothing():
    return torch.zeros(0, 128, dtype=torch.bfloat16), torch.zeros(0, 2).int(), torch.zeros(0, 2)


def test_close_and_the_destructor_leave_nothing(pool, backend):
    pool.run(opened_and_closed, backend, ranks=3)


@contextmanager
def small_files(enabled):
    """A window of more than 64 KiB can't be made: the kernel refuses on this rank alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if enabled:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failed_constructors(ranks):
    before = footprint()
    large = Spec(3, 8, 2, 1024, 64)
    with small_files(ranks.rank == 1), pytest.raises(WorkspaceError) as caught:
        AllToAll(large, ranks.group, backend="shm", timeout=5)
    assert f"{large.workspace().committed:,}" in str(caught.value), caught.value
    assert ranks.rank == 1 or "rank 1" in str(caught.value)
    del caught
    assert not settled(before), "after a WorkspaceError on one rank"
    with pytest.raises(GeometryError):
        AllToAll(Spec(2, 8, 2, 1024, 64), ranks.group, backend="shm", timeout=5)
    assert not settled(before), "after a GeometryError"
    with AllToAll(large, ranks.group, backend="shm", timeout=5):
        dist.barrier(group=ranks.group)


def test_a_failed_constructor_leaves_nothing(pool):
    pool.run(failed_constructors, ranks=3)


def cycles(ranks, backend, count, resets):
    spec = Spec(3, 8, 2, 1024, 64)  # a megabyte: a leak shows
    # The first ones fill caches.
    sizes = []
    for number in range(count):
        if number == count // 3:
            before, memory = footprint(), resident()
        with AllToAll(spec, ranks.group, backend=backend, timeout=5) as a2a:
            for _ in range(resets):
                a2a.reset()
        sizes.append(resident())
    assert not settled(before)
    return (resident() - memory) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("resets", [0, 3])
def test_many_objects_do_not_grow_the_process(pool, backend, resets):
    for grown in pool.run(cycles, backend, 24 if resets == 0 else 12, resets, ranks=3):
        assert grown < 6, f"{grown:.1f} MiB more"
