"""What a soak has seen so far: sums, a line of progress, a table, and what grew meanwhile."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from statistics import median
from typing import TYPE_CHECKING

from tests.faults.strike import KINDS, POINTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.episode import Episode, Tally

SETTLING = 6  # episodes in which a process fills its caches
GROWTH = 8 << 20  # bytes that a process may have more at the end
MORE_DESCRIPTORS = 8


class Ledger:
    """Sums over episodes.

    Attributes:
        faults: acts with strikes that were survived; `strikes`: ranks struck, by kind and point.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.start = seed, time.monotonic()
        self.episodes = self.stalls = self.wraps = 0
        self.rounds = self.nbytes = self.resets = self.faults = 0
        self.strikes: Counter[tuple[str, str]] = Counter()
        self.backends: Counter[str] = Counter()
        # By process: (bytes of its own, open descriptors) after each episode.
        self.held: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)

    def add(self, episode: Episode, tallies: Sequence[Tally]) -> None:
        self.episodes += 1
        self.backends[episode.backend] += 1
        self.rounds += max(tally.rounds for tally in tallies)
        self.nbytes += sum(tally.nbytes for tally in tallies)
        self.resets += max(tally.resets for tally in tallies)
        if any(tally.stalled or tally.broken for tally in tallies):
            self.stalls += 1
            return
        if episode.epoch is not None:
            operations = 2 * max(tally.rounds for tally in tallies)
            self.wraps += episode.epoch + operations > 2**32
        for act in episode.acts:
            self.faults += bool(act.strikes)
            self.strikes.update((strike.kind, act.point) for strike in act.strikes.values())

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def line(self) -> str:
        seconds = self.seconds()
        kinds = Counter[str]()
        points = Counter[str]()
        for (kind, point), count in self.strikes.items():
            kinds[kind] += count
            points[point] += count
        return (
            f"{seconds:5.0f} s  seed {self.seed}, {self.episodes} episodes  {self.rounds} rounds "
            f"({self.rounds / seconds:.1f}/s)  {self.nbytes:,} bytes  {self.faults} faults "
            f"[{_pairs(kinds, KINDS)}; {_pairs(points, POINTS)}]  {self.resets} resets"
        )

    def table(self) -> str:
        rows = [["ranks struck", *POINTS, "all"]]
        for kind in KINDS:
            counts = [self.strikes[kind, point] for point in POINTS]
            rows.append([kind, *map(str, counts), str(sum(counts))])
        lines = ["  ".join(f"{cell:>12}" for cell in row) for row in rows]
        facts = {
            "time": f"{self.seconds():.0f} s, seed {self.seed}",
            "exchanges opened": f"{self.episodes} ({_pairs(self.backends, self.backends)})",
            "past epoch 2^32": str(self.wraps),
            "rounds": f"{self.rounds:,} ({self.rounds / self.seconds():.1f}/s)",
            "bytes checked": f"{self.nbytes:,}",
            "faults survived": str(self.faults),
            "resets": f"{self.resets:,}",
            "machine too slow": f"{self.stalls} exchanges, whose faults do not count as survived",
            "memory": self._memory(),
        }
        return "\n".join([*(f"{name:>18}  {fact}" for name, fact in facts.items()), "", *lines])

    def growth(self) -> dict[int, tuple[float, float]]:
        """By process that lived long: bytes and descriptors more than when it had settled."""
        grown = {}
        for pid, samples in self.held.items():
            if len(samples) < 3 * SETTLING:
                continue
            early, late = samples[SETTLING : 2 * SETTLING], samples[-SETTLING:]
            grown[pid] = tuple(
                median(sample[i] for sample in late) - median(sample[i] for sample in early)
                for i in (0, 1)
            )
        return grown  # type: ignore[return-value]

    def leak(self) -> str | None:
        for pid, (nbytes, descriptors) in self.growth().items():
            if nbytes > GROWTH or descriptors > MORE_DESCRIPTORS:
                return (
                    f"process {pid} grew by {nbytes / 2**20:.1f} MiB and {descriptors:.0f} "
                    f"descriptors over {len(self.held[pid])} exchanges"
                )
        return None

    def _memory(self) -> str:
        grown = self.growth()
        if not grown:
            return "no process lived long enough to tell"
        longest = max(len(self.held[pid]) for pid in grown)
        return (
            f"{len(grown)} processes lived through up to {longest} exchanges and grew by "
            f"{max(nbytes for nbytes, _ in grown.values()) / 2**20:.1f} MiB and "
            f"{max(count for _, count in grown.values()):.0f} descriptors at most"
        )


def _pairs(counts: Counter[str], names: Sequence[str] | Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in names if counts[name]) or "none"
