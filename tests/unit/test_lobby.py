"""Whom a rank names that nobody met, on a board that a test writes."""

from __future__ import annotations

import pytest

from moe_a2a.errors import PeerTimeout
from moe_a2a.lobby import Lobby

SAW = 2


class Board:
    """What rank 0 reads of ranks 1, 2, ...: words, or what makes words of its last post."""

    def __init__(self, *peers):
        self.peers, self.posted = peers, [0] * 10

    def post(self, peers, words):
        self.posted = words

    def read(self, peers):
        return [words(self.posted) if callable(words) else words for words in self.peers]


def note(mask, stage=1, saw=0, attempt=1):
    return [attempt, mask, 5, 1, 0, 0, 0, stage, saw, 0]


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
