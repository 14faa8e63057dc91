"""What closed exchanges leave behind: memory that kernels queued before `close` still use.

`close` waits for nobody, and a round that was queued before it still has to end right, here and at
the peers. So the memory stays until the device is through, which is looked for whenever another
exchange opens or closes. Kernels that wait for a peer end with their limit; at the end of the
process they are told to give up, since the driver would wait for them.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["hold", "sweep"]


class _Departing(NamedTuple):
    done: Callable[[], bool]
    abandon: Callable[[], object]
    memory: object


_all: list[_Departing] = []
_lock = threading.Lock()


def hold(memory: object, done: Callable[[], bool], abandon: Callable[[], object]) -> None:
    """Keeps ``memory`` until ``done()``; ``abandon()`` ends the waits at the end of the process."""
    sweep()
    with _lock:
        if not _all:
            atexit.unregister(_abandon)
            atexit.register(_abandon)
        _all.append(_Departing(done, abandon, memory))


def sweep() -> None:
    """Lets go of what the device is through with."""
    through: list[_Departing] = []
    left: list[_Departing] = []
    with _lock:
        for one in _all:
            (through if one.done() else left).append(one)
        _all[:] = left
    # Freed without the lock: a destructor may close another exchange.
    through.clear()


def _abandon() -> None:
    for one in _all:
        with suppress(Exception):
            one.abandon()
