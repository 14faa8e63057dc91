"""What rank functions get, and what the caller is told of those that did not return.

Shared by ranks that are processes (`moe_a2a.testing`) and threads (`moe_a2a.local_ranks`).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["AFTER_ERROR", "RankContext", "RankHung", "RankRaised", "Raised", "seed_of"]

AFTER_ERROR = 5.0  # seconds that the other ranks get once one has raised


class RankContext(NamedTuple):
    """What a rank function gets first.

    Attributes:
        rank: of this process, or of this thread.
        size: ranks that run the function.
        group: what ``AllToAll(spec, ranks.group)`` takes, of exactly these ranks: a gloo group
            between processes, a `LocalRank` between threads.
        seed: the same on every rank and in every run of the function; in a process torch is
            seeded with ``seed + rank``.
    """

    rank: int
    size: int
    group: Any
    seed: int


class RankRaised(RuntimeError):
    """A rank function raised: the text has rank and traceback, ``__cause__`` is the exception."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank} raised:\n{text}")
        self.rank = rank


class RankHung(RuntimeError):
    """Ranks that did not return in time: the text has the stacks of their threads."""

    def __init__(self, ranks: Sequence[int], timeout: float, stacks: str) -> None:
        names = ", ".join(map(str, ranks))
        super().__init__(f"ranks {names} did not return within {timeout:g} s\n{stacks}")
        self.ranks = tuple(ranks)


class Raised(NamedTuple):
    """The answer of a rank whose function raised."""

    text: str
    exception: BaseException | None


def seed_of(fn: Callable[..., Any]) -> int:
    return zlib.crc32(f"{fn.__module__}.{fn.__qualname__}".encode())
