"""The results of a run: a table, and a JSON file that holds all that was measured.

A case is a dictionary: kind ("backend", "rival" or "bound"), name, wire, combine_wire, tokens (per
rank), iterations; dispatch_us, combine_us, pair_us (median, p10, p90 of the slowest rank, in
microseconds); dispatch_bytes, pair_bytes (that the routing sends between ranks, by the rank with
the most); per_rank (the same quantiles of every rank). On GPUs also host_us (what an eager dispatch
and an eager combine keep the host for, the slowest rank's medians) and captured (whether replays of
CUDA graphs were timed).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from moe_a2a.bench.cases import row_traffic
from moe_a2a.bench.machine import without_directory
from moe_a2a.bench.table import print_table
from moe_a2a.bench.timing import slowest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from moe_a2a.bench.cases import Sweep
    from moe_a2a.bench.check import Oracle
    from moe_a2a.bench.graphs import DeviceTimings
    from moe_a2a.bench.timing import Timings

__all__ = [
    "as_document", "case_of", "heading", "microseconds", "print_results", "ratios", "write_json",
]  # fmt: skip

Case = dict[str, Any]
_HEADER = (
    "backend or rival", "wire", "tokens", "dispatch us", "combine us", "pair us", "p10", "p90",
    "bytes", "GB/s disp.", "GB/s pair", "x ours", "x bound",
)  # fmt: skip


def as_document(
    sweep: Sweep, cases: Sequence[Case], facts: Mapping[str, Any], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """What the JSON holds. ``facts``: of machine.py."""
    return {
        "schema": 1,
        **facts,
        "geometry": sweep.geometry._asdict(),
        "ep_size": sweep.ep_size,
        "routing": without_directory(sweep.routing),
        "seed": sweep.seed,
        "pinned": sweep.pinned,
        "device": sweep.device,
        "skipped": dict(skipped),
        "cases": list(cases),
    }


def write_json(document: Mapping[str, Any], directory: Path) -> Path:
    """Writes ``bench-GEOMETRY-epW-TIME.json`` (``layer-...``); returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    moment = "".join(c for c in document["utc"][:19] if c.isalnum())
    what = document.get("bench", "bench")
    name = f"{what}-{document['geometry']['name']}-ep{document['ep_size']}-{moment}.json"
    path = directory / name
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def case_of(
    kind: str,
    name: str,
    oracle: Oracle,
    tokens: int,
    ranks: Sequence[Timings] | Sequence[DeviceTimings],
) -> Case:
    """A case but for what its kind adds. ``ranks``: by rank."""
    spec, between = oracle.spec, oracle.rows_between
    remote = between - between.diag().diag()
    busiest = int(torch.maximum(remote.sum(0), remote.sum(1)).max())
    row, back = row_traffic(spec)
    parts = ("dispatch", "combine", "pair")
    return {
        "kind": kind,
        "name": name,
        "wire": spec.wire,
        "combine_wire": spec.combine_wire,
        "tokens": tokens,
        "iterations": ranks[0].iterations,
        **{f"{p}_us": slowest(ranks, p)._asdict() for p in parts},
        "dispatch_bytes": busiest * row,
        "pair_bytes": busiest * (row + back),
        "per_rank": [{f"{p}_us": getattr(t, p)._asdict() for p in parts} for t in ranks],
    }


def heading(document: Mapping[str, Any]) -> str:
    """One line: geometry, ranks, routing."""
    geometry = document["geometry"]
    return (
        f"{geometry['name']}: hidden {geometry['hidden_size']}, top-{geometry['top_k']} of "
        f"{geometry['num_experts']} experts, {document['ep_size']} ranks, "
        f"{document['routing']} routing" + (", pinned" if document.get("pinned") else "")
    )


def ratios(case: Case, cases: Sequence[Case]) -> tuple[float | None, float | None]:
    """Pair time over ours and over the bound, at the same wire and tokens.

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
    on_gpus = any("host_us" in case for case in cases)
    before = None
    for case in cases:
        group = (case["wire"], case["tokens"])
        if before not in (None, group):
            rows.append([])
        before = group
        rows.append([*_row(case, cases), *([_host(case)] if on_gpus else [])])
    header = (*_HEADER, "host us") if on_gpus else _HEADER
    print_table(heading(document), header, rows)
    ours = next((c["name"] for c in cases if c["kind"] == "backend"), None)
    bound = next((c["name"] for c in cases if c["kind"] == "bound"), None)
    print(
        "us: median over iterations on the slowest rank. bytes: rows that cross to other ranks and "
        "back, on the busiest rank.\n"
        f"x ours: pair time over that of {ours}; x bound: over the {bound} of the same wire."
    )
    if on_gpus:
        print(
            "dispatch, combine: each alone, in CUDA graphs that take turns, less an empty graph; "
            "pair: back to back in one graph. host us: of an eager dispatch + combine; with a *, "
            "no graphs: the case runs eagerly."
        )


def _host(case: Case) -> str:
    if "host_us" not in case:
        return "-"
    host = case["host_us"]
    eager = "" if case["captured"] else " *"
    return f"{host['dispatch']:.1f} + {host['combine']:.1f}{eager}"


def microseconds(value: float) -> str:
    """As tables show them."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _row(case: Case, cases: Sequence[Case]) -> list[str]:
    pair = case["pair_us"]
    dispatch, combine = case["dispatch_us"]["median"], case["combine_us"]["median"]
    times = [microseconds(value) for value in (dispatch, combine, *pair.values())]
    rates = [_rate(case["dispatch_bytes"], dispatch), _rate(case["pair_bytes"], pair["median"])]
    over = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios(case, cases)]
    place = [case["name"], case["wire"], str(case["tokens"])]
    return [*place, *times, f"{case['pair_bytes']:,}", *rates, *over]


def _rate(nbytes: int, microseconds: float) -> str:
    return f"{nbytes / microseconds / 1e3:.2f}" if microseconds else "-"
