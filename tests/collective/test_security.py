"""What a peer, or anybody else on the host, can do to a rank: nothing but send rows."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch.distributed.distributed_c10d as c10d

from moe_a2a.backends.window import PeerWindow, Window
from moe_a2a.errors import StateError
from tests.collective.rounds import Case, Round, opened, play

NOBODY = 65534


def opens_as_nobody(ticket, answers):
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        PeerWindow(ticket, 4096)
    except StateError as error:
        answers.put(str(error))
    else:
        answers.put("opened")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_no_other_user_can_open_a_window():
    window = Window(4096, 4096)
    answers = multiprocessing.get_context("fork").SimpleQueue()
    other = multiprocessing.get_context("fork").Process(
        target=opens_as_nobody, args=(window.ticket, answers)
    )
    other.start()
    other.join(20)
    assert "Permission denied" in answers.get()
    PeerWindow(window.ticket, 4096)  # this user can, as long as the window is not sealed
    window.close()


def test_a_sealed_window_can_not_be_opened_by_anybody():
    window = Window(4096, 4096)
    ticket = window.ticket
    window.seal()
    with pytest.raises(StateError):
        PeerWindow(ticket, 4096)
    # Nor by way of another file that has got the number since.
    other = os.open(os.devnull, os.O_RDWR)
    if other != ticket.descriptor:
        os.dup2(other, ticket.descriptor)
    with pytest.raises(StateError, match="no longer"):
        PeerWindow(ticket, 4096)
    for descriptor in {other, ticket.descriptor}:
        os.close(descriptor)
    window.close()


def test_a_program_that_a_rank_starts_gets_no_window():
    window = Window(4096, 4096)
    look = f"import os; os.fstat({window.ticket.descriptor})"
    options = {"close_fds": False, "capture_output": True, "text": True, "check": False}
    started = subprocess.run([sys.executable, "-c", look], **options)
    assert "Bad file descriptor" in started.stderr
    window.close()


def opens_without_pickle(ranks, backend):
    """Whatever unpickles, in torch or here, would end the rank."""
    case, before = Case(2), (pickle.loads, pickle.load, pickle.Unpickler, c10d._unpickler)

    def refuse(*_args, **_keywords):
        raise AssertionError("something was unpickled")

    pickle.loads = pickle.load = pickle.Unpickler = c10d._unpickler = refuse
    try:
        with pytest.raises(AssertionError, match="unpickled"):
            c10d.all_gather_object([None, None], "x", group=ranks.group)
        with opened(ranks, backend, case) as a2a:
            play(a2a, ranks, case, Round(1))
            a2a.reset()
            play(a2a, ranks, case, Round(2))
    finally:
        pickle.loads, pickle.load, pickle.Unpickler, c10d._unpickler = before


def test_nothing_of_a_peer_is_unpickled(pool, backend):
    pool.run(opens_without_pickle, backend, ranks=2)
