"""The open `AllToAll` objects of this process: one by its handle, and all of them after a fork."""

from __future__ import annotations

import os
from functools import cache
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

__all__ = ["enroll", "find", "leave"]


class _Forkable(Protocol):
    def forked(self) -> None:
        """Called in the child."""


_handles = count(1)
_left: list[object] = []
_open: WeakValueDictionary[int, _Forkable] = WeakValueDictionary()


def enroll(opened: _Forkable) -> int:
    """The handle of ``opened``, which is not kept alive by it and never used again."""
    _watch_forks()
    handle = next(_handles)
    _open[handle] = opened
    return handle


def find(handle: int) -> object:
    """What has this handle, None once it is gone."""
    return _open.get(handle)


def leave(whatever: object) -> None:
    """Keeps what a forked child must not end: its parent uses it."""
    _left.append(whatever)


@cache
def _watch_forks() -> None:
    """Asking for the process id in every call would cost a system call each."""
    os.register_at_fork(after_in_child=_tell)


def _tell() -> None:
    for opened in list(_open.values()):
        opened.forked()
