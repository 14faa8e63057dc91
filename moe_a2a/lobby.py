"""Where ranks meet outside any round: to open an exchange, and to agree on a restart.

A rank posts what it brings to the meeting on a board; when it has seen everyone's post it answers
with a digest of what it saw; the meeting is over when all digests are equal. A post stays until
its rank posts anew, so it does not matter who came first, or that someone gave up and came again:
the digest follows whatever the board says.
"""

from __future__ import annotations

import json
import time
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from moe_a2a.errors import PeerTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Board", "Lobby", "Note", "StoreBoard"]

_BROUGHT, _SAW, _DONE = 1, 2, 3
_NOTHING = [0] * 10
# Seconds past the limit for a meeting of which everyone has been seen to come: without it a rank
# whose limit is over just as the last one comes gives up what the others take for granted.
_GRACE = 0.4


class Note(NamedTuple):
    """What a rank brings."""

    attempt: int
    ranks: int  # mask of those it wants to meet, as a signed 64-bit number
    epoch: int
    generation: int
    ticket: tuple[int, int, int]  # by which its fresh window can be opened; the backend's own


class _Post(NamedTuple):
    """What a board says of a rank."""

    note: Note
    answer: tuple[int, int]  # stage, digest
    finished: int  # digest of the last meeting that it has finished


class Board(Protocol):
    """Ten words per rank that its peers can read; all zeros until it has posted."""

    def post(self, peers: list[int], words: list[int]) -> None: ...

    def read(self, peers: list[int]) -> list[list[int]]: ...


class StoreBoard:
    """A board in a torch.distributed store."""

    def __init__(self, store: Any, prefix: str, rank: int) -> None:
        self._store, self._prefix, self._rank = store, prefix, rank

    def post(self, peers: list[int], words: list[int]) -> None:
        if peers:
            self._store.set(self._key(self._rank), json.dumps(words))

    def read(self, peers: list[int]) -> list[list[int]]:
        keys = [self._key(peer) for peer in peers]
        all_there = bool(keys) and self._store.check(keys)
        return [
            json.loads(self._store.get(key)) if all_there or self._store.check([key]) else _NOTHING
            for key in keys
        ]

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/lobby/{rank}"


class Lobby:
    """Meetings of rank ``rank``.

    Args:
        occasion: ``"open"`` or ``"reset"``, for the errors.
        used: by rank, the attempt that the last meeting was made of (this rank's own included).
    """

    def __init__(
        self, rank: int, board: Board, timeout: float, occasion: str, used: Sequence[int]
    ) -> None:
        self._rank, self._board = rank, board
        self._timeout, self._occasion = timeout, occasion
        self.used = list(used)
        self._attempt = self.used[rank]
        self._note: Note | None = None
        self._digest = self._finished = 0
        self._until = 0.0

    def meet(
        self,
        ranks: list[int],
        mask: int,
        epoch: int = 0,
        generation: int = 0,
        ticket: tuple[int, int, int] = (0, 0, 0),
        attempt: int | None = None,
    ) -> dict[int, Note]:
        """Returns the notes of all ``ranks``, the same on each of them.

        Raises:
            PeerTimeout: with those that did not come.
        """
        self._attempt = self._attempt + 1 if attempt is None else attempt
        self._start, self._pauses = time.monotonic(), 0
        # A plain tuple: peers read the ticket as one, and the digest is over the text of it.
        own = self._note = Note(self._attempt, mask, epoch, generation, (*ticket,))
        self._post(ranks, _BROUGHT, 0)
        self._digest = 0
        self._until = self._start + self._timeout
        others = [rank for rank in ranks if rank != self._rank]
        while True:
            posts = self._read(others)
            here = {
                peer: answer
                for peer, (note, answer, _) in posts.items()
                if note.ranks == mask and note.attempt > self.used[peer]
            }
            missing = [peer for peer in others if peer not in here]
            if not missing:
                notes = {peer: note for peer, (note, _, _) in posts.items()} | {self._rank: own}
                digest = zlib.crc32(repr(sorted(notes.items())).encode()) | 1
                if digest != self._digest:
                    self._post(ranks, _SAW, digest)
                    self._digest = digest
                    self._until = self._start + self._timeout + _GRACE
                missing = [p for p, (stage, saw) in here.items() if stage < _SAW or saw != digest]
                if not missing:
                    break
            self._pause(ranks, self._blamed(posts, mask, missing))
        for peer, note in notes.items():
            self.used[peer] = note.attempt
        return notes

    def _blamed(self, posts: dict[int, _Post], mask: int, missing: list[int]) -> list[int]:
        """Whom to name, should the time be over now.

        A rank that has come for a meeting of others is alive: it may have given this one up, a
        moment before this rank does, for want of one that did come but never answered. It is named
        only where there is nobody else.
        """
        notes = {peer: post.note for peer, post in posts.items()}
        fresh = {peer: n.ranks for peer, n in notes.items() if n.attempt > self.used[peer]}
        silent = {peer for peer in missing if fresh.get(peer, mask) == mask}
        if self._digest:
            came = [peer for peer, ranks in fresh.items() if ranks == mask]
            silent |= {peer for peer in came if posts[peer].answer[1] != self._digest}
        return sorted(silent) or missing

    def finish(self, ranks: list[int]) -> None:
        """Returns when everyone has taken what the others brought.

        Raises:
            PeerTimeout: with those that have not.
        """
        self._post(ranks, _DONE, self._digest)
        self._until = max(self._until, time.monotonic() + _GRACE)
        others = [rank for rank in ranks if rank != self._rank]
        while missing := [
            peer
            for peer, (_, answer, finished) in self._read(others).items()
            # It may have finished and come for the next meeting; a later attempt alone does not
            # say so: it may as well have given this one up.
            if answer != (_DONE, self._digest) and finished != self._digest
        ]:
            self._pause(ranks, missing)
        self._finished = self._digest

    def _post(self, ranks: list[int], stage: int, digest: int) -> None:
        assert self._note is not None
        words = [*self._note[:4], *self._note.ticket, stage, digest, self._finished]
        self._board.post([rank for rank in ranks if rank != self._rank], words)

    def _read(self, peers: list[int]) -> dict[int, _Post]:
        """By peer."""
        posts = {}
        for peer, words in zip(peers, self._board.read(peers), strict=True):
            ticket = (words[4], words[5], words[6])
            note = Note(words[0], words[1], words[2], words[3], ticket)
            posts[peer] = _Post(note, (words[7], words[8]), words[9])
        return posts

    def _pause(self, ranks: list[int], missing: list[int]) -> None:
        waited = time.monotonic() - self._start
        if time.monotonic() > self._until:
            call = "AllToAll(...)" if self._occasion == "open" else "reset()"
            raise PeerTimeout(
                f"{self._occasion} on rank {self._rank}: ranks {', '.join(map(str, missing))} did "
                f"not call {call} over the same ranks ({', '.join(map(str, ranks))}) within "
                f"{waited:.2f} s (limit {self._timeout:g} s)",
                ranks=missing,
                phase=self._occasion,
                round=0,
                waited=waited,
            )
        # Short at first, since the others mostly come at once; then easy on a shared store.
        time.sleep(min(0.0003 * 1.2**self._pauses, 0.01))
        self._pauses += 1
