"""Bad calls by the lot: on one open object, with right rounds in between that are held to the
oracle."""

from __future__ import annotations

import random
from collections import Counter

from moe_a2a.testing import RankContext
from tests.collective import rounds
from tests.collective.rounds import Case, Round
from tests.fuzz.bad_arguments import bad_format, bad_opening, bad_spec
from tests.fuzz.bad_calls import BadCalls, refused

ALONE = RankContext(0, 1, None, 0)
CASES = (
    (Case(1, 8, 2, 128, 4), "bf16"),
    (Case(1, 8, 1, 64, 4, "fp16", "fp32", {"extra": {"id": 3}}), "bf16"),
    (Case(1, 8, 1, 128, 4, "nvfp4", "mxfp8", {"allow_defer": True}), "bf16"),
    (Case(1, 8, 2, 160, 4, "nvfp4", "fp16"), "wire"),
    (Case(1, 5, 2, 128, 4, "fp8", "fp32", {"extra": {"a": 3, "b": 1}}), "fp32"),
    (Case(1, 5, 3, 128, 5, "mxfp4", "fp8_block128"), "wire"),
    (Case(1, 3, 2, 32, 3, "mxfp8", "bf16", {"alignment": 96, "scrub": "all"}), "fp16"),
    (Case(1, 3, 1, 256, 2, "fp8_block128", "mxfp8"), "wire"),
)
BETWEEN_ROUNDS = 20


def on_an_object(seed: int, backend: str, count: int) -> Counter[str]:
    """`count` bad calls on one object; the errors by name, and the "rounds" in between."""
    rng = random.Random(seed)
    case, source = rng.choice(CASES)
    seen: Counter[str] = Counter()
    with rounds.opened(ALONE, backend, case) as a2a:
        for number in range(count):
            if number % BETWEEN_ROUNDS == 0:
                rnd = Round(rng.randrange(2**20), source=source, rows=case.capacity)
                calls = BadCalls(a2a, case, rnd, 0)
                _right_round(a2a, case, rnd, calls, seen)
            before = a2a.phase
            call = calls.call(rng.randrange(2**32))
            where = f"seed {seed}, call {number} ({backend}, {case})"
            try:
                seen[refused(call)] += 1
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            assert a2a.phase == before, f"{where}: {call.what} left it in phase {a2a.phase}"
        _right_round(a2a, case, rnd, calls, seen)
    return seen


def _right_round(a2a, case: Case, rnd: Round, calls: BadCalls, seen: Counter[str]) -> None:
    """To the end of the one under way, a whole one, and every second time the half of one more."""
    if a2a.phase == "dispatched":
        _combine(a2a, calls)
    rounds.play(a2a, ALONE, case, rnd)
    calls.memory = a2a.dispatch(**calls.good).x
    _combine(a2a, calls)
    seen["rounds"] += 1
    if seen["rounds"] % 2 == 0:
        a2a.dispatch(**calls.good)


def _combine(a2a, calls: BadCalls) -> None:
    """With an out of the caller's: the next one like it takes the short way past the rules."""
    y, out = calls.outputs()
    a2a.combine(y, out=out)


def without_an_object(seed: int, count: int) -> Counter[str]:
    """Spec, AllToAll, and the functions of moe_a2a.formats."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(count):
        make = rng.choice((bad_spec, bad_opening, bad_format))
        call = make(random.Random(rng.randrange(2**32)))
        try:
            seen[refused(call)] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, call {number}: {error}") from error
    return seen
