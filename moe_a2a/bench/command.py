"""``bench``: from the arguments to the table, the JSON and the figure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_a2a import backends
from moe_a2a.bench.cases import Effort, Sweep, UsageError, fitting_wires
from moe_a2a.bench.connect import gpu_count
from moe_a2a.bench.launch import join_torchrun, start_ranks, torchrun_place
from moe_a2a.bench.layer import layer_sweep
from moe_a2a.bench.layer_report import layer_document, layer_panels, print_layers
from moe_a2a.bench.points import run_points
from moe_a2a.bench.progress import Display
from moe_a2a.bench.report import as_document, print_results, write_json
from moe_a2a.bench.routing import DISTRIBUTIONS, load_recorded
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from moe_a2a.bench.cases import Geometry
    from moe_a2a.bench.events import Tell
    from moe_a2a.bench.layer import LayerSweep

__all__ = ["bench", "replot", "run_sweeps"]

_USUAL_TOKENS, _QUICK_TOKENS = (1, 8, 32, 128, 512), (1, 16)
_GPU_TOKENS, _GPU_REPLAYS = (1, 8, 32, 64, 128, 512, 1024, 4096), 50
_LAYER_TOKENS: dict[str, tuple[int, ...]] = {"cpu": (8, 32, 128), "cuda": (1, 32, 512, 4096)}
_USUAL_RANKS = 2


def bench(arguments: argparse.Namespace, geometry: Geometry, argv: Sequence[str]) -> None:
    """Runs what the arguments say.

    Raises:
        UsageError: a wrong argument.
        RankFailed: a rank gave up, or died.
    """
    _refuse_unused(arguments)
    place = torchrun_place()
    first = place is None or place[0] == 0
    device = _device(arguments)
    names = _backends(arguments.backend, device)
    if arguments.host_overhead:
        if first:
            _host_overhead(geometry, names, arguments.wire)
        return
    sweep, skipped = _sweep(arguments, geometry, names, place, device)
    with Display() as display:
        if first:
            for reason in skipped.values():
                print(f"skipped: {reason}", file=sys.stderr)
        _writable(arguments.out)
        sweep.spec(sweep.wires[0]).workspace()  # compiles once, before ranks wait for each other
        layers = layer_sweep(sweep, arguments) if arguments.layer else None
        if layers is None:
            run_sweeps((sweep,), display.show)
        else:
            _run_layers(layers, display.show)
    if display.results is None:
        return
    from moe_a2a.bench.machine import circumstances

    cases, facts = display.results.cases, {**circumstances(argv), **(display.results.facts or {})}
    if layers is None:
        document = as_document(sweep, cases, facts, skipped)
        print_results(document)
    else:
        document = layer_document(layers, cases, facts, skipped)
        print_layers(document)
    path = write_json(document, Path(arguments.out))
    print(path)
    if not arguments.no_plot:
        _plot(document, path.with_suffix(".png"))


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Whoever gives an argument counts on its effect."""
    if arguments.layer and arguments.host_overhead:
        raise UsageError("--layer and --host-overhead: give one of the two")
    for name in ("weights", "intermediate", "expert_backend"):
        if getattr(arguments, name) is not None and not arguments.layer:
            raise UsageError(f"--{name.replace('_', '-')} is of experts: only with --layer")


def run_sweeps(sweeps: tuple[Sweep, ...], show: Tell, seconds: float | None = None) -> None:
    """Runs sweeps of one device on its ranks: torchrun's, else processes of our own.

    ``seconds``: on GPUs, after which no further point begins.

    Raises:
        RankFailed: a rank gave up, or died.
    """
    start = start_ranks if torchrun_place() is None else join_torchrun
    if sweeps[0].device == "cuda":
        from moe_a2a.bench.device_points import Programme, run_programme

        start(run_programme, Programme(sweeps, seconds), show)
        return
    for sweep in sweeps:
        start(run_points, sweep, show)


