"""Every error that the library raises on purpose.

They are raised before anything is launched or sent wherever the mistake is visible there, so the
object stays usable: correct the argument and call again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "BackendUnavailable",
    "BuildError",
    "CapacityError",
    "GeometryError",
    "MoeA2AError",
    "PayloadError",
    "PeerTimeout",
    "StateError",
    "WorkspaceError",
]


class MoeA2AError(Exception):
    """Base class: ``except MoeA2AError`` catches all of the below and nothing else."""


class GeometryError(MoeA2AError, ValueError):
    """An argument of `Spec` or `AllToAll` breaks a rule, or the ranks do not agree on one."""


class StateError(MoeA2AError, RuntimeError):
    """A call in the wrong phase, or ranks that make different calls in the same round."""


class PayloadError(MoeA2AError, ValueError):
    """A tensor of the wrong dtype, shape, stride, device or memory; the text has what is right."""


class CapacityError(MoeA2AError, ValueError):
    """More tokens than this round's R, or R outside ``0..max_tokens_per_rank``."""


class PeerTimeout(MoeA2AError, TimeoutError):
    """Ranks that did not arrive in time.

    Attributes:
        ranks: the missing ranks, ascending.
        phase: ``"open"``, ``"dispatch"``, ``"combine"`` or ``"reset"``.
        round: number of the round on this rank, counted from 1 (0 while opening).
        waited: seconds this rank waited.
    """

    def __init__(
        self, message: str, *, ranks: Sequence[int], phase: str, round: int, waited: float
    ) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.phase = phase
        self.round = round
        self.waited = waited

    def __reduce__(self) -> tuple[Any, ...]:
        facts: dict[str, Any] = {"ranks": self.ranks, "phase": self.phase, "round": self.round}
        return partial(PeerTimeout, waited=self.waited, **facts), self.args


class BackendUnavailable(MoeA2AError, RuntimeError):
    """No usable backend; ``reasons`` maps each backend asked for to why it can't be used."""

    def __init__(self, message: str, *, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BackendUnavailable, reasons=self.reasons), self.args


class WorkspaceError(MoeA2AError, MemoryError):
    """The window does not fit: the text has the bytes wanted and the bytes there."""


class BuildError(MoeA2AError, RuntimeError):
    """A kernel did not compile: the text has the command and the compiler's output."""
