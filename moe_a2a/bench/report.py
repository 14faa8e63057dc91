"""The results of a run: a table, and a JSON file that holds all that was measured.

A case is a dictionary: kind ("backend", "rival" or "bound"), name, wire, combine_wire, tokens (per
rank), iterations; dispatch_us, combine_us, pair_us (median, p10, p90 of the slowest rank, in
microseconds); dispatch_bytes, pair_bytes (that the routing sends between ranks, by the rank with
the most); per_rank (the same quantiles of every rank).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moe_a2a.bench.machine import without_directory
from moe_a2a.bench.table import print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from moe_a2a.bench.cases import Sweep

__all__ = ["as_document", "heading", "print_results", "ratios", "write_json"]

Case = dict[str, Any]
_HEADER = (
    "backend or rival", "wire", "tokens", "dispatch us", "combine us", "pair us", "p10", "p90",
    "bytes", "GB/s disp.", "GB/s pair", "x ours", "x bound",
)  # fmt: skip


def as_document(
    sweep: Sweep, cases: Sequence[Case], facts: Mapping[str, Any], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """What the JSON holds. ``facts``: of machine.py."""
    geometry = sweep.geometry._asdict()
    return {
        "schema": 1,
        **facts,
        "geometry": geometry,
        "ep_size": sweep.ep_size,
        "routing": without_directory(sweep.routing),
        "seed": sweep.seed,
        "pinned": sweep.pinned,
        "skipped": dict(skipped),
        "cases": list(cases),
    }


def write_json(document: Mapping[str, Any], directory: Path) -> Path:
    """Writes ``bench-GEOMETRY-epW-TIME.json``; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    moment = "".join(c for c in document["utc"][:19] if c.isalnum())
    name = f"bench-{document['geometry']['name']}-ep{document['ep_size']}-{moment}.json"
    path = directory / name
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def heading(document: Mapping[str, Any]) -> str:
    """One line: geometry, ranks, routing."""
    geometry = document["geometry"]
    return (
        f"{geometry['name']}: hidden {geometry['hidden_size']}, top-{geometry['top_k']} of "
        f"{geometry['num_experts']} experts, {document['ep_size']} ranks, "
        f"{document['routing']} routing" + (", pinned" if document.get("pinned") else "")
    )


def ratios(case: Case, cases: Sequence[Case]) -> tuple[float | None, float | None]:
    """Pair time over ours and over the memcpy bound, at the same wire and tokens.

    Ours is the first backend of the run.
    """
    same = [c for c in cases if (c["wire"], c["tokens"]) == (case["wire"], case["tokens"])]

    def over(kind: str) -> float | None:
        first = next((c for c in same if c["kind"] == kind), None)
        return None if first is None else case["pair_us"]["median"] / first["pair_us"]["median"]

    return over("backend"), over("bound")


def print_results(document: Mapping[str, Any]) -> None:
    """The table on stdout."""
    rows: list[list[str]] = []
    cases: list[Case] = document["cases"]
    before = None
    for case in cases:
        group = (case["wire"], case["tokens"])
        if before not in (None, group):
            rows.append([])
        before = group
        rows.append(_row(case, cases))
    print_table(heading(document), _HEADER, rows)
    ours = next((c["name"] for c in cases if c["kind"] == "backend"), None)
    print(
        "us: median over iterations on the slowest rank. bytes: rows that cross to other ranks and "
        "back, on the busiest rank.\n"
        f"x ours: pair time over that of {ours}; x bound: over the memcpy bound of the same wire."
    )


def _row(case: Case, cases: Sequence[Case]) -> list[str]:
    pair = case["pair_us"]
    dispatch, combine = case["dispatch_us"]["median"], case["combine_us"]["median"]
    times = [_us(value) for value in (dispatch, combine, *pair.values())]
    rates = [
        f"{case['dispatch_bytes'] / dispatch / 1e3:.2f}",
        f"{case['pair_bytes'] / pair['median'] / 1e3:.2f}",
    ]
    over = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios(case, cases)]
    place = [case["name"], case["wire"], str(case["tokens"])]
    return [*place, *times, f"{case['pair_bytes']:,}", *rates, *over]


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
