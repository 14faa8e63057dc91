"""A rank that gives up tells its peers in which operation. Who waits in an earlier one goes on."""

from __future__ import annotations

import time

import pytest
import torch

from moe_a2a.errors import PeerTimeout
from tests.collective.rounds import Case, Round, opened, play
from tests.simt.backend import register
from tests.simt.playing import NEEDS

pytestmark = NEEDS
LINE, POSTS = 128, 2  # csrc/layout.h: bytes of a line, and which of its rows the posts are


def post_of(a2a, source):
    first = (1 + POSTS * a2a.spec.ep_size + source) * LINE
    return a2a._impl._window.tensor[first : first + LINE]


def plant(a2a, source, *, generation, epoch, disagrees):
    """What `source` would store here, missing rank 2 (csrc/epoch.h)."""
    line = post_of(a2a, source)
    line[4:24].view(torch.int32).copy_(torch.tensor([epoch, disagrees, 0, 0b100, 0]).int())
    line[4 + 4 * 5 :].zero_()
    line[:4].view(torch.int32).fill_(generation)


def hears_of_a_post(ranks, backend, ahead, disagrees):
    """Rank 1 finds a post of rank 0; rank 2 comes late, but well within the limit."""
    register()
    case = Case(3)
    with opened(ranks, backend, case, timeout=3) as a2a:
        play(a2a, ranks, case, Round(1))
        # An epoch counts operations, so all ranks are in 3 next, the dispatch of round 2.
        if ranks.rank == 1:
            plant(a2a, 0, generation=1, epoch=3 + ahead, disagrees=disagrees)
        torch.distributed.barrier(ranks.group)
        if ranks.rank == 2:
            time.sleep(0.5)
        play(a2a, ranks, case, Round(2))


def hears_that_it_is_in_vain(ranks, backend, ahead):
    register()
    case = Case(3)
    with opened(ranks, backend, case, timeout=3) as a2a:
        play(a2a, ranks, case, Round(1))
        if ranks.rank == 1:
            plant(a2a, 0, generation=1, epoch=3 + ahead, disagrees=0)
            start = time.monotonic()
            with pytest.raises(PeerTimeout) as caught:
                play(a2a, ranks, case, Round(2))
            assert time.monotonic() - start < 2
            assert 2 in caught.value.ranks
        torch.distributed.barrier(ranks.group)


@pytest.mark.parametrize("backend", ["shm", "simt"])
@pytest.mark.parametrize("disagrees", [0, 1])
def test_what_a_peer_gave_up_later_does_not_end_this_wait(pool, backend, disagrees):
    pool.run(hears_of_a_post, backend, 2, disagrees, ranks=3)


@pytest.mark.parametrize("backend", ["shm", "simt"])
@pytest.mark.parametrize("ahead", [0, -1])
def test_what_a_peer_gave_up_before_does(pool, backend, ahead):
    pool.run(hears_that_it_is_in_vain, backend, ahead, ranks=3)


def gives_up_behind_a_wrap_around(ranks):
    """The epochs wrap around between the two rounds; only a reset makes a new generation."""
    register()
    case = Case(2)
    with opened(ranks, "simt", case, timeout=0.5) as a2a:
        impl = a2a._impl
        torch.distributed.barrier(ranks.group)
        impl._library.restart(impl._endpoint, 2**32 - 2, 1, 1, 0)
        torch.distributed.barrier(ranks.group)
        play(a2a, ranks, case, Round(1))
        if ranks.rank == 0:
            with pytest.raises(PeerTimeout):
                play(a2a, ranks, case, Round(2))
        torch.distributed.barrier(ranks.group)
        if ranks.rank == 1:
            assert post_of(a2a, 0)[:8].view(torch.int32).tolist() == [1, 1]
        a2a.reset()
        play(a2a, ranks, case, Round(3))
        assert [int(n) for n in impl._library.position(impl._endpoint)][1] == 2


def test_a_wrap_around_begins_no_generation(pool):
    pool.run(gives_up_behind_a_wrap_around, ranks=2)
