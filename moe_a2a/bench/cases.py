"""What a benchmark runs: a geometry, and the points of the sweep over wires and tokens.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from moe_a2a.errors import GeometryError
from moe_a2a.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "PRESETS", "Effort", "Geometry", "Sweep", "UsageError", "fitting_wires", "misfit",
    "row_traffic", "spec_of",
]  # fmt: skip


class UsageError(ValueError):
    """A wrong argument of the command line: one sentence, exit code 2."""


class Geometry(NamedTuple):
    """Shape of a model's Mixture-of-Experts layers."""

    name: str
    hidden_size: int
    num_experts: int
    top_k: int


PRESETS: Mapping[str, Geometry] = MappingProxyType(
    {
        geometry.name: geometry
        for geometry in (
            Geometry("deepseek-v3", 7168, 256, 8),
            Geometry("deepseek-v4-flash", 4096, 256, 6),
            Geometry("deepseek-v4", 7168, 384, 6),
            Geometry("gpt-oss-120b", 2880, 128, 4),
            Geometry("qwen3-235b", 4096, 128, 8),
            Geometry("kimi-k2", 7168, 384, 8),
        )
    }
)


class Effort(NamedTuple):
    """How long a point is timed: both at least.

    Attributes:
        iterations: rounds.
        seconds: of wall time, as the warm-up predicts it.
        warmup: rounds before.
    """

    iterations: int
    seconds: float
    warmup: int


@dataclass(frozen=True)
class Sweep:
    """All points of one run. Picklable: the ranks get it as it is.

    Attributes:
        routing: ``uniform``, ``zipf``, ``hotspot`` or the path of a recorded routing.
        backends: names, in the order of the table.
        wires: those that fit the geometry.
        rivals: whether the rivals run too.
        pinned: whether each rank keeps to a core of its own while it is timed.
        device: ``cpu`` or ``cuda``.
        pairs: of dispatch and combine in a CUDA graph.
        max_blocks: of `AllToAll`.
        only: names of the rivals to run; None is all.
        label: what the sweep is for, where a run has several.
    """

    geometry: Geometry
    ep_size: int
    tokens: tuple[int, ...]
    wires: tuple[str, ...]
    combine_wire: str
    backends: tuple[str, ...]
    routing: str
    seed: int
    rivals: bool
    effort: Effort
    pinned: bool = False
    device: str = "cpu"
    pairs: int = 20
    max_blocks: int | None = None
    only: tuple[str, ...] | None = None
    label: str = ""

    def spec(self, wire: str) -> Spec:
        """The `Spec` of a wire; its capacity is the sweep's largest number of tokens."""
        return spec_of(self.geometry, self.ep_size, max(self.tokens), wire, self.combine_wire)


def spec_of(
    geometry: Geometry, ep_size: int, max_tokens: int, wire: str, combine_wire: str
) -> Spec:
    """A `Spec` of a model's geometry; raises `GeometryError` where it breaks a rule."""
    return Spec(
        ep_size=ep_size,
        num_experts=geometry.num_experts,
        top_k=geometry.top_k,
        hidden_size=geometry.hidden_size,
        max_tokens_per_rank=max_tokens,
        wire=wire,
        combine_wire=combine_wire,
    )


def misfit(geometry: Geometry, wire: str) -> str | None:
    """Why a wire does not fit the geometry; None where it does."""
    try:
        spec_of(geometry, 1, 1, wire, "bf16")
    except GeometryError as error:
        return str(error)
    return None


def fitting_wires(
    geometry: Geometry, ep_size: int, wires: Sequence[str], combine_wire: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The wires whose blocks divide H, and the reason for each of the others.

    Raises:
        UsageError: the geometry or the combine wire is wrong whatever the wire, or none is left.
    """
    try:
        spec_of(geometry, ep_size, 1, "bf16", combine_wire)
    except GeometryError as error:
        raise UsageError(str(error)) from None
    found = {wire: misfit(geometry, wire) for wire in wires}
    reasons = {wire: reason for wire, reason in found.items() if reason is not None}
    fitting = tuple(wire for wire in wires if wire not in reasons)
    if not fitting:
        raise UsageError(f"no wire is left: {'; '.join(reasons.values())}")
    return fitting, reasons


def row_traffic(spec: Spec) -> tuple[int, int]:
    """Bytes of one remote row: (dispatch: payload, scales, ids, weights and extras; combine)."""
    dispatch = sum(spec.row_bytes) + 8 * spec.top_k + sum(spec.extra.values())
    return dispatch, spec.combine_row_bytes
