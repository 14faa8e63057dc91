"""The results of a run of whole layers: a table, and what the JSON and the figure hold.

A case is a dictionary: kind ("backend" or "rival"), name (of the exchange), experts, wire,
combine_wire, tokens (per rank), iterations; layer_us (median, p10, p90 in microseconds of the rank
whose layer takes longest); prepare_us, experts_us, finalize_us (of the rank whose experts take
longest: the others wait for it, and that is no cost of the exchange) and shares (of those three
medians, by phase); captured (whether CUDA graphs were timed); per_rank (the same quantiles of every
rank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_a2a.bench.layer_timing import PHASES
from moe_a2a.bench.report import as_document, heading, microseconds
from moe_a2a.bench.table import print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_a2a.bench.layer import LayerSweep
    from moe_a2a.bench.layer_timing import LayerTimings
    from moe_a2a.bench.plot import Line
    from moe_a2a.spec import Spec

__all__ = ["layer_case", "layer_document", "layer_panels", "print_layers"]

Case = dict[str, Any]
_HEADER = (
    "exchange", "experts", "wire", "tokens", "layer us", "p10", "p90", "dispatch us", "experts us",
    "combine us", "disp.", "exp.", "comb.", "x ours",
)  # fmt: skip


def layer_case(
    kind: str,
    name: str,
    experts: str,
    spec: Spec,
    tokens: int,
    ranks: Sequence[LayerTimings],
) -> Case:
    """``ranks``: by rank."""
    slowest = max(ranks, key=lambda timings: timings.layer.median)
    busiest = max(ranks, key=lambda timings: timings.experts.median)
    parts = ("layer", *PHASES)
    return {
        "kind": kind,
        "name": name,
        "experts": experts,
        "wire": spec.wire,
        "combine_wire": spec.combine_wire,
        "tokens": tokens,
        "iterations": slowest.iterations,
        "layer_us": slowest.layer._asdict(),
        **{f"{phase}_us": getattr(busiest, phase)._asdict() for phase in PHASES},
        "shares": busiest.shares(),
        "captured": slowest.captured,
        "per_rank": [{f"{p}_us": getattr(t, p)._asdict() for p in parts} for t in ranks],
    }


def layer_document(
    sweep: LayerSweep, cases: Sequence[Case], facts: Mapping[str, Any], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """What the JSON holds."""
    more = {"bench": "layer", "intermediate": sweep.intermediate, "weights": sweep.weights}
    return {**as_document(sweep.sweep, cases, facts, skipped), **more}


def _title(document: Mapping[str, Any]) -> str:
    return (
        f"layer of {heading(document)}, intermediate {document['intermediate']}, "
        f"{document['weights']} weights"
    )


def _over(case: Case, cases: Sequence[Case]) -> float | None:
    """Its time over ours: the first exchange's with the same experts, wire and tokens."""
    keys = ("experts", "wire", "tokens")
    same = [c for c in cases if all(c[key] == case[key] for key in keys)]
    ours = next((c for c in same if c["kind"] == "backend"), None)
    if ours is None:
        return None
    ratio: float = case["layer_us"]["median"] / ours["layer_us"]["median"]
    return ratio


def print_layers(document: Mapping[str, Any]) -> None:
    """The table on stdout."""
    cases: list[Case] = document["cases"]
    rows: list[list[str]] = []
    on_gpus = any(case.get("captured") for case in cases)
    before = None
    for case in cases:
        group = (case["experts"], case["wire"], case["tokens"])
        if before not in (None, group):
            rows.append([])
        before = group
        times = [case["layer_us"][key] for key in ("median", "p10", "p90")]
        times += [case[f"{phase}_us"]["median"] for phase in PHASES]
        shares = [f"{case['shares'][phase]:.0%}" for phase in PHASES]
        ratio = _over(case, cases)
        over = "-" if ratio is None else f"{ratio:.2f}"
        eager = " *" if on_gpus and not case.get("captured") else ""
        place = [case["name"] + eager, case["experts"], case["wire"], str(case["tokens"])]
        rows.append([*place, *map(microseconds, times), *shares, over])
    print_table(_title(document), _HEADER, rows)
    print(
        "us: medians over iterations; the layer's on the rank where it takes longest, the phases' "
        "on the rank whose experts take longest, for which the others wait.\n"
        "x ours: layer time over that of the first exchange with the same experts, wire and tokens."
        + "\n* eager calls, since these experts wait for the device; all others are CUDA graphs."
        * on_gpus
    )


def layer_panels(document: Mapping[str, Any]) -> tuple[str, list[tuple[str, list[Line]]]]:
    """Title and panels of the figure: the layer, and what of it the exchange takes."""
    cases: list[Case] = document["cases"]
    several = len({case["experts"] for case in cases}) > 1
    lines: dict[str, list[Case]] = {}
    for case in cases:
        experts = f", {case['experts']}" if several else ""
        lines.setdefault(f"{case['name']} {case['wire']}{experts}", []).append(case)

    def panel(parts: tuple[str, ...]) -> list[Line]:
        found = []
        for label, of in lines.items():
            of = sorted(of, key=lambda case: case["tokens"])
            times = [sum(case[f"{part}_us"]["median"] for part in parts) for case in of]
            found.append((label, [case["tokens"] for case in of], times))
        return found

    panels = [
        ("whole layer", panel(("layer",))),
        ("dispatch + combine in it", panel(("prepare", "finalize"))),
    ]
    return _title(document), panels
