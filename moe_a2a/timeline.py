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
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        peers: ranks that it waits for, one after the other: what `waits` adds up is how long each
            of them kept this rank after those before it had come.
    """

    def __init__(
        self, timeline: Timeline | None, phase: int, round: int, peers: Sequence[int]
    ) -> None:
        self._timeline, self._phase, self._round = timeline, phase, round
        self._waits = dict.fromkeys(peers, 0)
        self._begin = self._sent = self._arrived = time.monotonic_ns()

    @contextmanager
    def waits(self, peer: int) -> Iterator[None]:
        start = time.monotonic_ns()
        if not any(self._waits.values()):
            self._sent = start
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
        times = (self._begin, self._sent, self._arrived, time.monotonic_ns())
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
    """

    rank: int
    dispatch: tuple[PeerWaits, ...]
    combine: tuple[PeerWaits, ...]

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
        return aligned(f"waits of rank {self.rank} for its peers", header, rows)


@dataclass
class Timeline:
    """The operations of one rank of ``size``. A trace of them goes to ``directory``, if any."""

    rank: int
    size: int
    directory: Path | None = None
    _kept: deque[OperationTimes] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _waits: dict[int, list[PeerWaits]] = field(init=False)

    def __post_init__(self) -> None:
        self._waits = {phase: [PeerWaits() for _ in range(self.size)] for phase in _PHASES}

    def add(self, operation: OperationTimes) -> None:
        self._kept.append(operation)
        for waits, wait in zip(self._waits[operation.phase], operation.waits, strict=True):
            if wait >= 0:
                waits.add(wait / 1e3)

    def wait_times(self) -> WaitTimes:
        by_phase = [
            tuple(PeerWaits(w.count, w.total, w.longest) for w in self._waits[phase])
            for phase in _PHASES
        ]
        return WaitTimes(self.rank, *by_phase)

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON in Chrome's trace format: a process for the rank, a thread for each peer's waits."""
        events = [*self._names(), *(e for op in self._kept for e in _events(self.rank, op))]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))

    def close(self) -> None:
        """Saves what a directory is there for, and tells where; a full disk ends nothing."""
        if self.directory is None:
            return
        taken = len(list(self.directory.glob(f"moe_a2a-rank{self.rank}-{os.getpid()}-*.json")))
        path = self.directory / f"moe_a2a-rank{self.rank}-{os.getpid()}-{taken}.json"
        try:
            self.save(path)
        except OSError as error:
            print(f"moe_a2a: no trace in {path}: {error}", file=sys.stderr)
        else:
            print(f"moe_a2a: trace of rank {self.rank} in {path}", file=sys.stderr)

    def _names(self) -> Iterator[dict[str, Any]]:
        yield _name("process_name", self.rank, 0, f"rank {self.rank}")
        yield _name("thread_name", self.rank, 0, "operations")
        for peer in range(self.size):
            if peer != self.rank:
                yield _name("thread_name", self.rank, 1 + peer, f"waits for rank {peer}")


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _events(rank: int, op: OperationTimes) -> Iterator[dict[str, Any]]:
    phase = _PHASES[op.phase]

    def slice_of(name: str, start: int, end: int, thread: int = 0) -> dict[str, Any]:
        took = max(end - start, 0) / 1e3
        where = {"pid": rank, "tid": thread, "ts": start / 1e3, "dur": took}
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
    place = Path.cwd() if wanted == "1" else Path(wanted)
    if not place.is_dir():
        raise GeometryError(
            f"MOE_A2A_TRACE={wanted!r}: must be 1 (traces go to the current directory), 0, or a "
            "directory that exists"
        )
    return place


def merge(out: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> int:
    """One trace of several ranks of one host, which share a clock. Returns its events."""
    traces = [json.loads(Path(file).read_text()) for file in files]
    events = [event for trace in traces for event in trace["traceEvents"]]
    Path(out).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))
    return len(events)
