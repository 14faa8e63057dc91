"""Where ranks meet outside any round, to agree on a restart.

A rank posts what it brings to the meeting on a board; when it has seen everyone's post it answers
with a digest of what it saw; the meeting is over when all digests are equal. A post stays until
its rank posts anew, so it does not matter who called first, or that someone gave up and called
again: the digest follows whatever the board says.
"""

from __future__ import annotations

import time
import zlib
from typing import NamedTuple, Protocol

from moe_a2a.errors import PeerTimeout

__all__ = ["Board", "Lobby", "Note"]

_BROUGHT, _SAW, _DONE = 1, 2, 3


class Note(NamedTuple):
    """What a rank brings."""

    attempt: int
    ranks: int  # mask of those it wants to meet, as a signed 64-bit number
    epoch: int
    generation: int
    ticket: tuple[int, int, int]  # by which its fresh window can be opened; the backend's own


class Board(Protocol):
    """Ten words per rank that its peers can read; all zeros until it has posted."""

    def post(self, peers: list[int], words: list[int]) -> None: ...

    def read(self, peer: int) -> list[int]: ...


class Lobby:
    """Meetings of rank ``rank`` of ``size``."""

    def __init__(self, rank: int, size: int, board: Board, timeout: float) -> None:
        self._rank = rank
        self._board = board
        self._timeout = timeout
        self._attempt = 0
        self._used = [0] * size  # attempts that an earlier meeting was made of
        self._note: Note | None = None
        self._digest = 0

    def meet(
        self, ranks: list[int], mask: int, epoch: int, generation: int, ticket: tuple[int, int, int]
    ) -> dict[int, Note]:
        """Returns the notes of all ``ranks``, the same on each of them.

        Raises:
            PeerTimeout: with those that did not come.
        """
        self._attempt += 1
        self._start = time.monotonic()
        # A plain tuple: peers read the ticket as one, and the digest is over the text of it.
        own = self._note = Note(self._attempt, mask, epoch, generation, (*ticket,))
        self._post(ranks, _BROUGHT, 0)
        posted = 0
        while True:
            notes, stages = {self._rank: own}, {}
            for peer in self._others(ranks):
                note, stage = self._read(peer)
                if note.ranks == mask and note.attempt > self._used[peer]:
                    notes[peer], stages[peer] = note, stage
            missing = [peer for peer in ranks if peer not in notes]
            if not missing:
                digest = zlib.crc32(repr(sorted(notes.items())).encode()) | 1
                if digest != posted:
                    self._post(ranks, _SAW, digest)
                    posted = digest
                missing = [p for p, (stage, saw) in stages.items() if stage < _SAW or saw != digest]
                if not missing:
                    break
            self._pause(ranks, missing)
        self._digest = posted
        for peer, note in notes.items():
            self._used[peer] = note.attempt
        return notes

    def finish(self, ranks: list[int]) -> None:
        """Returns when everyone has taken what the others brought."""
        self._post(ranks, _DONE, self._digest)
        while missing := [peer for peer in self._others(ranks) if not self._has_finished(peer)]:
            self._pause(ranks, missing)

    def _has_finished(self, peer: int) -> bool:
        note, answer = self._read(peer)
        # A later attempt on its line: it finished this meeting and has called the next one.
        return answer == (_DONE, self._digest) or note.attempt > self._used[peer]

    def _others(self, ranks: list[int]) -> list[int]:
        return [rank for rank in ranks if rank != self._rank]

    def _post(self, ranks: list[int], stage: int, digest: int) -> None:
        assert self._note is not None
        words = [*self._note[:4], *self._note.ticket, stage, digest, 0]
        self._board.post(self._others(ranks), words)

    def _read(self, peer: int) -> tuple[Note, tuple[int, int]]:
        words = self._board.read(peer)
        ticket = (words[4], words[5], words[6])
        return Note(words[0], words[1], words[2], words[3], ticket), (words[7], words[8])

    def _pause(self, ranks: list[int], missing: list[int]) -> None:
        waited = time.monotonic() - self._start
        if waited > self._timeout:
            raise PeerTimeout(
                f"reset on rank {self._rank}: ranks {', '.join(map(str, missing))} did not call "
                f"reset() over the same ranks ({', '.join(map(str, ranks))}) within {waited:.2f} s "
                f"(limit {self._timeout:g} s)",
                ranks=missing,
                phase="reset",
                round=0,
                waited=waited,
            )
        time.sleep(0.0003)
