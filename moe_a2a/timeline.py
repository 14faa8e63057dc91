"""What the operations of one rank took, and which peers it waited for: ``debug=True``.

A backend notes the times of each operation. Here they are added up to a table of waits by peer, and
written as a trace that Perfetto (ui.perfetto.dev) and Chrome load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_a2a.errors import GeometryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

__all__ = [
    "OperationTimes",
    "PeerWaits",
    "Stopwatch",
    "Timeline",
    "WaitTimes",
    "merge",
    "trace_directory",
]

_PHASES = {1: "dispatch", 2: "combine"}
_KEPT = 20_000  # operations of a trace, the last ones
_numbers = count()  # of the objects of this process


class OperationTimes(NamedTuple):
    """One dispatch or combine of this rank; times in nanoseconds of the host's monotonic clock.

    Attributes:
        phase: 1 for dispatch, 2 for combine.
        round: from 1 on.
        begin: the call (on CUDA: the kernel) began.
        sent: all that peers wait for was on its way.
        arrived: every active rank had announced the operation here.
        end: the result was there.
        waits: by rank, from ``sent`` until it had announced the operation; 0 where it was earlier,
            -1 where nobody waited for it (this rank, inactive ranks).
    """

    phase: int
    round: int
    begin: int
    sent: int
    arrived: int
    end: int
    waits: tuple[int, ...]

    @classmethod
    def of(cls, words: Sequence[int]) -> OperationTimes:
        """From a binding: the six numbers, then the wait for each rank."""
        phase, round, begin, sent, arrived, end, *waits = words
        return cls(phase, round, begin, sent, arrived, end, tuple(waits))


class Stopwatch:
    """Times one operation of a backend that is written in Python.

    Args:
        timeline: where it goes; None for nowhere.
        peers: ranks that it waits for, one after the other: `waits` adds up how long each of them
            kept this rank after those before it had come.
    """

    def __init__(
        self, timeline: Timeline | None, phase: int, round: int, peers: Sequence[int]
    ) -> None:
        self._timeline, self._phase, self._round = timeline, phase, round
        self._waits = dict.fromkeys(peers, 0)
        self._begin = self._arrived = time.monotonic_ns()
        self._sent = 0

    @contextmanager
    def waits(self, peer: int) -> Iterator[None]:
        start = time.monotonic_ns()
        self._sent = self._sent or start
        try:
            yield
        finally:
            self._arrived = time.monotonic_ns()
            self._waits[peer] += self._arrived - start

    def stop(self) -> None:
        """The operation is over, well or not."""
        if self._timeline is None:
            return
        waits = tuple(self._waits.get(rank, -1) for rank in range(self._timeline.size))
        times = (self._begin, self._sent or self._begin, self._arrived, time.monotonic_ns())
        self._timeline.add(OperationTimes(self._phase, self._round, *times, waits))


@dataclass
class PeerWaits:
    """Waits for one peer in one phase, in microseconds."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def add(self, wait: float) -> None:
        self.count, self.total = self.count + 1, self.total + wait
        self.longest = max(self.longest, wait)


@dataclass(frozen=True)
class WaitTimes:
    """How long ``rank`` waited for each of its peers; prints as a table.

    Attributes:
        rank: whose waits these are.
        dispatch, combine: by rank; this rank's own entry stays empty.
        lost: operations of which nothing is known, since kernels overwrote their notes.
    """

    rank: int
    dispatch: tuple[PeerWaits, ...]
    combine: tuple[PeerWaits, ...]
    lost: int = 0

    @property
    def slowest(self) -> int | None:
        """The rank waited for longest in all; None where nobody was waited for."""
        totals = [a.total + b.total for a, b in zip(self.dispatch, self.combine, strict=True)]
        longest = max(totals)
        return totals.index(longest) if longest > 0 else None

    def __str__(self) -> str:
        from moe_a2a.bench.table import aligned

        header = ("peer", "dispatches", "mean us", "longest", "combines", "mean us", "longest", "")
        rows = [
            (
                f"rank {peer}",
                *(
                    text
                    for waits in (self.dispatch[peer], self.combine[peer])
                    for text in (str(waits.count), f"{waits.mean:.1f}", f"{waits.longest:.1f}")
                ),
                "slowest" if peer == self.slowest else "",
            )
            for peer in range(len(self.dispatch))
            if peer != self.rank
        ]
        lost = f" ({self.lost} operations were not noted)" if self.lost else ""
        return aligned(f"waits of rank {self.rank} for its peers{lost}", header, rows)


