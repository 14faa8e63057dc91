"""All figures that are promised on two GPUs, from the cases of one run, beside FlashInfer's.

Cases are those of report.py; the sweeps' labels say which is for what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from moe_a2a.bench.cases import PRESETS, Effort, Geometry, Sweep
from moe_a2a.bench.rivals_flashinfer import FlashInfer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["GOALS", "Comparison", "Goal", "compared", "goal_rows", "goal_sweeps", "shape_sweeps"]

Case = dict[str, Any]
PARTS = ("dispatch", "combine", "pair")
_PAIRS, _DISPATCH, _COMBINE, _FEW, SHAPES = "pairs", "dispatch", "combine", "24 blocks", "shapes"
_EAGER_BELOW = 512  # tokens


class Goal(NamedTuple):
    """One figure.

    Attributes:
        name: as it is printed.
        sweep, wire, tokens: of its case; tokens None is the worst of all below 512.
        part: ``dispatch``, ``combine`` or ``pair``; ``rate`` of dispatch in GB/s; ``host_dispatch``
            or ``host_combine``.
        goal: at most (``rate``: at least) so much; None where none is set.
    """

    name: str
    sweep: str
    wire: str
    tokens: int | None
    part: str
    goal: float | None = None


GOALS: tuple[Goal, ...] = (
    *(Goal(f"pair bf16, {n} tokens, us", _PAIRS, "bf16", n, "pair", goal)
      for n, goal in ((1, 4.6), (8, 5.3), (32, 7.5), (64, 10.5), (128, 16.5), (1024, 88.0),
                      (4096, 335.0))),
    *(Goal(f"dispatch {wire}, {n} tokens, us", _DISPATCH, wire, n, "dispatch", goal)
      for wire, n, goal in (("nvfp4", 1024, 18.0), ("nvfp4", 4096, 52.0),
                            ("mxfp8", 1024, 28.0), ("mxfp8", 4096, 88.0))),
    *(Goal(f"combine mxfp8, {n} tokens, us", _COMBINE, "bf16", n, "combine", goal)
      for n, goal in ((1024, 30.0), (4096, 95.0))),
    Goal("dispatch bf16, 4096 tokens, 24 blocks, GB/s", _FEW, "bf16", 4096, "rate", 250.0),
    Goal("eager dispatch below 512 tokens, host us", _PAIRS, "bf16", None, "host_dispatch", 12.0),
    Goal("eager combine below 512 tokens, host us", _PAIRS, "bf16", None, "host_combine", 12.0),
)  # fmt: skip


def goal_sweeps(ranks: int, backend: str, effort: Effort, pairs: int) -> tuple[Sweep, ...]:
    """What `goal_rows` needs."""

    def sweep(label: str, wires: tuple[str, ...], tokens: tuple[int, ...], **more: Any) -> Sweep:
        given = {"combine_wire": "bf16", "rivals": True, **more}
        return Sweep(
            PRESETS["deepseek-v3"], ranks, tokens, wires, backends=(backend,), routing="uniform",
            seed=0, effort=effort, device="cuda", pairs=pairs, label=label, **given,
        )  # fmt: skip

    flashinfer = (FlashInfer.name,)
    return (
        sweep(_PAIRS, ("bf16",), (1, 8, 32, 64, 128, 1024, 4096)),
        sweep(_DISPATCH, ("nvfp4", "mxfp8"), (1024, 4096), only=flashinfer),
        sweep(_COMBINE, ("bf16",), (1024, 4096), combine_wire="mxfp8", only=flashinfer),
        sweep(_FEW, ("bf16",), (4096,), max_blocks=24, rivals=False),
    )


def shape_sweeps(ranks: int, backend: str, effort: Effort, pairs: int) -> tuple[Sweep, ...]:
    """Other shapes, one thing changed at a time, beside FlashInfer alone."""
    base = Geometry("shape", 4096, 256, 8)
    hidden = (2048, 2880, 3072, 5120, 6144, 7168, 8192)
    shapes = [base]
    shapes += [base._replace(hidden_size=size) for size in hidden]
    shapes += [base._replace(top_k=top_k) for top_k in (1, 2, 4, 6, 16, 32)]
    shapes += [base._replace(num_experts=experts) for experts in (8, 32, 64, 128, 512)]
    shapes += [Geometry("shape", 2880, 128, 4), Geometry("shape", 7168, 384, 6)]
    return tuple(
        Sweep(
            geometry, ranks, (1, 16, 128, 512, 2048), ("bf16",), "bf16", (backend,), "uniform", 0,
            True, effort, device="cuda", pairs=pairs, only=(FlashInfer.name,), label=SHAPES,
        )
        for geometry in shapes
    )  # fmt: skip


def goal_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """name, goal, ours, flashinfer, floor of each `Goal`; None where it was not measured."""
    return [
        {
            "name": goal.name,
            "goal": goal.goal,
            "ours": _figure(goal, cases, "backend"),
            "flashinfer": _figure(goal, cases, "rival"),
            "floor": _figure(goal, cases, "bound"),
        }
        for goal in GOALS
    ]


def _figure(goal: Goal, cases: Iterable[Case], kind: str) -> float | None:
    found = [
        _value(goal.part, case)
        for case in cases
        if (case["sweep"], case["wire"], case["kind"]) == (goal.sweep, goal.wire, kind)
        and (kind != "rival" or case["name"] == FlashInfer.name)
        and (case["tokens"] == goal.tokens if goal.tokens else case["tokens"] < _EAGER_BELOW)
    ]
    values = [value for value in found if value is not None]
    return max(values) if values else None


def _value(part: str, case: Case) -> float | None:
    if part.startswith("host_"):
        return case["host_us"][part[5:]] if "host_us" in case else None
    if part == "rate":
        return float(case["dispatch_bytes"] / case["dispatch_us"]["median"] / 1e3)
    return float(case[f"{part}_us"]["median"])


class Comparison(NamedTuple):
    """One operation of one point of the shapes.

    ``slower``: by more than the noise, which is the wider of the two spreads (p10 to p90).
    """

    shape: str
    part: str
    ours: float
    flashinfer: float
    slower: bool

    @property
    def ratio(self) -> float:
        return self.ours / self.flashinfer


def compared(cases: Sequence[Case]) -> list[Comparison]:
    """Ours against FlashInfer's wherever both ran, the worst ratio first."""
    theirs = {_point(case): case for case in cases if case["name"] == FlashInfer.name}
    found = []
    for case in cases:
        other = theirs.get(_point(case))
        if case["kind"] != "backend" or other is None:
            continue
        for part in PARTS:
            ours, rival = case[f"{part}_us"], other[f"{part}_us"]
            noise = max(ours["p90"] - ours["p10"], rival["p90"] - rival["p10"])
            slower = ours["median"] > rival["median"] + noise
            point = _point(case)
            found.append(Comparison(_shown(point), part, ours["median"], rival["median"], slower))
    return sorted(found, key=lambda comparison: -comparison.ratio)


def _point(case: Case) -> tuple[Any, ...]:
    names = ("hidden_size", "top_k", "num_experts", "wire", "combine_wire", "tokens", "max_blocks")
    return tuple(case[name] for name in names)


def _shown(point: tuple[Any, ...]) -> str:
    hidden, top_k, experts, wire, back, tokens, _ = point
    wires = wire if wire == back else f"{wire}/{back}"
    return f"H {hidden}, top-{top_k} of {experts}, {wires}, {tokens} tokens"
