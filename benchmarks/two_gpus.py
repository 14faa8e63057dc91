"""Every figure that is promised on two GPUs, and a sweep over shapes, in one run.

    python benchmarks/two_gpus.py --out DIR

Needs GPUs of one host that reach each other; FlashInfer is measured in the same run where it can be
imported. Writes a JSON and the figure of the pairs, prints the tables last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moe_a2a.bench.cases import Effort, Sweep
from moe_a2a.bench.command import run_sweeps
from moe_a2a.bench.connect import gpu_count
from moe_a2a.bench.goals import SHAPES, compared, goal_rows, goal_sweeps, shape_sweeps
from moe_a2a.bench.launch import RankFailed, torchrun_place
from moe_a2a.bench.machine import circumstances
from moe_a2a.bench.plot import write_plot
from moe_a2a.bench.progress import Display
from moe_a2a.bench.report import as_document, print_results
from moe_a2a.bench.table import print_table

WORST = 16  # comparisons that are printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--backend", default="nvlink")
    parser.add_argument("--ranks", type=int, default=None, help="default: as many as GPUs")
    parser.add_argument("--seconds", type=float, default=300.0, help="no point begins after (300)")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--no-shapes", action="store_true", help="only the promised figures")
    parser.add_argument("--no-goals", action="store_true", help="only the sweep over shapes")
    parser.add_argument("--commit", help="where the checkout can't tell")
    arguments = parser.parse_args()
    ranks = arguments.ranks or max(gpu_count(), 1)
    place = torchrun_place()
    if place is not None:
        ranks = place[1]
    effort = Effort(arguments.replays, 0.0, 5)
    given = (ranks, arguments.backend, effort, arguments.pairs)
    sweeps: list[Sweep] = [] if arguments.no_goals else [*goal_sweeps(*given)]
    if not arguments.no_shapes:
        sweeps += shape_sweeps(*given)
    try:
        with Display() as display:
            run_sweeps(tuple(sweeps), display.show, arguments.seconds)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return 1
    if display.results is None:
        return 0
    facts = {**circumstances(sys.argv[1:]), **(display.results.facts or {})}
    facts["command"] = facts["command"].replace("-m moe_a2a", "benchmarks/two_gpus.py")
    if facts["commit"] == "unknown" and arguments.commit:
        facts["commit"] = arguments.commit
    document = as_document(sweeps[0], display.results.cases, facts, {})
    document |= {"goals": goal_rows(document["cases"])}
    _write(document, arguments.out)
    _print(document)
    return 0


def _write(document: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"two_gpus-ep{document['ep_size']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)
    pairs = _of(document, "pairs")
    if pairs["cases"]:
        try:
            write_plot(pairs, path.with_suffix(".png"))
        except ImportError:
            print("no figure without matplotlib", file=sys.stderr)


def _of(document: dict[str, Any], label: str) -> dict[str, Any]:
    """The document with the cases of one sweep."""
    return {**document, "cases": [case for case in document["cases"] if case["sweep"] == label]}


def _print(document: dict[str, Any]) -> None:
    found = compared([case for case in document["cases"] if case["sweep"] == SHAPES])
    if found:
        rows = [
            [c.shape, c.part, f"{c.ours:.1f}", f"{c.flashinfer:.1f}", f"{c.ratio:.2f}"]
            for c in found[:WORST]
        ]
        header = ("shape", "what", "ours us", "FlashInfer us", "ratio")
        slower = sum(c.slower for c in found)
        title = f"shapes: {len(found)} comparisons, {slower} slower by more than the noise; worst:"
        print_table(title, header, rows)
    pairs = _of(document, "pairs")
    if pairs["cases"]:
        print_results(pairs)
        rows = [
            [row["name"], *(_shown(row[key]) for key in ("goal", "ours", "flashinfer", "floor"))]
            for row in document["goals"]
        ]
        print_table("figures", ("what", "goal", "ours", "FlashInfer", "floor"), rows)
    link = document.get("link")
    if link:
        curve = ", ".join(f"{size / 1024:.0f} KB {us:.2f}" for size, us in link["exchanges"])
        print(f"link: stores {link['bytes_per_us'] / 1e3:.0f} GB/s; exchanges, us: {curve}")
    for note in document.get("notes", ()):
        print(note)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
