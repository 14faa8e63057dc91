"""A rank's part in an episode, with all that must hold when ranks go missing."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from moe_a2a.errors import MoeA2AError, PeerTimeout, StateError
from moe_a2a.testing import LocalRank
from tests.collective.footprint import footprint, settled
from tests.collective.places import meet
from tests.collective.rounds import opened, play
from tests.faults.episode import Tally
from tests.faults.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moe_a2a.testing import RankContext
    from tests.collective.rounds import Round
    from tests.faults.episode import Act, Episode

TRIES = 20  # of a reset: ranks give up at different moments


class Stalled(Exception):
    """A call that should have succeeded ran into its limit."""


def play_episode(ranks: RankContext, episode: Episode) -> Tally:
    """A rank function: every byte of every round against the oracle, and every fault's outcome.

    Raises:
        WrongBytes: whatever else goes wrong is in the tally, with what may excuse it.
    """
    if episode.backend.startswith("simt"):
        from tests.simt.backend import register

        register()
    # A process whose descriptors are its own; the stand-in on the CPU keeps its windows.
    own = not isinstance(ranks.group, LocalRank) and not episode.backend.startswith("simt")
    opened(ranks, episode.backend, episode.case).close()  # a new process loads for a second
    before = footprint() if own else None
    tally = Tally(ranks.rank)
    meet(ranks)
    try:
        with opened(ranks, episode.backend, episode.case, timeout=episode.limit) as a2a:
            part = Part(ranks, episode, Watched(a2a), tally)
            try:
                part.play()
            finally:
                part.note()
    except WrongBytes:
        raise
    except (Stalled, PeerTimeout) as error:
        # Not its traceback, which holds on to the exchange.
        tally.stalled = str(error)
    except (AssertionError, StateError, pytest.fail.Exception):
        tally.broken = traceback.format_exc()
    if before is not None:
        tally.left = dict(settled(before))
        tally.memory = private_memory()
    return tally


def private_memory() -> int:
    """Bytes of memory that are this process's alone, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(x.split()[1]) << 10 for x in lines if x.startswith(("RssAnon", "RssShmem")))


class WrongBytes(AssertionError):
    """What arrived is not what was sent."""


