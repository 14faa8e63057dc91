"""One rank's end of a session: an object that lives from step to step in a process of the pool, and
does what it is ordered to.

An order is a tuple, its name first; `step` gets one for each rank. Bytes are compared here, with
the oracle; what an order came to goes back to the machine, which knows what was to be expected.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_a2a import AllToAll, Received
from moe_a2a.errors import MoeA2AError, PeerTimeout
from tests.collective import rounds
from tests.collective.rounds import Case, Round
from tests.fuzz.bad_calls import BadCalls, refused

if TYPE_CHECKING:
    from moe_a2a.testing import RankContext


class Answer(NamedTuple):
    """`error` is a class name, "" where all went well; `checked` counts bytes."""

    error: str
    phase: str
    text: str = ""
    ranks: tuple[int, ...] = ()
    failed_in: str = ""  # phase of a PeerTimeout
    checked: int = 0


class Session:
    def __init__(self, ranks: RankContext) -> None:
        self.ranks = ranks
        self.a2a: AllToAll | None = None
        self.case = Case(1)
        self.rnd = Round()
        self.recv: Received | None = None

    def open(self, case: Case, backend: str, timeout: float, change: dict[str, Any]) -> int:
        spec = change.pop("spec", case.spec())
        arguments = {"backend": backend, "timeout": timeout, **change}
        self.a2a = None
        self.a2a = AllToAll(spec, self.ranks.group, **arguments)
        self.case, self.recv = case, None
        assert self.a2a.backend == backend
        return 0

    def dispatch(self, rnd: Round, says_active: bool) -> int:
        """`says_active`: the active ranks are an argument, else those of the round before."""
        assert self.a2a is not None
        self.rnd, case, rank = rnd, self.case, self.ranks.rank
        tokens = [rounds.tokens_of(case, rnd, peer) for peer in range(case.size)]
        call = rounds.call_of(case, rnd, tokens[rank], self.a2a.device)
        self.a2a.check()
        if not says_active:
            call.pop("active_ranks", None)
        self.recv = recv = self.a2a.dispatch(**call)
        assert self.a2a.round_tokens == len(tokens[rank].ids)
        rounds.check_delivery(case, rnd, recv, rounds.expected(case, rnd, rank, tokens))
        arrived = (recv.x, recv.scales, recv.topk_ids, recv.topk_weights, *recv.extra.values())
        return sum(t.nbytes for t in arrived if t is not None)

    def combine(self) -> int:
        assert self.a2a is not None
        assert self.recv is not None
        case, rnd, rank = self.case, self.rnd, self.ranks.rank
        mine = rounds.tokens_of(case, rnd, rank)
        y = rounds.experts(self.a2a, case, rnd, rank, self.recv)
        out = None
        if rnd.memory == "strided":
            out = rounds.placed(torch.full((len(mine.x), case.hidden), 5.0, dtype=y.dtype), True)
        elif rnd.seed % 2:
            out = torch.full((len(mine.x), case.hidden), 5.0, dtype=y.dtype)
        result = self.a2a.combine(y, out=out)
        rounds.same_values("combine", result, rounds.sums_of(case, rnd, rank, mine))
        return result.nbytes

    def bad_calls(self, seed: int, count: int) -> int:
        """Each is refused, and the object stays as it is."""
        assert self.a2a is not None
        before, rnd = self.a2a.phase, Round(seed, source="bf16")
        if before == "dispatched":
            rnd = Round(seed, rows=self.rnd.rows)
        calls = BadCalls(self.a2a, self.case, rnd, self.ranks.rank)
        # Views of a window that a reset has left are memory like any other.
        calls.memory = self.recv.x if self.recv is not None else None
        warnings.simplefilter("ignore")  # torch's, about the odd tensors
        for number in range(count):
            refused(calls.call(seed * 1000 + number))
            assert self.a2a.phase == before, f"bad call {number} left phase {self.a2a.phase}"
        return 0

    def again(self, which: int) -> int:
        """Any call at all, with arguments that are right for some round."""
        assert self.a2a is not None
        rnd = Round(which, tokens=(0,))
        mine = rounds.tokens_of(self.case, rnd, self.ranks.rank)
        y = torch.zeros(self.case.size, self.case.capacity, self.case.hidden)
        calls = (
            lambda: self.a2a.dispatch(**rounds.call_of(self.case, rnd, mine, torch.device("cpu"))),
            lambda: self.a2a.combine(y),
            lambda: self.a2a.combine_buffer(),
            lambda: self.a2a.check(),
            lambda: self.a2a.dispatch(None, None, None),
        )
        calls[which % len(calls)]()
        return 0

    def reset(self, active: tuple[bool, ...] | None) -> int:
        assert self.a2a is not None
        self.recv = None
        self.a2a.reset(None if active is None else torch.tensor(active))
        return 0

    def close(self) -> int:
        if self.a2a is not None:
            self.a2a.close()
            self.a2a.close()
        return 0

    def rest(self) -> int:
        return 0


_session: Session | None = None


def step(ranks: RankContext, orders: list[tuple[Any, ...]]) -> Answer:
    """A rank function: the order of this rank."""
    global _session
    if _session is None or _session.ranks.size != ranks.size:
        _session = Session(ranks)
    name, *arguments = orders[ranks.rank]
    try:
        checked = getattr(_session, name)(*arguments)
    except PeerTimeout as error:
        return Answer("PeerTimeout", _phase(), str(error), error.ranks, error.phase)
    except MoeA2AError as error:
        return Answer(type(error).__name__, _phase(), str(error))
    return Answer("", _phase(), checked=checked)


def _phase() -> str:
    a2a = _session.a2a if _session is not None else None
    return "" if a2a is None else a2a.phase
