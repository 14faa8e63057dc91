"""The long run: `make fuzz MINUTES=10`, from another place each time.

    python -m tests.fuzz --minutes 10
    python -m tests.fuzz --seed 1234567 --minutes 0      # once more what a run has found

Bad calls come first (20,000 of them take some 20 s), then sessions of rank processes until the time
is over. Every lot and every batch of sessions has a seed of its own, which is printed before it
begins.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
import warnings
from collections import Counter

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from moe_a2a.testing import RankPool
from tests.conftest import CPU_BACKENDS, PRELOAD
from tests.fuzz.lots import on_an_object, without_an_object
from tests.fuzz.machine import sessions_of

BAD_CALLS = 20_000
LOT = 500
EVERY = 15  # seconds between lines
EXAMPLES, STEPS = 12, 30  # of a batch of sessions


def bad_calls(seed: int, wanted: int, tally: Counter[str]) -> None:
    numbers = random.Random(seed)
    while tally["bad calls"] < wanted:
        own = numbers.randrange(2**32)
        for backend in CPU_BACKENDS:
            seen = on_an_object(own, backend, LOT)
            tally["rounds"] += seen.pop("rounds")
            tally["bad calls"] += seen.total()
        tally["bad calls"] += without_an_object(own, LOT).total()


def sessions(seed: int, pool: RankPool, tally: Counter[str], shrink: bool) -> None:
    quick = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    machine = hypothesis.seed(seed)(sessions_of(pool, lateness=True, tally=tally))
    run_state_machine_as_test(machine, settings=quick)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    arguments.add_argument("--minutes", type=float, default=10.0)
    arguments.add_argument("--seed", type=int, help="of the first batch; else the clock's")
    arguments.add_argument("--bad-calls", type=int, default=BAD_CALLS)
    arguments.add_argument("--shrink", action="store_true", help="a failure to fewer steps")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    seed = given.seed if given.seed is not None else time.time_ns() % 2**31
    tally: Counter[str] = Counter()

    def say(what: str) -> None:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(tally.items()))
        print(
            f"[{time.monotonic() - start:6.1f} s] {what}; so far {counts or 'nothing'}", flush=True
        )

    def report() -> None:
        while True:
            time.sleep(EVERY)
            say("under way")

    threading.Thread(target=report, daemon=True).start()
    say(f"seed {seed}: bad calls")
    bad_calls(seed, given.bad_calls, tally)
    numbers = random.Random(seed)
    with RankPool(3, timeout=100.0, preload=PRELOAD) as pool:
        while True:
            say(f"seed {seed}: {EXAMPLES} sessions")
            sessions(seed, pool, tally, given.shrink)
            if time.monotonic() - start > given.minutes * 60:
                break
            seed = numbers.randrange(2**31)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