class Part:
    def __init__(self, ranks: RankContext, episode: Episode, a2a: Watched, tally: Tally) -> None:
        self.ranks, self.episode, self.a2a, self.tally = ranks, episode, a2a, tally
        self.rank, self.alive = ranks.rank, set(range(ranks.size))
        self.own = random.Random(ranks.rank)  # for what differs between ranks
        self.pids = [0] * ranks.size
        if isinstance(ranks.group, LocalRank):
            self.store = ranks.group.store
        else:
            self.store = dist.distributed_c10d._get_default_store()
            dist.all_gather_object(self.pids, os.getpid(), group=ranks.group)

    def play(self) -> None:
        if self.episode.epoch is not None:
            self._begin_at(self.episode.epoch)
        for act in self.episode.acts:
            self._healthy(act.rounds, self.alive)
            if act.strikes:
                self._awake = threading.Event()
                try:
                    self._lose(act)
                finally:
                    self._awake.set()

    def note(self) -> None:
        self.tally.nbytes, self.tally.starved = self.a2a.nbytes, self.a2a.starved

    def _begin_at(self, epoch: int) -> None:
        """As if so many operations had been; all ranks stand still meanwhile."""
        meet(self.ranks)
        impl = self.a2a._impl
        if self.episode.backend == "shm":
            impl._library.restart(impl._endpoint, impl._addresses(), epoch, 1)
        else:
            impl._library.restart(impl._endpoint, epoch, 1, 1, impl._stream())
        meet(self.ranks)
        self.a2a.mark()

    def _healthy(self, rounds: Iterable[Round], members: set[int]) -> None:
        for rnd in rounds:
            if self.own.random() < 0.2:
                time.sleep(self.own.random() * self.episode.pause)
            try:
                self._play(rnd, members)
            except (PeerTimeout, StateError) as error:
                raise Stalled(f"a healthy round: {error}") from None

    def _play(self, rnd: Round, members: set[int]) -> None:
        if len(members) < self.ranks.size:
            rnd = replace(rnd, active=tuple(r in members for r in range(self.ranks.size)))
        try:
            play(self.a2a, self.ranks, self.episode.case, rnd)
        except AssertionError as error:
            raise WrongBytes(f"{self.episode.case}, {rnd}: {error}") from None
        self.tally.rounds += 1

    def _lose(self, act: Act) -> None:
        missing, killed = set(act.strikes), act.killed()
        left, back = self.alive - missing, self.alive - killed
        if self.rank in missing:
            self.a2a.strike = (act.point, act.strikes[self.rank])
            self.tally.named.append(None)
            self._find_out(act, missing)
            self._say("back")
        else:
            self.tally.named.append(self._give_up(act, missing))
            self._go_on(act, left, len(back - left))
        self.alive = back
        if self.rank in missing or not act.apart or back != left:
            self._reset(back)
        self._awake.set()
        self._healthy(act.together, back)

    def _go_on(self, act: Act, left: set[int], returning: int) -> None:
        """A survivor's, until those that return are there."""
        # A rank that is woken must find all others gone: who comes back within the grace of one of
        # them is not missing there. In a reset it must not take their next one over the same ranks
        # for the one that it is in.
        self._say("gone")
        self._hear("gone", len(left))
        if act.apart:
            self._reset(left)
            self._apart(act, left)
        elif self.rank == min(left):
            self._wake(act)
        if act.point == "reset":
            self._hear("back", returning)

    def _apart(self, act: Act, left: set[int]) -> None:
        middle = len(act.apart) // 2
        self._healthy(act.apart[:middle], left)
        if self.rank == min(left):
            self._wake(act)  # it finds the others in the middle of a round
        self._healthy(act.apart[middle:], left)

    def _wake(self, act: Act) -> None:
        """Until this act is over: a rank that gets no core may be missed before it is stopped."""
        stopped = [self.pids[rank] for rank, strike in act.strikes.items() if strike.kind == "stop"]

        def wake() -> None:
            while True:
                for pid in stopped:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                if self._awake.wait(0.02):
                    return

        threading.Thread(target=wake, daemon=True).start()

    def _say(self, what: str) -> None:
        self.store.add(f"{what} {len(self.tally.named)}", 1)

    def _hear(self, what: str, count: int) -> None:
        """Until so many ranks have said it in this act."""
        deadline = time.monotonic() + 30
        while self.store.add(f"{what} {len(self.tally.named)}", 0) < count:
            if time.monotonic() > deadline:
                raise Stalled(f"waited in vain for {count} ranks to say {what!r}")
            time.sleep(0.002)
        self.a2a.mark()

    def _struck(self, act: Act) -> None:
        time.sleep(act.late.get(self.rank, 0.0))
        if act.point == "reset":
            self.a2a.reset(self._mask(self.alive))
            self.tally.resets += 1
        for rnd in act.struck:
            self._play(rnd, self.alive)
        raise AssertionError(f"nobody missed ranks {sorted(act.strikes)}, hit at {act.point}")

    def _find_out(self, act: Act, missing: set[int]) -> None:
        """A rank that was only slow is told so: a few calls later, in time, and again and again."""
        with pytest.raises((PeerTimeout, StateError)) as caught:
            self._struck(act)
        error = caught.value
        # With gloo it sees connections that the others have closed.
        told = isinstance(error, PeerTimeout) and self.episode.backend != "collective"
        if told and error.phase != "reset":
            assert set(error.ranks) <= missing, error
            if error.ranks == (self.rank,):
                assert "had given up on this rank" in str(error), error
        self._same_again(error)

    def _give_up(self, act: Act, missing: set[int]) -> tuple[int, ...]:
        """The right ranks, in time, and a message that says all."""
        with pytest.raises(PeerTimeout) as caught:
            self._struck(act)
        error, took = caught.value, self.a2a.took()
        late = f"{took:.2f} s, {self.a2a.starved:.2f} of them without a core: {error}"
        assert took < self.episode.limit + self.episode.slack + self.a2a.starved, late
        assert 0 <= error.waited <= took + 0.01, late
        assert error.phase == self.a2a.call, error
        assert set(error.ranks) & missing, f"{error} (missing are {sorted(missing)})"
        if act.point != "reset":
            # Ranks whose reset was hit in its last step are in different generations.
            assert set(error.ranks) <= missing, f"{error} (missing are {sorted(missing)})"
        if act.point in ("before", "between") and self.episode.backend != "collective":
            assert set(error.ranks) == missing, f"{error} (missing are {sorted(missing)})"
        says_all(error, self.rank, self.episode.limit)
        if self.episode.backend == "shm" and error.phase != "reset":
            self._says_where(error, act)
        self._same_again(error)
        return error.ranks

    def _says_where(self, error: PeerTimeout, act: Act) -> None:
        assert error.round == self.a2a.rounds, error
        if act.point == "before":
            last = f"round {error.round - 1} combine"
        elif act.point == "between":
            last = f"round {error.round} dispatch"
        else:
            return
        for rank in act.strikes:
            assert f"rank {rank} was last seen at {last}" in str(error), error

    def _same_again(self, error: MoeA2AError) -> None:
        for later in (self.a2a.combine_buffer, self.a2a.check):
            with pytest.raises(type(error)) as second:
                later()
            assert str(second.value) == str(error)

    def _reset(self, members: set[int]) -> None:
        errors = []
        for _ in range(TRIES):
            try:
                self.a2a.reset(self._mask(members))
            except (PeerTimeout, StateError) as error:  # noqa: PERF203
                errors.append(str(error))
            else:
                self.tally.resets += 1
                return
        raise Stalled(f"{TRIES} resets over {sorted(members)}, the last one: {errors[-1]}")

    def _mask(self, members: set[int]) -> torch.Tensor:
        return torch.tensor([rank in members for rank in range(self.ranks.size)])


def says_all(error: PeerTimeout, rank: int, limit: float) -> None:
    """Phase, round, this rank, the missing, waited, limit; where in the sequence everyone is."""
    text = str(error)
    names = ", ".join(map(str, error.ranks))
    parts = [f"on rank {rank}", f"{error.waited:.2f} s", f"(limit {limit:g} s)"]
    if error.phase == "reset":
        parts += ["reset on", f"ranks {names} did not call"]
    else:
        at = f"{error.round} {error.phase}"
        parts += [f"{error.phase} of round {error.round}", f"ranks {names} are missing"]
        parts += ["All ranks must call the same sequence", f"this rank is at round {at}"]
        seen = ("was last seen at round", "was not seen since it opened or was reset")
        for peer in error.ranks:
            assert any(f"rank {peer} {words}" in text for words in seen), text
    for words in parts:
        assert words in text, f"{words!r} is not in {text!r}"
