"""Where a soak runs, and what may befall its ranks there."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.strike import KINDS, POINTS


@dataclass(frozen=True)
class Place:
    """Of a device.

    Attributes:
        ranks: how many, where nobody says.
        streams: the ranks are threads of one process, a CUDA stream each.
        elders: as many processes are never killed: what leaks shows in them.
        windows_move: ranks that were left out of a reset may come back and harm nobody.
        limits: timeouts to draw from, seconds.
        slack: seconds past the timeout in which a survivor must have raised.
        most_rounds: between two faults.
    """

    backend: str
    ranks: int
    kinds: tuple[str, ...] = KINDS
    points: tuple[str, ...] = POINTS
    streams: bool = False
    elders: int = 2
    windows_move: bool = True
    limits: tuple[float, ...] = (0.5, 0.6, 0.8)
    slack: float = 1.0
    most_rounds: int = 80


# Kernels can't be stopped in the middle by a signal to their process, and a CUDA rank that is left
# out of a reset must have ended.
_HOST = ("before", "between")
PLACES = {
    "cpu": (Place("shm", 8),),
    # The kernels of nvlink on the CPU: slow, and all that can be had of them without a GPU.
    "simt": (
        Place(
            "simt", 3, windows_move=False, limits=(1.0, 1.5), slack=1.5, most_rounds=20, elders=1
        ),
    ),
    "cuda": (
        Place("nvlink", 4, ("sleep",), _HOST, streams=True, windows_move=False, limits=(0.8,)),
        # Processes that share a GPU wait a time slice for each other.
        Place(
            "nvlink",
            3,
            ("kill", "sleep"),
            _HOST,
            elders=1,
            windows_move=False,
            limits=(0.8, 1.2),
            slack=2.0,
            most_rounds=12,
        ),
    ),
}
