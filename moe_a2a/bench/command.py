"""``bench``: from the arguments to the table, the JSON and the figure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_a2a import backends
from moe_a2a.bench.cases import Effort, Sweep, UsageError, fitting_wires
from moe_a2a.bench.launch import join_torchrun, start_ranks, torchrun_place
from moe_a2a.bench.points import run_points
from moe_a2a.bench.progress import Display
from moe_a2a.bench.report import as_document, print_results, write_json
from moe_a2a.bench.routing import DISTRIBUTIONS, load_recorded
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from moe_a2a.bench.cases import Geometry

__all__ = ["bench", "replot"]

_USUAL_TOKENS, _QUICK_TOKENS = (1, 8, 32, 128, 512), (1, 16)
_USUAL_RANKS = 2


def bench(arguments: argparse.Namespace, geometry: Geometry, argv: Sequence[str]) -> None:
    """Runs what the arguments say.

    Raises:
        UsageError: a wrong argument.
        RankFailed: a rank gave up, or died.
    """
    place = torchrun_place()
    first = place is None or place[0] == 0
    names = _backends(arguments.backend)
    if arguments.host_overhead:
        if first:
            _host_overhead(geometry, names, arguments.wire)
        return
    sweep, skipped = _sweep(arguments, geometry, names, place)
    with Display() as display:
        if first:
            for reason in skipped.values():
                print(f"skipped: {reason}", file=sys.stderr)
        _writable(arguments.out)
        sweep.spec(sweep.wires[0]).workspace()  # compiles once, before ranks wait for each other
        if place is None:
            start_ranks(run_points, sweep, display.show)
        else:
            join_torchrun(run_points, sweep, display.show)
    if display.results is None:
        return
    from moe_a2a.bench.machine import circumstances

    document = as_document(sweep, display.results.cases, circumstances(argv), skipped)
    print_results(document)
    path = write_json(document, Path(arguments.out))
    print(path)
    if not arguments.no_plot:
        _plot(document, path.with_suffix(".png"))


def _writable(directory: str) -> None:
    """Before anything is measured: a result that can't be kept is a pity."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {directory}: {error.strerror}") from None


def replot(file: str) -> None:
    """Draws the figure of a JSON again, beside it.

    Raises:
        UsageError: it is not one of ours.
    """
    path = Path(file)
    try:
        document = json.loads(path.read_text())
        if document["schema"] != 1 or not document["cases"]:
            raise ValueError("another schema, or no cases")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--replot {file}: not a JSON of `bench` ({error})") from None
    _plot(document, path.with_suffix(".png"))


def _plot(document: dict[str, Any], path: Path) -> None:
    from moe_a2a.bench.plot import write_plot

    try:
        write_plot(document, path)
    except ImportError:
        print("no figure without matplotlib: pip install 'moe-a2a[bench]'", file=sys.stderr)
    else:
        print(path)


def _backends(wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those asked for, else all that are usable with CPU tensors."""
    if wanted is not None:
        for name in wanted:
            if name not in backends.BACKENDS:
                raise UsageError(
                    f"--backend {name}: no such backend; there are {', '.join(backends.BACKENDS)}"
                )
        reasons = backends.reasons(tuple(wanted), "cpu")
        for name, reason in reasons.items():
            if reason is not None:
                raise UsageError(f"--backend {name} can't be used here: {reason}")
        return tuple(wanted)
    reasons = backends.reasons(tuple(backends.BACKENDS), "cpu")
    usable = tuple(name for name, reason in reasons.items() if reason is None)
    if not usable:
        raise UsageError(f"no backend is usable here: {'; '.join(map(str, reasons.values()))}")
    return usable


def _sweep(
    arguments: argparse.Namespace,
    geometry: Geometry,
    names: tuple[str, ...],
    place: tuple[int, int] | None,
) -> tuple[Sweep, dict[str, str]]:
    ranks = arguments.ranks
    if place is not None:
        if ranks not in (None, place[1]):
            raise UsageError(f"--ranks {ranks}, and torchrun has started {place[1]}")
        ranks = place[1]
    ranks = _USUAL_RANKS if ranks is None else ranks
    cores = len(os.sched_getaffinity(0))
    if arguments.pin and ranks > cores:
        raise UsageError(f"--pin with {ranks} ranks: each needs a core, and there are {cores}")
    wires, skipped = fitting_wires(geometry, ranks, _wires(arguments.wire), arguments.combine_wire)
    if arguments.routing not in DISTRIBUTIONS:
        load_recorded(arguments.routing, geometry)  # its errors are worth one process, not W
    quick = arguments.quick
    effort = Effort(
        arguments.iters or (5 if quick else 30),
        (0.02 if quick else 0.5) if arguments.seconds is None else arguments.seconds,
        2 if quick else 5,
    )
    tokens = tuple(arguments.tokens or (_QUICK_TOKENS if quick else _USUAL_TOKENS))
    sweep = Sweep(
        geometry, ranks, tokens, wires, arguments.combine_wire, names, arguments.routing,
        arguments.seed, not arguments.no_rivals, effort, arguments.pin,
    )  # fmt: skip
    return sweep, skipped


def _wires(wanted: Sequence[str]) -> tuple[str, ...]:
    wires = tuple(FORMATS) if list(wanted) == ["all"] else tuple(dict.fromkeys(wanted))
    for wire in wires:
        if wire not in FORMATS:
            raise UsageError(f"--wire {wire}: expected all, or some of {', '.join(FORMATS)}")
    return wires


def _host_overhead(geometry: Geometry, names: tuple[str, ...], wanted: Sequence[str]) -> None:
    from moe_a2a.bench.overhead import print_host_overhead

    wires, skipped = fitting_wires(geometry, 1, _wires(wanted), "bf16")
    for reason in skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    for wire in wires:
        if len(wires) > 1:
            print(f"wire {wire}")
        print_host_overhead(geometry, names, wire)
