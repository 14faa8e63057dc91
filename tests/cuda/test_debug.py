"""``debug=True`` on a GPU: rounds stay right, the slow rank shows, graphs are noted too."""

from __future__ import annotations

import json
import time

import pytest

from tests.collective.places import meet, place_of
from tests.collective.rounds import Case, Round, opened
from tests.cuda.playing import in_turn, run_streams
from tests.cuda.prepared import Log, Prepared, play
from tests.cuda.test_graphs import capture
from tests.oracle_formats import WIRES
from tests.simt.test_debug import LATE, finds_poison, gives_up, plays_on, waits_for_a_slow_rank

LARGE = {"extra": {"large": 65_536}}  # in bulk


@pytest.mark.parametrize("wire", WIRES)
def test_rounds_are_right(wire):
    run_streams(3, plays_on, "nvlink", Case(3, wire=wire, capacity=12, combine_wire="mxfp8"))
    run_streams(3, plays_on, "nvlink", Case(3, wire=wire, capacity=12, more=LARGE))


def test_who_reads_views_after_their_round_finds_poison():
    run_streams(2, finds_poison, "nvlink")


def test_the_slow_rank_shows():
    for rank, (waits, text) in enumerate(run_streams(3, waits_for_a_slow_rank, "nvlink")):
        if rank != 1:
            assert waits.slowest == 1, text
            assert waits.dispatch[1].longest > LATE * 0.5e6


def test_a_wait_in_vain_counts_and_is_no_longer_than_without():
    run_streams(2, gives_up, "nvlink")


def replays(ranks, folder):
    case, place = Case(2, capacity=20), place_of(ranks, "nvlink")
    prepared = Prepared(case, Round(1), ranks.rank, place)
    with opened(ranks, "nvlink", case, debug=True) as a2a:
        log = Log(1, place)
        play(a2a, prepared, log)
        captured = in_turn(ranks, lambda: capture(a2a, prepared, False))
        began = time.monotonic_ns()
        for _ in range(5):
            captured.graphs[0].replay()
        a2a.check()
        took = (time.monotonic_ns() - began) / 1e9
        log.check()
        assert not prepared.wrong_sums(captured.out).any()
        waits = a2a.wait_times()
        other = 1 - ranks.rank
        assert (waits.dispatch[other].count, waits.combine[other].count) == (6, 6)
        a2a.save_trace(folder / f"{ranks.rank}.json")
        meet(ranks)
    events = json.loads((folder / f"{ranks.rank}.json").read_text())["traceEvents"]
    ends = [e["ts"] + e["dur"] for e in events if e["ph"] == "X"]
    # The device's clock and the host's are the same to a millisecond.
    assert began / 1e3 - 1e3 < max(ends) < began / 1e3 + took * 1e6 + 1e3


def test_replays_of_a_graph_are_noted(tmp_path):
    run_streams(2, replays, tmp_path)