@dataclass
class Timeline:
    """The operations of one rank of ``size``. A trace of them goes to ``directory``, if any."""

    rank: int
    size: int
    directory: Path | None = None
    _number: int = field(default_factory=lambda: next(_numbers))
    _lost: int = 0
    _kept: deque[OperationTimes] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _waits: dict[int, list[PeerWaits]] = field(init=False)

    def __post_init__(self) -> None:
        self._waits = {phase: [PeerWaits() for _ in range(self.size)] for phase in _PHASES}

    def add(self, operation: OperationTimes) -> None:
        self._kept.append(operation)
        for waits, wait in zip(self._waits[operation.phase], operation.waits, strict=True):
            if wait >= 0:
                waits.add(wait / 1e3)

    def lose(self, operations: int) -> None:
        """So many were not noted."""
        self._lost += operations

    def wait_times(self) -> WaitTimes:
        by_phase = [
            tuple(PeerWaits(w.count, w.total, w.longest) for w in self._waits[phase])
            for phase in _PHASES
        ]
        return WaitTimes(self.rank, by_phase[0], by_phase[1], self._lost)

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON in Chrome's trace format: a process for the rank, in it a thread for the operations
        of this object and one for its waits for each peer."""
        first = self._number * (self.size + 1)
        events = chain(self._names(first), *(_events(self.rank, first, op) for op in self._kept))
        with Path(path).open("w") as file:  # event by event: they take much more than their records
            file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
            file.writelines(
                (",\n" if number else "") + json.dumps(event) for number, event in enumerate(events)
            )
            file.write("\n]}\n")

    def close(self) -> None:
        """Saves what a directory is there for, and tells where; never an error."""
        if self.directory is None:
            return
        path = self.directory / f"moe_a2a-rank{self.rank}-{os.getpid()}-{self._number}.json"
        try:
            self.save(path)
            text = f"trace of rank {self.rank} in {path}"
        except OSError as error:
            text = f"no trace in {path}: {error}"
        with suppress(OSError, ValueError):  # nobody reads stderr, or it is closed
            print(f"moe_a2a: {text}", file=sys.stderr, flush=True)

    def _names(self, first: int) -> Iterator[dict[str, Any]]:
        which = f" of exchange {self._number}" if self._number else ""
        yield _name("process_name", self.rank, first, f"rank {self.rank}")
        yield _name("thread_name", self.rank, first, f"operations{which}")
        for peer in range(self.size):
            if peer != self.rank:
                text = f"waits for rank {peer}{which}"
                yield _name("thread_name", self.rank, first + 1 + peer, text)


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _events(rank: int, first: int, op: OperationTimes) -> Iterator[dict[str, Any]]:
    phase = _PHASES[op.phase]

    def slice_of(name: str, start: int, end: int, thread: int = 0) -> dict[str, Any]:
        took = max(end - start, 0) / 1e3
        where = {"pid": rank, "tid": first + thread, "ts": start / 1e3, "dur": took}
        return {"ph": "X", "name": name, "cat": phase, **where, "args": {"round": op.round}}

    yield slice_of(f"{phase} {op.round}", op.begin, op.end)
    yield slice_of("send", op.begin, op.sent)
    yield slice_of("wait", op.sent, op.arrived)
    yield slice_of("finish", op.arrived, op.end)
    for peer, wait in enumerate(op.waits):
        if wait > 0:
            yield slice_of(f"{phase} {op.round}", op.sent, op.sent + wait, 1 + peer)


def trace_directory() -> Path | None:
    """Where ``MOE_A2A_TRACE`` wants traces: ``1`` is the current directory; None where it is unset.

    Raises:
        GeometryError: it names no directory.
    """
    wanted = os.environ.get("MOE_A2A_TRACE", "")
    if wanted in ("", "0"):
        return None
    try:
        place = Path.cwd() if wanted == "1" else Path(wanted).resolve()
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return place
        why = "there it can't be written" if place.is_dir() else "there is none"
    except (OSError, RuntimeError) as error:
        why = str(error)[:200]
    raise GeometryError(
        f"MOE_A2A_TRACE={wanted[:200]!r}: must be 1 (traces go to the current directory), 0, or a "
        f"directory: {why}"
    )


def merge(out: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> int:
    """One trace of several ranks of one host, which share a clock. Returns its events."""
    events = [event for file in files for event in _read(file)]
    Path(out).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))
    return len(events)


def _read(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Raises ValueError, with the name, for what is no trace."""
    try:
        events = json.loads(Path(file).read_text())["traceEvents"]
        good = isinstance(events, list) and all(isinstance(event, dict) for event in events)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no trace of moe_a2a: {error}") from None
    if not good:
        raise ValueError(f"{file} is no trace of moe_a2a: traceEvents is no list of events")
    return list(events)
