"""Random episodes: geometry, wires, routing, delays, and who is lost where."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moe_a2a.spec import COMBINE_WIRES
from tests.collective.rounds import Case, Round
from tests.faults.episode import Act, Episode
from tests.faults.strike import INSIDE, Strike
from tests.oracle_formats import WIRES

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from tests.soak.places import Place

GRACE = 0.5  # that ranks give each other once a wait has expired


def fits(case: Case) -> bool:
    try:
        case.spec()
    except ValueError:
        return False
    return True


def case_of(rng: random.Random, size: int) -> Case:
    """Small rows, so that the oracle is quick: many rounds find more than many bytes."""
    while True:
        experts = rng.randint(1, 3 * size + 2)
        more = {
            "scrub": rng.choice(("ids", "all")),
            "alignment": rng.choice((32, 96, 256)),
            "invalid_expert_id": rng.choice((-1, experts, -9)),
            "allow_defer": rng.random() < 0.5,
            "extra": {name: rng.randint(1, 40) for name in "abc" if rng.random() < 0.3},
        }
        case = Case(
            size,
            experts,
            rng.randint(1, min(experts, 6)),
            rng.choice((16, 32, 64, 128, 160, 256)),
            rng.randint(1, 9),
            rng.choice(WIRES),
            rng.choice(COMBINE_WIRES),
            more,
        )
        if fits(case):
            return case


def round_of(rng: random.Random, case: Case) -> Round:
    rows = rng.randint(0, case.capacity)
    defer = case.more["allow_defer"] and rng.random() < 0.3
    sources = ("bf16",) if case.unquantized or defer else ("bf16", "fp16", "fp32", "wire")
    few = rng.random() < 0.3
    return Round(
        seed=rng.randrange(2**20),
        tokens=tuple(rng.randint(0, rows) for _ in range(case.size)) if few else None,
        rows=None if rng.random() < 0.1 else rows,
        routing=rng.choice(("random", "hot", "first", "nowhere", "duplicates", "invalid")),
        source=rng.choice(sources),
        output=rng.choice(("bf16", "fp16", "fp32")),
        wide_ids=rng.random() < 0.5,
        strided=rng.random() < 0.3,
        specials=rng.random() < 0.2,
        ones=rng.random() < 0.2,
        memory=rng.choice(("own", "buffer", "strided")),
        global_scale=3.0 if case.wire == "nvfp4" and rng.random() < 0.3 else None,
        defer=defer,
    )


def rounds_of(rng: random.Random, case: Case, least: int, most: int) -> tuple[Round, ...]:
    return tuple(round_of(rng, case) for _ in range(rng.randint(least, most)))


def strike_of(rng: random.Random, kind: str, limit: float) -> Strike:
    # From the first stores to long after them, when the call waits for those that come late.
    delay = 10 ** rng.uniform(-5, -1.5)
    # Long enough that the others have given up, also those whose wait began with another's end.
    return Strike(kind, delay, 3 * limit + GRACE + rng.uniform(0.0, 0.3) if kind == "sleep" else 0)


def act_of(
    rng: random.Random,
    case: Case,
    limit: float,
    alive: Sequence[int],
    mortal: Sequence[int],
    place: Place,
) -> Act:
    """Strikes some of `alive`, one is left at least; kills none but `mortal` ones."""
    count = min(rng.choice((1, 1, 1, 2, 3)), len(alive) - 1)
    point = rng.choice(place.points)
    strikes = {}
    for rank in rng.sample(list(alive), count):
        able = [kind for kind in place.kinds if kind != "kill" or rank in mortal]
        strikes[rank] = strike_of(rng, rng.choice(able), limit)
    back = any(strike.kind != "kill" for strike in strikes.values())
    apart = not back or (place.windows_move and rng.random() < 0.6)
    struck = (round_of(rng, case), round_of(rng, case))
    late = {}
    others = [rank for rank in alive if rank not in strikes]
    if point in INSIDE and rng.random() < 0.7:
        late = {rng.choice(others): rng.uniform(0, 0.3) * limit}
    return Act(
        rounds=rounds_of(rng, case, 5, place.most_rounds),
        point=point,
        strikes=strikes,
        struck=tuple(replace(rnd, tokens=None) for rnd in struck),
        late=late,
        apart=rounds_of(rng, case, 2, 12) if apart else (),
        together=rounds_of(rng, case, 1, 6),
    )


def episode_of(rng: random.Random, size: int, place: Place) -> Episode:
    """Some acts, until two ranks are left at the least."""
    case, limit = case_of(rng, size), rng.choice(place.limits)
    alive, acts = list(range(size)), []
    mortal = rng.sample(alive, size - place.elders)  # another choice each time, rank 0 too
    for _ in range(rng.randint(1, 4)):
        if len(alive) < 2:
            break
        acts.append(act_of(rng, case, limit, alive, mortal, place))
        alive = [rank for rank in alive if rank not in acts[-1].killed()]
    # Half of them count past 2^32, in the first rounds or later.
    epoch = 2**32 - rng.choice((2, 3, 10, 50, 150)) if rng.random() < 0.5 else None
    pause = rng.choice((0.0, 0.002, 0.02))
    return Episode(case, tuple(acts), place.backend, limit, place.slack, epoch, pause)
