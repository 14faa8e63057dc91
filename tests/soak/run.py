"""One episode after the other, judged."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moe_a2a.testing import RankHung, RankRaised
from tests.faults.crew import Crew
from tests.faults.part import play_episode
from tests.soak.draw import episode_of
from tests.soak.ledger import Ledger
from tests.soak.places import PLACES

if TYPE_CHECKING:
    from moe_a2a.testing import RankExit
    from tests.faults.episode import Episode, Tally
    from tests.soak.places import Place

PRELOAD = ("pytest", "hypothesis", "hypothesis.strategies", "ml_dtypes")
LONGEST = 150.0  # seconds of an episode, which takes 5 to 20
PROGRESS = 5.0  # seconds between lines
STALLS = 0.2  # share of episodes that a slow machine may spoil


class Found(Exception):
    """Something wrong, in episode `number`."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Soak:
    """`ranks` beats the place's number, `crew` is somebody's that has as many. Call `run`, then
    `close`, whatever happened."""

    def __init__(
        self,
        seed: int,
        device: str,
        *,
        ranks: int | None = None,
        quiet: bool = False,
        crew: Crew | None = None,
    ) -> None:
        self.seed, self.ledger = seed, Ledger(seed)
        self._places, self._ranks, self._quiet = PLACES[device], ranks, quiet
        self._own = None if crew is not None else Crew(max(map(self._size, self._places)), PRELOAD)
        self._crew = crew or self._own
        self._names = _shared_names()
        self._pulse = Pulse()

    def run(self, seconds: float, *, first: int = 0, episodes: int | None = None) -> None:
        """For so long, or so many episodes.

        Raises:
            Found: the first thing that is wrong.
        """
        shown, number = time.monotonic(), first
        while self._goes_on(number - first, seconds, episodes):
            self.play(number)
            number += 1
            if not self._quiet and time.monotonic() - shown > PROGRESS:
                shown = time.monotonic()
                print(self.ledger.line(), flush=True)
        leak = self.ledger.leak()
        if leak is not None:
            raise Found(first, leak)

    def play(self, number: int) -> None:
        """Episode `number` of this seed."""
        rng = random.Random(f"{self.seed} {number}")
        place = self._places[number % len(self._places)]
        size = self._size(place)
        episode = episode_of(rng, size, place)
        # Ranks that live through it sit on the first seats, so that some processes grow old.
        order = sorted(range(size), key=lambda rank: rank in episode.killed())
        seats = [order.index(rank) for rank in range(size)]
        self._pulse.begin()
        try:
            tallies = self._streams(episode) if place.streams else self._processes(episode, seats)
        except Fault as fault:
            raise Found(number, f"{fault}\n{episode}") from None
        self.ledger.add(episode, tallies)
        if self.ledger.stalls > max(3, STALLS * self.ledger.episodes):
            why = next(t.broken or t.stalled for t in tallies if t.broken or t.stalled)
            raise Found(number, f"too many exchanges came to nothing, this one: {why}")

    def close(self) -> None:
        self._pulse.end()
        if self._own is not None:
            self._own.__exit__()

    def _size(self, place: Place) -> int:
        return self._ranks or place.ranks

    def _goes_on(self, played: int, seconds: float, episodes: int | None) -> bool:
        return played < episodes if episodes is not None else self.ledger.seconds() < seconds

    def _streams(self, episode: Episode) -> list[Tally]:
        from tests.cuda.playing import run_streams

        try:
            tallies: list[Tally] = run_streams(
                episode.case.size, play_episode, episode, timeout=LONGEST
            )
        except (RankRaised, RankHung) as error:
            raise Fault(str(error)) from None
        self._judge_stalls(episode, tallies)
        return tallies

    def _processes(self, episode: Episode, seats: list[int]) -> list[Tally]:
        size = episode.case.size
        try:
            exits = self._crew.run(size, play_episode, episode, seats=seats, timeout=LONGEST)
        except RankHung as error:
            raise Fault(str(error)) from None
        tallies = [item.result for item in exits if item.result is not None]
        for rank, item in enumerate(exits):
            if item.error is not None:
                raise Fault(f"rank {rank}: {item.error}")
        stalled = self._judge_stalls(episode, tallies)
        for rank, item in enumerate(exits):
            _judge_exit(rank, item, rank in episode.killed(), stalled)
        self._judge_leaks(episode, exits, seats)
        return tallies

    def _judge_stalls(self, episode: Episode, tallies: list[Tally]) -> bool:
        """Whether the episode came to nothing, for a reason: without one, such as a wait that
        expired although everyone was there, something is wrong."""
        texts = [
            f"rank {t.rank}: {t.broken or t.stalled}" for t in tallies if t.broken or t.stalled
        ]
        if not texts:
            return False
        starved = max([self._pulse.longest, *(tally.starved for tally in tallies)])
        opened = not any(tally.stalled.startswith("open") for tally in tallies)
        if opened and starved < episode.limit / 2:
            # What is broken says more than what stalled because of it.
            texts.sort(key=lambda text: "Traceback" not in text)
            raise Fault(f"no rank stood still for longer than {starved:.2f} s: " + "\n".join(texts))
        return True

    def _judge_leaks(self, episode: Episode, exits: list[RankExit], seats: list[int]) -> None:
        if episode.backend != "shm":
            return  # the stand-in on the CPU keeps its windows, CUDA its descriptors
        pids = self._crew.pids_by_seat()
        for rank, item in enumerate(exits):
            if item.result is None:
                continue
            if item.result.left:
                raise Fault(f"rank {rank} still holds {item.result.left} after it was closed")
            pid = pids[seats[rank]]
            if "memfd:moe_a2a" in Path(f"/proc/{pid}/maps").read_text():
                raise Fault(f"rank {rank} still maps a window after it was closed")
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
            self.ledger.held[pid].append((item.result.memory, descriptors))
        ours = {*map(str, pids.values()), "moe_a2a"}
        left = [n for n in _shared_names() - self._names if any(part in n for part in ours)]
        if left:
            raise Fault(f"left in /dev/shm: {left}")


class Fault(Exception):
    """What an episode's outcome has wrong."""


def _judge_exit(rank: int, item: RankExit, killed: bool, stalled: bool) -> None:
    if item.exitcode == (-signal.SIGKILL if killed else 0):
        return
    if stalled:
        return  # it did not come to that
    wanted = "been killed" if killed else "returned"
    raise Fault(f"rank {rank} should have {wanted}: exit code {item.exitcode}")


def _shared_names() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


class Pulse:
    """How long, at worst, a thread that sleeps ten milliseconds comes late: then the machine stood
    still, whatever the scheduler counts."""

    def __init__(self) -> None:
        self.longest, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self.longest = 0.0

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(0.01):
            now = time.monotonic()
            self.longest, before = max(self.longest, now - before - 0.01), now
