"""moe_a2a.testing itself: results, exceptions, deaths and hangs, and life after them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moe_a2a.testing import RankDied, RankHung, RankPool, RankRaised, run_ranks
from tests.conftest import PRELOAD


@pytest.fixture(scope="module")
def own_pool():
    with RankPool(3, preload=PRELOAD) as ranks:
        yield ranks


def total(ranks, value):
    sums = torch.tensor([value * (ranks.rank + 1)])
    dist.all_reduce(sums, group=ranks.group)
    assert dist.get_world_size(ranks.group) == ranks.size
    return ranks.rank, ranks.size, sums.item(), ranks.seed, torch.rand(1).item()


def raise_one(ranks):
    if ranks.rank == 1:
        raise KeyError("the reason")
    return dist.barrier(group=ranks.group)


def end_one(ranks, way):
    if ranks.rank == 2:
        os.kill(os.getpid(), way) if way else os._exit(7)
    time.sleep(60)


def sleep_one(ranks):
    if ranks.rank == 1:
        name_of_the_sleeping_function()


def name_of_the_sleeping_function():
    time.sleep(60)


def unsendable(ranks):
    return lambda: 0


def test_results_groups_and_seeds(own_pool):
    for size in (3, 1, 2, 3):
        got = own_pool.run(total, 10, ranks=size)
        assert [r[:3] for r in got] == [(i, size, 10 * size * (size + 1) // 2) for i in range(size)]
        assert len({r[3] for r in got}) == 1
        assert len({r[4] for r in got}) == size
        assert got == own_pool.run(total, 10, ranks=size)
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"ranks={size}.*3"):
            own_pool.run(total, 10, ranks=size)
    start = time.monotonic()
    for _ in range(20):
        own_pool.run(total, 1)
    assert (time.monotonic() - start) / 20 < 0.1


def test_an_exception_names_its_rank_and_keeps_its_traceback(own_pool):
    with pytest.raises(RankRaised, match=r"(?s)rank 1 raised.*in raise_one.*the reason") as caught:
        own_pool.run(raise_one, timeout=1)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RankRaised, match="result can't be sent"):
        own_pool.run(unsendable)
    assert own_pool.run(total, 1)[0][2] == 6


def test_deaths_and_hangs_are_named_and_survived(own_pool):
    for way, code in ((signal.SIGKILL, "signal 9"), (0, "exit code 7")):
        start = time.monotonic()
        with pytest.raises(RankDied, match=f"rank 2 died.*{code}"):
            own_pool.run(end_one, way)
        assert time.monotonic() - start < 5
        assert own_pool.run(total, 1)[0][2] == 6
    with pytest.raises(RankHung, match=r"(?s)ranks 1 .*name_of_the_sleeping_function"):
        own_pool.run(sleep_one, timeout=0.5)
    assert own_pool.run(total, 1)[0][2] == 6


def end_itself(ranks):
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    if ranks.rank == 1:
        raise ValueError("no")
    return os.getpid()


def test_processes_for_one_function():
    exits = run_ranks(3, end_itself, preload=PRELOAD)
    assert [rank.exitcode for rank in exits] == [-signal.SIGTERM, 1, 0]
    assert "ValueError: no" in exits[1].error
    with pytest.raises(ProcessLookupError):
        os.kill(exits[2].result, 0)
    with pytest.raises(RankHung, match="name_of_the_sleeping_function"):
        run_ranks(2, sleep_one, timeout=1.0, preload=PRELOAD)
