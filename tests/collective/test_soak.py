"""The soak, for seconds; and that it notices what it is there for."""

from __future__ import annotations

import pytest

from tests.collective.rounds import Case
from tests.faults.episode import Act, Episode, Tally
from tests.soak import ledger
from tests.soak.ledger import Ledger
from tests.soak.run import Fault, Soak


@pytest.mark.slow
def test_a_short_soak(crew):
    soak = Soak(2308, "cpu", ranks=4, quiet=True, crew=crew)
    try:
        soak.run(0, episodes=1)
    finally:
        soak.close()
    assert soak.ledger.rounds > 50
    assert soak.ledger.faults >= 2
    assert "faults survived" in soak.ledger.table()
    assert f"{soak.ledger.rounds} rounds" in soak.ledger.line()


def test_what_grows_is_a_leak():
    book = Ledger(1)
    for count in range(3 * ledger.SETTLING):
        book.held[1].append((5 << 20, 20))
        book.held[2].append((5 << 20, 20 + 2 * count))
        assert count == 3 * ledger.SETTLING - 1 or book.leak() is None
    assert "process 2" in (book.leak() or "")
    book.held[2].clear()
    book.held[3] = [((5 + 3 * count) << 20, 20) for count in range(3 * ledger.SETTLING)]
    assert "process 3" in (book.leak() or "")
    assert "2 processes" in book.table()


def test_a_timeout_without_a_reason_is_a_fault(crew):
    soak = Soak(1, "cpu", ranks=2, quiet=True, crew=crew)
    try:
        soak._pulse.end()
        episode = Episode(Case(2), (Act(),), limit=0.4)
        for starved, text in ((0.3, "a healthy round"), (0.0, "open on rank 1")):
            soak._pulse.longest = 0.0
            assert soak._judge_stalls(episode, [Tally(stalled=text, starved=starved), Tally()])
        with pytest.raises(Fault, match="a healthy round"):
            soak._judge_stalls(episode, [Tally(stalled="a healthy round", starved=0.1), Tally()])
        assert not soak._judge_stalls(episode, [Tally(starved=3.0), Tally()])
    finally:
        soak.close()
