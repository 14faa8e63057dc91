"""What the ranks tell whoever shows it: picklable, one NamedTuple per kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Event", "Failed", "Note", "Progress", "Results", "Tell"]


class Progress(NamedTuple):
    """Point number ``done`` of ``total`` begins."""

    done: int
    total: int
    label: str


class Note(NamedTuple):
    """A sentence for the user."""

    text: str


class Results(NamedTuple):
    """All points, from rank 0; see report.py for their fields.

    ``facts``: what only ranks can tell of the machine: the GPUs, the link between them.
    """

    cases: list[dict[str, Any]]
    facts: dict[str, Any] | None = None


class Failed(NamedTuple):
    """A rank gives up."""

    message: str


Event = Progress | Note | Results | Failed
Tell = Callable[[Event], None]
