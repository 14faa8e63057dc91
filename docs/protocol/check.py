"""Runs the model of the protocol through spin: every configuration, or those that take seconds.

    python docs/protocol/check.py                  all, W = 3 among them
    python docs/protocol/check.py --quick          W = 2, under two minutes
    python docs/protocol/check.py faults --trail   those with this in their names, and what failed

README.md says what the model stands for. Exits with 1 where a verdict is not the expected one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# What a run can break. The first five stand in the assertions themselves (memory.pml).
PROPERTIES = (
    "read_before_written",
    "overwritten_before_read",
    "header_of_another_operation",
    "excluded_without_reset",
    "excluded_unnoticed",
    "never_through",  # the canary: false in every model that gets anywhere
)
NEVER_ENDS, CYCLE = "never_ends", "cycle"
_MEMORY_MIB = 12_000


class CheckError(Exception):
    """There is no verdict: a tool is missing, or the model does not compile or does not fit."""


@dataclass(frozen=True)
class Configuration:
    """One model. ``defines``: names that the sources look at, as ``NAME`` or ``NAME=value``."""

    name: str
    defines: str
    quick: bool = False
    source: str = "nvlink"
    expects: str | None = None  # the property that is known not to hold
    cycles: bool = False  # looks for runs without an end, in place of the other properties


@dataclass(frozen=True)
class Outcome:
    violates: str | None
    states: int
    seconds: float
    memory_mib: float
    trail: str = ""


_FAULTS = "LINES FAULTS ROUNDS=1 SILENCES=0"
_WRAP = "EPOCHS=4 FIRST=3"

CONFIGURATIONS = (
    Configuration("packets and bulk, lines", "LINES CHUNKS=2", quick=True),
    Configuration("packets and bulk, strict", "STRICT CHUNKS=2", quick=True),
    Configuration("packets, strict", "STRICT ONLY_PACKETS CHUNKS=2", quick=True),
    Configuration("bulk, strict", "STRICT ONLY_BULK CHUNKS=2", quick=True),
    Configuration("three rounds", "LINES ROUNDS=3", quick=True),
    Configuration("wrap-around", f"LINES STALE ROUNDS=3 {_WRAP}", quick=True),
    Configuration("no run without an end", "LINES", quick=True, cycles=True),
    Configuration("faults: slow ranks, reset", _FAULTS, quick=True),
    Configuration(
        "faults: a rank stops, reset without it", f"{_FAULTS} STOPS PATIENT ROWS_GROW", quick=True
    ),
    Configuration(
        "faults: wrap-around while waits give up", f"{_FAULTS} EPOCHS=4 FIRST=4", quick=True
    ),
    Configuration("shm", "ROUNDS=3 CHUNKS=2", quick=True, source="shm"),
    Configuration("shm: wrap-around", f"ROUNDS=3 {_WRAP}", quick=True, source="shm"),
    Configuration("shm: three ranks", "W=3", quick=True, source="shm"),
    Configuration("faults: strict", "STRICT FAULTS ROUNDS=1 SILENCES=0"),
    Configuration("faults: two rounds before", "LINES FAULTS SILENCES=0"),
    Configuration("faults: a rank stops, others slow", f"{_FAULTS} STOPS"),
    Configuration("faults: one more block gives up", f"{_FAULTS} ONLY_BULK THIRD_BLOCK"),
    Configuration("faults: an excluded rank lives on", f"{_FAULTS} ONLY_PACKETS EXCLUDE"),
    Configuration(
        "faults: an excluded rank lives on, bulk (known)",
        f"{_FAULTS} ONLY_BULK EXCLUDE",
        expects="overwritten_before_read",
    ),
    Configuration(
        "faults: an excluded rank has wrapped",
        f"{_FAULTS} ONLY_PACKETS EXCLUDE ROWS_GROW EPOCHS=4 FIRST=4",
    ),
    Configuration("faults: no run without an end", f"{_FAULTS} ROWS_GROW", cycles=True),
    Configuration("three ranks, packets", "W=3 LINES ONLY_PACKETS SILENCES=0 ROWS_GROW"),
    Configuration("three ranks, packets and bulk, lines", "W=3 LINES AT_ONCE"),
    Configuration("three ranks, packets and bulk, strict", "W=3 STRICT AT_ONCE"),
    Configuration("three ranks, three rounds", "W=3 LINES AT_ONCE SILENCES=0 ROUNDS=3"),
    Configuration(
        "three ranks, wrap-around", f"W=3 LINES AT_ONCE SILENCES=0 ROUNDS=3 STALE {_WRAP}"
    ),
)


def _tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise CheckError(f"{name} is not installed: apt-get install {package}")
    return path


def _run(command: list[str], directory: Path, limit: float) -> str:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"no verdict after {limit:g} s: {' '.join(command)}") from None
    return done.stdout + done.stderr


def _generate(
    spin: str, gcc: str, optimize: str, model: Configuration, defines: list[str], to: Path
) -> None:
    said = _run([spin, "-a", *defines, str(HERE / f"{model.source}.pml")], to, 60)
    # spin goes on after a syntax error, with less of a model.
    if "Error" in said or not (to / "pan.c").exists():
        raise CheckError(f"{model.name}: spin says\n{said}")
    kind = ["-DNP"] if model.cycles else ["-DSAFETY"]
    flags = [optimize, "-w", "-DCOLLAPSE", "-DVECTORSZ=2048", f"-DMEMLIM={_MEMORY_MIB}", *kind]
    said = _run([gcc, *flags, "-o", "pan", "pan.c"], to, 120)
    if not (to / "pan").exists():
        raise CheckError(f"{model.name}: gcc says\n{said}")


def _violated(said: str) -> str | None:
    found = re.search(r"pan:\d*: *(.*)", said)
    if "errors: 0" in said or found is None:
        return None
    if "invalid end state" in found[1]:
        return NEVER_ENDS
    if "non-progress cycle" in found[1]:
        return CYCLE
    return next((p for p in PROPERTIES if p in found[1]), found[1])


def check(
    model: Configuration, *, trail: bool = False, limit: float = 3600, optimize: str = "-O2"
) -> Outcome:
    """Explores all runs of ``model``, or ends at the first one that breaks a property.

    Args:
        trail: bring the steps of that run.
        limit: seconds.
        optimize: for gcc. A model of which a small part is looked at compiles longer than it runs.

    Raises:
        CheckError: spin or gcc is missing, or all runs were not explored.
    """
    spin, gcc = _tool("spin", "spin"), _tool("gcc", "gcc")
    defines = [f"-D{name}" for name in model.defines.split()]
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory)
        _generate(spin, gcc, optimize, model, defines, to)
        start = time.monotonic()
        said = _run(
            ["./pan", "-n", "-m20000", "-w20", *(["-l"] if model.cycles else [])], to, limit
        )
        seconds = time.monotonic() - start
        numbers = [
            re.search(pattern, said)
            for pattern in (r"([\d.e+]+) states, stored", r"([\d.]+)\s+total actual memory")
        ]
        violates = _violated(said)
        complete = "errors: 0" in said or violates is not None
        if not complete or "MEMLIM" in said or "too small" in said or None in numbers:
            raise CheckError(f"{model.name}: not all runs were explored\n{said[-2000:]}")
        steps = ""
        if trail and violates is not None:
            steps = _run([spin, "-t", "-p", *defines, str(HERE / f"{model.source}.pml")], to, 60)
        states, memory = (float(n[1]) for n in numbers if n is not None)
    return Outcome(violates, int(states), seconds, memory, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the model of the protocol.")
    parser.add_argument("names", nargs="*", help="parts of names of configurations")
    parser.add_argument("--quick", action="store_true", help="those that take seconds")
    parser.add_argument("--trail", action="store_true", help="print the run that broke a property")
    arguments = parser.parse_args()
    wanted = [
        c
        for c in CONFIGURATIONS
        if (c.quick or not arguments.quick)
        and (not arguments.names or any(name in c.name for name in arguments.names))
    ]
    wrong, start = 0, time.monotonic()
    for model in wanted:
        print(f"{model.name:<56}", end="", flush=True)
        try:
            outcome = check(model, trail=arguments.trail)
        except CheckError as error:
            print(f" no verdict\n{error}", file=sys.stderr)
            wrong += 1
            continue
        verdict = outcome.violates or "holds"
        if outcome.violates != model.expects:
            verdict += f", expected: {model.expects or 'holds'}"
            wrong += 1
        cost = f"{outcome.seconds:>7.1f} s {outcome.memory_mib:>6,.0f} MiB"
        print(f"{outcome.states:>12,} states {cost}  {verdict}", flush=True)
        if outcome.trail:
            print(outcome.trail)
    print(f"{len(wanted)} configurations, {time.monotonic() - start:.0f} s, {wrong} wrong")
    return 1 if wrong or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
