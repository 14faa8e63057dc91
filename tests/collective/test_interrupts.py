"""Ctrl-C in the middle of a wait comes through at once, and the object says how to go on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll
from moe_a2a.errors import StateError
from tests.collective import rounds
from tests.collective.rounds import Case, Round, play

CASE = Case(2, combine_wire="fp32")


def interrupted(ranks, backend, where):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with AllToAll(CASE.spec(), ranks.group, backend=backend, timeout=20) as a2a:
            play(a2a, ranks, CASE, Round(1))
            if where == "combine":
                dispatch(a2a, ranks)
            if ranks.rank == 0:
                press_ctrl_c(a2a, ranks, where)
            dist.barrier(group=ranks.group)
            a2a.reset()
            assert a2a.phase == "idle"
            for seed in range(3):
                play(a2a, ranks, CASE, Round(seed))
    finally:
        signal.signal(signal.SIGINT, previous)


def dispatch(a2a, ranks):
    return rounds.send(a2a, CASE, Round(2), rounds.tokens_of(CASE, Round(2), ranks.rank))


def press_ctrl_c(a2a, ranks, where):
    y = torch.zeros(2, CASE.capacity, CASE.hidden)
    call = (lambda: dispatch(a2a, ranks)) if where == "dispatch" else (lambda: a2a.combine(y))
    threading.Timer(0.25, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert time.monotonic() - start < 1.25
    for later in (lambda: dispatch(a2a, ranks), lambda: a2a.combine(y), a2a.combine_buffer):
        with pytest.raises(StateError, match="reset"):
            later()


@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_ctrl_c_in_a_wait(pool, backend, where):
    pool.run(interrupted, backend, where, ranks=2)