def _run_layers(sweep: LayerSweep, show: Tell) -> None:
    from moe_a2a.bench.layer_points import run_layers

    start = start_ranks if torchrun_place() is None else join_torchrun
    start(run_layers, sweep, show)


def _device(arguments: argparse.Namespace) -> str:
    """Where tensors live: what was asked for, else where the backends that were asked for work."""
    if arguments.device is not None:
        return str(arguments.device)
    known = [name for name in arguments.backend or () if name in backends.BACKENDS]
    only_cuda = known and all("cpu" not in backends.load(name).device_types for name in known)
    return "cuda" if only_cuda else "cpu"


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
    from moe_a2a.bench.plot import draw, write_plot

    try:
        if document.get("bench") == "layer":
            draw(*layer_panels(document), "us", path)
        else:
            write_plot(document, path)
    except ImportError:
        print("no figure without matplotlib: pip install 'moe-a2a[bench]'", file=sys.stderr)
    else:
        print(path)


def _backends(wanted: Sequence[str] | None, device: str) -> tuple[str, ...]:
    """Those asked for, else all that are usable with tensors on the device."""
    if wanted is not None:
        for name in wanted:
            if name not in backends.BACKENDS:
                raise UsageError(
                    f"--backend {name}: no such backend; there are {', '.join(backends.BACKENDS)}"
                )
        reasons = backends.reasons(tuple(wanted), device)
        for name, reason in reasons.items():
            if reason is not None:
                raise UsageError(f"--backend {name} can't be used here: {reason}")
        return tuple(wanted)
    reasons = backends.reasons(tuple(backends.BACKENDS), device)
    usable = tuple(name for name, reason in reasons.items() if reason is None)
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(f"no backend is usable here: {listed}")
    return usable


def _sweep(
    arguments: argparse.Namespace,
    geometry: Geometry,
    names: tuple[str, ...],
    place: tuple[int, int] | None,
    device: str,
) -> tuple[Sweep, dict[str, str]]:
    ranks = arguments.ranks
    if place is not None:
        if ranks not in (None, place[1]):
            raise UsageError(f"--ranks {ranks}, and torchrun has started {place[1]}")
        ranks = place[1]
    if ranks is None:
        ranks = max(gpu_count(), 1) if device == "cuda" else _USUAL_RANKS
    if arguments.pin and device == "cuda":
        raise UsageError("--pin is for ranks on the CPU")
    cores = len(os.sched_getaffinity(0))
    if arguments.pin and ranks > cores:
        raise UsageError(f"--pin with {ranks} ranks: each needs a core, and there are {cores}")
    wires, skipped = fitting_wires(geometry, ranks, _wires(arguments.wire), arguments.combine_wire)
    if arguments.routing not in DISTRIBUTIONS:
        load_recorded(arguments.routing, geometry)  # its errors are worth one process, not W
    sweep = Sweep(
        geometry, ranks, _tokens(arguments, device), wires, arguments.combine_wire, names,
        arguments.routing, arguments.seed, not arguments.no_rivals, _effort(arguments, device),
        arguments.pin, device, arguments.pairs, arguments.max_blocks,
    )  # fmt: skip
    return sweep, skipped


def _tokens(arguments: argparse.Namespace, device: str) -> tuple[int, ...]:
    usual: tuple[int, ...] = _GPU_TOKENS if device == "cuda" else _USUAL_TOKENS
    usual = _LAYER_TOKENS[device] if arguments.layer else usual
    return tuple(arguments.tokens or (_QUICK_TOKENS if arguments.quick else usual))


def _effort(arguments: argparse.Namespace, device: str) -> Effort:
    if device == "cuda":  # iterations are replays of a graph; their number is what is promised
        return Effort(arguments.iters or (_GPU_REPLAYS if arguments.quick else 100), 0.0, 5)
    quick = arguments.quick
    return Effort(
        arguments.iters or (5 if quick else 30),
        (0.02 if quick else 0.5) if arguments.seconds is None else arguments.seconds,
        2 if quick else 5,
    )


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
