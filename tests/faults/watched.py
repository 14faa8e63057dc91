"""An `AllToAll` whose calls are counted, timed and struck."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_a2a import AllToAll, Received
    from tests.faults.strike import Strike


def queued() -> float:
    """Seconds that this thread has been ready to run, without a core to run on."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Watched:
    """Everything else of the exchange is reached as it is.

    Attributes:
        rounds: dispatches begun.
        nbytes: bytes of rows and sums that came out of calls.
        call, entered: the last call begun, and when.
        strike: what is to befall this rank, and at which point; None once it has.
        starved: the longest time, from one call to the next, in which this rank was ready to run
            and had no core, or stood still outside any call for reasons of its own.
    """

    def __init__(self, a2a: AllToAll) -> None:
        self.a2a = a2a
        self.rounds = self.nbytes = 0
        self.call, self.entered = "", 0.0
        self._received: Any = None
        self.strike: tuple[str, Strike] | None = None
        self.starved, self._queued = 0.0, queued()
        self.mark()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.a2a, name)

    def dispatch(self, *args: Any, **keywords: Any) -> Received:
        self._land("before")
        self.rounds += 1
        recv: Received = self._begin("dispatch", lambda: self.a2a.dispatch(*args, **keywords))
        # The views are this rank's until its combine, whatever the others do meanwhile.
        self._land("between")
        self._received = recv
        return recv

    def combine(self, y: Tensor, **keywords: Any) -> Tensor:
        recv = self._received
        rows = [recv.x, recv.topk_ids, recv.topk_weights, *recv.extra.values()]
        rows += [] if recv.scales is None else [recv.scales]
        per_row = sum(part[0, 0].nbytes if part.shape[1] else 0 for part in rows)
        out: Tensor = self._begin("combine", lambda: self.a2a.combine(y, **keywords))
        self.nbytes += int(recv.counts.sum()) * per_row + out.nbytes
        return out

    def reset(self, active_ranks: Tensor) -> None:
        self._begin("reset", lambda: self.a2a.reset(active_ranks))

    def mark(self) -> None:
        """What this rank has waited for until now, outside calls, is no fault of the machine."""
        self._outside = time.monotonic() - time.thread_time()

    def took(self) -> float:
        """Seconds since the last call began, on a core or waiting for what is not one."""
        self._note_queue()
        return time.monotonic() - self.entered

    def _begin(self, name: str, call: Callable[[], Any]) -> Any:
        self._note_queue()
        still = time.monotonic() - time.thread_time() - self._outside
        self.starved = max(self.starved, still)
        self.call, self.entered = name, time.monotonic()
        strike = self._taken(name)
        try:
            return call() if strike is None else strike.during(call)
        finally:
            self.mark()

    def _land(self, point: str) -> None:
        strike = self._taken(point)
        if strike is not None:
            strike.now()
            self.mark()

    def _taken(self, point: str) -> Strike | None:
        if self.strike is None or self.strike[0] != point:
            return None
        strike, self.strike = self.strike[1], None
        return strike

    def _note_queue(self) -> None:
        now = queued()
        self.starved, self._queued = max(self.starved, now - self._queued), now
