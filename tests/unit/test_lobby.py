"""Whom a rank names that nobody met, on a board that a test writes."""

from __future__ import annotations

import time

import pytest

from moe_a2a.errors import PeerTimeout
from moe_a2a.lobby import Lobby

SAW, DONE = 2, 3


class Board:
    """What rank 0 reads of ranks 1, 2, ...: words, or what makes words of its last post."""

    def __init__(self, *peers):
        self.peers, self.posted = peers, [0] * 10

    def post(self, peers, words):
        self.posted = words

    def read(self, peers):
        return [words(self.posted) if callable(words) else words for words in self.peers]


def note(mask, stage=1, saw=0, attempt=1, finished=0):
    return [attempt, mask, 5, 1, 0, 0, 0, stage, saw, finished]


def answers(posted):
    """A rank over the same ranks that sees what rank 0 sees."""
    return note(0b111, posted[7], posted[8])


def once_answered(posted):
    """Gives up as soon as rank 0 knows who is there, and calls for a meeting of ranks 0 and 1."""
    return note(0b011, attempt=2) if posted[7] == SAW else note(0b111)


@pytest.mark.parametrize(
    ("peers", "blamed"),
    [
        ((answers, [0] * 10), (2,)),
        ((note(0b011), [0] * 10), (2,)),
        ((note(0b011), answers), (1,)),
        ((answers, note(0b111)), (2,)),
        ((once_answered, note(0b111)), (2,)),
    ],
    ids=["absent", "elsewhere_and_absent", "elsewhere", "silent", "gave_up_on_the_silent"],
)
def test_who_is_named(peers, blamed):
    lobby = Lobby(0, Board(*peers), 0.05, "reset", [0, 0, 0])
    with pytest.raises(PeerTimeout) as caught:
        lobby.meet([0, 1, 2], 0b111)
    assert caught.value.ranks == blamed


def gives_up(posted):
    """Answers, and begins anew while rank 0 waits for the end of the meeting."""
    return note(0b11, attempt=2) if posted[7] == DONE else note(0b11, posted[7], posted[8])


def comes_again(posted):
    """Finishes, and is at the next meeting before rank 0 has seen it."""
    if posted[7] == DONE:
        return note(0b11, attempt=2, finished=posted[8])
    return note(0b11, posted[7], posted[8])


def met(peer):
    lobby = Lobby(0, Board(peer), 0.05, "reset", [0, 0])
    lobby.meet([0, 1], 0b11)
    return lobby


def test_a_peer_that_has_come_for_the_next_meeting_has_finished_this_one():
    met(comes_again).finish([0, 1])


def test_a_peer_that_gave_the_meeting_up_has_not_finished_it():
    with pytest.raises(PeerTimeout) as caught:
        met(gives_up).finish([0, 1])
    assert caught.value.ranks == (1,)


def test_a_meeting_that_all_have_come_to_gets_some_time_past_the_limit():
    """A rank whose limit is over just then would give up what the others take for granted."""
    start = time.monotonic()

    def slow(posted):
        if time.monotonic() - start < 0.15:
            return note(0b11)
        return note(0b11, posted[7], posted[8])

    met(slow).finish([0, 1])
