"""What befalls a rank, and where in its sequence of calls.

A signal that is to come inside a call comes from a timer of the kernel: at any instruction, also
in the middle of a copy, whoever holds the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("kill", "stop", "sleep")
POINTS = ("before", "dispatch", "between", "combine", "reset")  # before dispatch; inside it; ...
INSIDE = ("dispatch", "combine", "reset")

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Strike:
    """One rank's lot.

    `delay`: seconds after the call has begun, at points inside one. `lasts`: seconds of a sleep;
    what was stopped goes on when a peer wakes it.
    """

    kind: str
    delay: float = 0.0
    lasts: float = 0.0

    def now(self) -> None:
        if self.kind == "sleep":
            time.sleep(self.lasts)
        else:
            os.kill(os.getpid(), _SIGNALS[self.kind])

    def during(self, call: Callable[[], Any]) -> Any:
        """Runs `call`, and is over when this returns: should the call have been shorter than the
        delay, the strike comes right after it."""
        if self.kind == "sleep":
            return self._asleep(call)
        timer = _Timer(_SIGNALS[self.kind], self.delay)
        try:
            return call()
        finally:
            while timer.armed():
                time.sleep(0.0002)
            timer.close()

    def _asleep(self, call: Callable[[], Any]) -> Any:
        # Python runs the handler when a kernel comes back from a slice of its wait.
        slept: list[bool] = []

        def sleep(*_: object) -> None:
            slept.append(True)
            time.sleep(self.lasts)

        before = signal.signal(signal.SIGALRM, sleep)
        signal.setitimer(signal.ITIMER_REAL, max(self.delay, 1e-6))
        try:
            return call()
        finally:
            while not slept:
                time.sleep(0.0002)
            signal.signal(signal.SIGALRM, before)


class _Event(ctypes.Structure):  # struct sigevent
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),  # 0: SIGEV_SIGNAL
        ("rest", ctypes.c_char * 48),
    )


class _Times(ctypes.Structure):  # struct itimerspec
    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "in_s", "in_ns"))


class _Timer:
    """Sends this process a signal once, any signal: setitimer has SIGALRM alone."""

    def __init__(self, number: int, seconds: float) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _Event(signal=number, notify=0)
        made = self._libc.timer_create(
            time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        )
        after = max(int(seconds * 1e9), 1)
        times = _Times(0, 0, after // 1_000_000_000, after % 1_000_000_000)
        if made or self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None):
            raise OSError(ctypes.get_errno(), "timer")

    def armed(self) -> bool:
        left = _Times()
        self._libc.timer_gettime(self._timer, ctypes.byref(left))
        return bool(left.in_s or left.in_ns)

    def close(self) -> None:
        self._libc.timer_delete(self._timer)
