"""What a call costs besides its kernels: no memory, no waiting; and what is left after close()."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager

import pytest
import torch

from moe_a2a import AllToAll, Spec
from tests.collective.places import meet
from tests.collective.rounds import Case, Round, opened, play_rounds
from tests.cuda.playing import GPU, MILLISECOND, run_streams
from tests.cuda.prepared import Log, Prepared, play

MEBIBYTE = 2**20


@pytest.mark.parametrize("size", [1, 2])
def test_any_number_of_blocks_gives_the_same_bytes(size):
    rounds = [Round(1, tokens=(96, 90)), Round(2, rows=3, specials=True), Round(3, rows=1)]
    for wire, back in (("bf16", "bf16"), ("nvfp4", "mxfp8")):
        case = Case(size, 9, 3, 256, 96, wire, back, {"scrub": "all", "extra": {"id": 8}})
        found = [
            run_streams(size, play_blocks, case, rounds, blocks) for blocks in (None, 1, 3, 1000)
        ]
        assert found == [found[0]] * 4


def play_blocks(ranks, case, rounds, blocks):
    return play_rounds(ranks, "nvlink", case, rounds, max_blocks=blocks)


@contextmanager
def alone(**more):
    """One rank by itself on the main thread, and a round of it."""
    case = Case(1, 8, 2, 128, 32, **more)
    with AllToAll(case.spec(), backend="nvlink", device=GPU, timeout=10) as a2a:
        yield a2a, Prepared(case, Round(3, rows=16, tokens=(16,)), 0, GPU)


def test_the_current_device_is_the_default():
    torch.cuda.set_device(GPU)
    with AllToAll(Spec(1, 8, 2, 128, 4), backend="nvlink") as a2a:
        assert a2a.device == GPU
        assert a2a.backend == "nvlink"
    with AllToAll(Spec(1, 8, 2, 128, 4), device="cuda") as a2a:
        assert a2a.backend == "nvlink", "auto takes the first usable backend of the device"


@pytest.mark.parametrize("wire", ["bf16", "nvfp4"])
def test_calls_allocate_counts_and_nothing_else(wire):
    with alone(wire=wire) as (a2a, prepared):
        out = torch.empty(16, 128, dtype=torch.bfloat16, device=GPU)
        for _ in range(3):
            a2a.dispatch(**prepared.call)
            a2a.combine(prepared.y, out=out)
        torch.cuda.synchronize()
        free, before = torch.cuda.mem_get_info(GPU)[0], torch.cuda.memory_stats(GPU)
        for _ in range(50):
            a2a.dispatch(**prepared.call)
            a2a.combine(prepared.y, out=out)
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats(GPU)
        made = after["allocation.all.allocated"] - before["allocation.all.allocated"]
        assert made <= 50, f"{made} allocations in 50 rounds"
        assert after["reserved_bytes.all.current"] == before["reserved_bytes.all.current"]
        assert torch.cuda.mem_get_info(GPU)[0] == free
        assert not prepared.wrong_sums(out).any()


def test_calls_do_not_wait_for_the_device():
    with alone() as (a2a, prepared):
        log = Log(20, GPU)
        play(a2a, prepared, log)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(300 * MILLISECOND)
            start = time.monotonic()
            for _ in range(5):
                play(a2a, prepared, log)
            took = time.monotonic() - start
            idle = torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not idle, "the device was done before the calls returned: this measures nothing"
        assert took < 0.15, f"{took:.3f} s behind a sleep of 0.3 s"
        a2a.check()
        log.check()


def in_use():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(GPU)
    return total - free


def test_close_gives_the_memory_back():
    spec = Spec(1, 8, 2, 4096, 16384)  # 128 MiB of rows each way
    sizes = []
    for _ in range(4):
        before = in_use()
        a2a = AllToAll(spec, backend="nvlink", device=GPU, timeout=10)
        during = in_use()
        assert during - before > 0.9 * spec.workspace_bytes(), "this looks at nothing"
        a2a.close()
        a2a.close()
        sizes.append(in_use())
        assert during - sizes[-1] > 0.9 * spec.workspace_bytes()
        del a2a
    assert sizes[-1] - sizes[0] < 8 * MEBIBYTE, [size // MEBIBYTE for size in sizes]


def views_after_close(ranks):
    """A receive view that somebody holds may be read, whatever it says."""
    case = Case(2, 9, 3, 128, 32)
    prepared = Prepared(case, Round(1), ranks.rank, GPU)
    a2a = opened(ranks, "nvlink", case)
    recv = a2a.dispatch(**prepared.call)
    out = a2a.combine(prepared.y)
    meet(ranks)
    a2a.close()
    meet(ranks)
    recv.x.float().sum().item()
    assert not prepared.wrong_sums(out).any()


def test_views_may_be_read_after_close():
    run_streams(2, views_after_close)


def open_and_close(ranks, count):
    for number in range(count):
        case = Case(ranks.size, 9, 3, 128, 8 + number % 3)
        prepared = Prepared(case, Round(number), ranks.rank, GPU)
        log = Log(2, GPU)
        with opened(ranks, "nvlink", case) as a2a:
            play(a2a, prepared, log)
            play(a2a, prepared, log)
            a2a.check()
        log.check()


def test_many_objects_one_after_the_other():
    """Memory of one object is the next one's: what was left in it must not look fresh."""
    run_streams(2, open_and_close, 60)


def close_behind_queued_rounds(ranks):
    """Rank 0 closes, and lets go of all it has, while its kernels still wait for rank 1."""
    case = Case(2, 9, 3, 128, 32)
    prepared = Prepared(case, Round(1), ranks.rank, GPU)
    a2a = opened(ranks, "nvlink", case)
    a2a.dispatch(**prepared.call)
    a2a.combine(prepared.y)
    torch.cuda.current_stream().synchronize()
    meet(ranks)
    if ranks.rank == 1:
        torch.cuda._sleep(100 * MILLISECOND)
    a2a.dispatch(**prepared.call)
    out = a2a.combine(prepared.y)
    began = time.monotonic()
    a2a.close()
    took = time.monotonic() - began
    assert took < 0.05, f"close() took {took:.3f} s"
    if ranks.rank == 0:
        assert not torch.cuda.current_stream().query(), "rank 1 was there: this looks at nothing"
        del a2a
    reused = [torch.full((1 << 20,), 255, dtype=torch.uint8, device=GPU) for _ in range(4)]
    meet(ranks)
    del reused
    assert not prepared.wrong_sums(out).any()


def test_rounds_that_were_queued_before_close_end_right():
    run_streams(2, close_behind_queued_rounds)
