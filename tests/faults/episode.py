"""An episode: an exchange is opened, plays rounds, loses ranks, is reset, goes on, and is closed.

What happens is written down before it begins, so that every rank can foresee all of it: an
`Episode` is data. `part.py` is what a rank makes of it, `tests/soak/draw.py` draws some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.collective.rounds import Case, Round
    from tests.faults.strike import Strike


@dataclass(frozen=True)
class Act:
    """Rounds of all that are alive; then a strike, and what comes of it.

    Attributes:
        rounds: before anything happens.
        point: where the strikes land, in the first of `struck` (or the reset before it).
        strikes: by rank; none is an act of healthy rounds alone.
        struck: two rounds. A rank that is hit at the end of an operation is missed in the next.
        late: rank -> seconds that it comes later to the struck round, so that others wait inside.
        apart: the survivors reset without the missing, and play these. Without any they wait for
            those that come back, and all reset together.
        together: of all that are alive, after the reset that takes in who came back.
    """

    rounds: tuple[Round, ...] = ()
    point: str = ""
    strikes: Mapping[int, Strike] = field(default_factory=dict)
    struck: tuple[Round, ...] = ()
    late: Mapping[int, float] = field(default_factory=dict)
    apart: tuple[Round, ...] = ()
    together: tuple[Round, ...] = ()

    def killed(self) -> set[int]:
        return {rank for rank, strike in self.strikes.items() if strike.kind == "kill"}


@dataclass(frozen=True)
class Episode:
    """An exchange's life.

    Attributes:
        limit: its timeout, seconds.
        slack: seconds past it in which a survivor must have raised.
        epoch: what its operations count from; None is as it opens.
        pause: the longest that a rank dawdles before a healthy round, seconds.
    """

    case: Case
    acts: tuple[Act, ...]
    backend: str = "shm"
    limit: float = 0.5
    slack: float = 1.0
    epoch: int | None = None
    pause: float = 0.0

    def __str__(self) -> str:
        """Without the rounds, which follow from the seed."""
        acts = [f"after {len(a.rounds)} rounds at {a.point}: {dict(a.strikes)}" for a in self.acts]
        facts = f"{self.backend}, limit {self.limit:g} s, epoch {self.epoch}"
        return "\n  ".join([f"{self.case} ({facts})", *acts])

    def killed(self) -> set[int]:
        return set().union(*(act.killed() for act in self.acts))


@dataclass
class Tally:
    """What a rank has to tell.

    Attributes:
        named: of each act with strikes, whom this rank's `PeerTimeout` named (none: it was struck).
        stalled, broken: an error in a healthy round, or one that was not as it must be: the
            library is wrong, or the machine was too slow. The rest of the episode did not happen.
        starved: the longest time that this rank stood still on the machine's account, seconds.
        left: descriptors and mappings that outlived the exchange.
        memory: bytes of this process's own, after it was closed.
    """

    rank: int = 0
    rounds: int = 0
    nbytes: int = 0
    resets: int = 0
    named: list[tuple[int, ...] | None] = field(default_factory=list)
    stalled: str = ""
    broken: str = ""
    starved: float = 0.0
    left: dict[str, int] = field(default_factory=dict)
    memory: int = 0
