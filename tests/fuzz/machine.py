"""A hypothesis state machine over whole sessions of real rank processes: what each step must come
to, by docs/design.md alone.

A rank is `idle` or `dispatched`; `failed` after a PeerTimeout or a disagreement, when every call
raises the same until a reset; or `out`: left behind by the others, so that only a reset over all
ranks promises anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.collective.rounds import Case, Round
from tests.collective.test_random_rounds import cases, fits, round_of
from tests.fuzz.session import Answer, step

if TYPE_CHECKING:
    from collections import Counter

    from moe_a2a.testing import RankPool

IMPATIENT = 1.0  # seconds: enough for ranks that all come, also on a busy machine
PATIENT = 10.0
GRACE = 0.5  # seconds that a rank whose wait is over listens to others
SUBSETS = st.integers(1, 6)


class Sessions(RuleBasedStateMachine):
    """`make(pool, lateness)` gives a class for one pool; `tally` is of all its runs."""

    pool: ClassVar[RankPool]
    lateness: ClassVar[bool] = False  # whether ranks may fail to come, which takes seconds
    tally: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.case: Case | None = None  # None: closed
        self.size, self.backend, self.patient = 2, "shm", True
        self.state: list[str] = []
        self.said: dict[int, str] = {}  # what a failed rank raised
        self.active: tuple[bool, ...] = ()

    # ---- the steps -------------------------------------------------------------------------

    @initialize(data=st.data())
    def open_first(self, data: Any) -> None:
        self.open(data)

    @precondition(lambda self: self.case is None)
    @rule(data=st.data())
    def open(self, data: Any) -> None:
        case = data.draw(cases((2, 3)).filter(fits))
        self.size = case.size
        self.patient = not (self.lateness and data.draw(st.integers(0, 3)) == 3)
        self.backend = data.draw(st.sampled_from(("shm", "shm", "collective")))
        self._order([self._opening(case, {})] * case.size, "")
        self.case, self.active = case, (True,) * case.size
        self.state, self.said = ["idle"] * case.size, {}
        self.tally["sessions"] += 1

    @precondition(lambda self: self.case is None)
    @rule(data=st.data())
    def open_wrongly(self, data: Any) -> None:
        """One rank is wrong, or differs: all hear of it, and nobody waits."""
        case = data.draw(cases((2, 3)).filter(fits))
        self.size = case.size
        other = Case(case.size, case.experts, case.top_k, case.hidden, case.capacity + 1)
        change = data.draw(
            st.sampled_from(
                (
                    *({"timeout": -1}, {"backend": 3}, {"debug": "x"}, {"max_blocks": 0}),
                    *({"device": "cpu:x"}, {"spec": None}, {"spec": other.spec()}),
                    *({"debug": True}, {"backend": "auto"}),
                )
            )
        )
        self.backend = data.draw(st.sampled_from(("shm", "collective")))
        orders = [self._opening(case, {}) for _ in range(case.size)]
        orders[data.draw(st.integers(0, case.size - 1))] = self._opening(case, change)
        self._order(orders, "GeometryError")

    def _opening(self, case: Case, change: dict[str, Any]) -> tuple[Any, ...]:
        return ("open", case, self.backend, PATIENT if self.patient else IMPATIENT, dict(change))

    @precondition(lambda self: self._all("idle"))
    @rule(data=st.data(), count=st.integers(1, 4), seed=st.integers(0, 2**20))
    def rounds(self, data: Any, count: int, seed: int) -> None:
        """Whole ones, since two rules in a row are seldom the right two."""
        for number in range(count):
            self.dispatch(data)
            if seed % 3 == 0:
                self.bad_calls(seed + number, seed % 7, 1 + seed % 5)
            self.combine()

    @precondition(lambda self: self._all("idle"))
    @rule(data=st.data())
    def dispatch(self, data: Any) -> None:
        assert self.case is not None
        rnd = data.draw(round_of(self.case))
        fewer = self.active
        if data.draw(st.integers(0, 9)) == 9 and sum(self.active) > 1:
            fewer = self._without(data.draw(SUBSETS))
        rnd = Round(**{**rnd.__dict__, "active": fewer})
        says = fewer != self.active or data.draw(st.booleans())
        self._each(lambda rank: ("dispatch", rnd, says), members=fewer, state="dispatched")
        left = [r for r in range(self.size) if self.active[r] and not fewer[r]]
        for rank in left:
            self.state[rank] = "out"
        self.active = fewer

    @precondition(lambda self: self._all("dispatched"))
    @rule()
    def combine(self) -> None:
        self._each(lambda rank: ("combine",), members=self.active, state="idle")
        self.tally["rounds"] += 1

    @precondition(lambda self: self._all("idle") or self._all("dispatched"))
    @rule(seed=st.integers(0, 2**20), some=SUBSETS, count=st.integers(1, 12))
    def bad_calls(self, seed: int, some: int, count: int) -> None:
        here = [self.active[r] and bool(some >> r & 1) for r in range(self.size)]
        self._each(lambda rank: ("bad_calls", seed + rank, count), members=tuple(here))
        self.tally["bad calls"] += count * sum(here)

    @precondition(lambda self: self._all("idle") and sum(self.active) > 1)
    @rule(odd=st.integers(0, 2), seed=st.integers(0, 99))
    def disagree(self, odd: int, seed: int) -> None:
        """One rank has another R: every rank raises, at once, and nothing is misplaced."""
        assert self.case is not None
        members = [rank for rank in range(self.size) if self.active[rank]]
        other = members[odd % len(members)]
        both = [Round(seed, tokens=(0,), rows=n, active=self.active) for n in (1, 0)]
        orders = [
            ("dispatch", both[rank == other], False) if rank in members else ("rest",)
            for rank in range(self.size)
        ]
        for rank, answer in self._order(orders, None):
            if rank in members:
                assert (answer.error, "disagree" in answer.text) == ("StateError", True), answer
                self._fail(rank, answer)
        self.tally["disagreements"] += 1
        self.call_after_failure(seed)

    @precondition(lambda self: self.said)
    @rule(which=st.integers(0, 9))
    def call_after_failure(self, which: int) -> None:
        orders = [("again", which) if rank in self.said else ("rest",) for rank in range(self.size)]
        for rank, answer in self._order(orders, None):
            if rank in self.said:
                assert answer.text == self.said[rank], (answer, self.said[rank])
        self.tally["calls after a failure"] += len(self.said)

    @precondition(lambda self: self.case is not None)
    @rule(say=st.booleans())
    def reset(self, say: bool) -> None:
        everyone = (True,) * self.size
        self.active = everyone
        flags = everyone if say else None
        self._each(lambda rank: ("reset", flags), members=everyone, state="idle")
        self.said.clear()
        self.tally["resets"] += 1

    @precondition(lambda self: self.case is not None and self.backend == "shm")
    @rule(some=SUBSETS)
    def reset_of_some(self, some: int) -> None:
        self.active = (True,) * self.size
        members = self._without(some)
        self._each(lambda rank: ("reset", members), members=members, state="idle")
        for rank in range(self.size):
            if members[rank]:
                self.said.pop(rank, None)
            elif self.state[rank] != "failed":
                self.state[rank] = "out"
        self.active = members
        self.tally["resets of some"] += 1

    @precondition(lambda self: self.case is not None)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        self._order([("close",)] * self.size, "")
        self._order([("again", which)] * self.size, None if self.said else "StateError")
        self.case = None
        self.said.clear()

    # ---- ranks that do not come --------------------------------------------------------------

    def _may_wait(self) -> bool:
        return self.case is not None and not self.patient

    @precondition(lambda self: self._may_wait() and sum(self.active) > 1)
    @precondition(lambda self: self._all("idle") or self._all("dispatched"))
    @rule(some=SUBSETS, comes=st.booleans())
    def late(self, some: int, comes: bool) -> None:
        """Some ranks stay away from the next operation; they may come when it is too late."""
        phase = "dispatch" if self._all("idle") else "combine"
        rnd = Round(some, tokens=(1,), active=self.active)
        order: tuple[Any, ...] = ("dispatch", rnd, False) if phase == "dispatch" else ("combine",)
        there = self._without(some)
        away = [r for r in range(self.size) if self.active[r] and not there[r]]
        orders = [order if here else ("rest",) for here in there]
        for rank, answer in self._order(orders, None):
            if there[rank]:
                self._timed_out(answer, away, phase)
                self._fail(rank, answer)
        if comes:
            orders = [order if rank in away else ("rest",) for rank in range(self.size)]
            for rank, answer in self._order(orders, None):
                assert answer.error in ("", "PeerTimeout", "StateError"), answer
                if rank in away and answer.error:
                    self._fail(rank, answer)
        for rank in away:
            if rank not in self.said:
                self.state[rank] = "out"
        self.tally["timeouts"] += 1

    @precondition(lambda self: self._may_wait())
    @rule(some=SUBSETS)
    def late_for_a_reset(self, some: int) -> None:
        self.active = (True,) * self.size
        there = self._without(some)
        away = [rank for rank in range(self.size) if not there[rank]]
        orders = [("reset", None) if here else ("rest",) for here in there]
        for rank, answer in self._order(orders, None):
            if there[rank]:
                self._timed_out(answer, away, "reset")
                self._fail(rank, answer)
            elif self.state[rank] != "failed":
                self.state[rank] = "out"
        self.tally["timeouts"] += 1

    @precondition(lambda self: self._may_wait() and "out" in self.state and self.backend == "shm")
    @rule(which=st.integers(0, 9))
    def one_left_out_calls(self, which: int) -> None:
        """It must not harm those that went on; later rounds of theirs are compared as ever."""
        rank = self.state.index("out")
        orders: list[tuple[Any, ...]] = [("rest",)] * self.size
        orders[rank] = ("again", which)
        answer = self._order(orders, None)[rank][1]
        assert answer.error in ("", "PeerTimeout", "StateError", "PayloadError"), answer
        self.tally["calls of ranks left out"] += 1

    def _timed_out(self, answer: Answer, away: list[int], phase: str) -> None:
        assert answer.error == "PeerTimeout", answer
        assert answer.failed_in == phase, answer
        assert answer.ranks, answer
        assert set(answer.ranks) <= set(away), (answer, away)
        # A rank that gave up on an earlier reset over the same ranks counts as one that called it.
        if self.backend == "shm" and phase != "reset":
            assert list(answer.ranks) == away, (answer, away)

    # ---- what all of them need ---------------------------------------------------------------

    def _all(self, state: str) -> bool:
        """Whether every active rank is in that state."""
        if self.case is None:
            return False
        return all(self.state[r] == state for r in range(self.size) if self.active[r])

    def _without(self, some: int) -> tuple[bool, ...]:
        """Active ranks without some of them: never all of them, never none."""
        members = [rank for rank in range(self.size) if self.active[rank]]
        left = {members[some % len(members)]}
        if some > 3 and len(members) > 2:
            left.add(members[(some + 1) % len(members)])
        return tuple(self.active[rank] and rank not in left for rank in range(self.size))

    def _fail(self, rank: int, answer: Answer) -> None:
        self.state[rank], self.said[rank] = "failed", answer.text

    def _each(self, order: Any, *, members: tuple[bool, ...], state: str | None = None) -> None:
        """An order for some, which goes well; their state after it."""
        orders = [order(rank) if members[rank] else ("rest",) for rank in range(self.size)]
        for rank, answer in self._order(orders, ""):
            if members[rank]:
                self.state[rank] = self.state[rank] if state is None else state
                assert answer.phase == self.state[rank], answer

    def _order(self, orders: list[Any], error: str | None) -> list[tuple[int, Answer]]:
        """The answers; all of them have `error`, unless that is None."""
        answers = self.pool.run(step, orders, ranks=self.size)
        for answer in answers:
            assert error is None or answer.error == error, answer
            self.tally["bytes"] += answer.checked
        self.tally["steps"] += 1
        return list(enumerate(answers))

    def teardown(self) -> None:
        if self.case is not None:
            self.pool.run(step, [("close",)] * self.size, ranks=self.size)


def sessions_of(pool: RankPool, *, lateness: bool, tally: Counter[str]) -> type[Sessions]:
    return type("SessionsOf", (Sessions,), {"pool": pool, "lateness": lateness, "tally": tally})
