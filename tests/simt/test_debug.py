"""``debug=True``: poison, waits and traces, on the CPU backends and the CUDA kernels on the CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_a2a import AllToAll
from moe_a2a.__main__ import main
from moe_a2a.errors import GeometryError, PeerTimeout, StateError
from tests.collective.places import meet
from tests.collective.rounds import Case, Round, opened, play, send, tokens_of
from tests.oracle_formats import WIRES
from tests.simt.backend import register
from tests.simt.playing import NEEDS

pytestmark = NEEDS
BACKENDS = ("shm", "collective", "simt")
LATE = 0.25  # seconds


def plays_on(ranks, backend, case):
    """Rounds in debug mode are right, whatever their size."""
    register()
    with opened(ranks, backend, case, debug=True) as a2a:
        for n, rows in enumerate((case.capacity, 1, 7, case.capacity, 0)):
            play(a2a, ranks, case, Round(n, rows=rows, specials=n == 2))
        a2a.reset()
        play(a2a, ranks, case, Round(9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_are_right(pool, backend):
    large = {"extra": {"large": 65_536}}  # in bulk, with nvlink
    for n, wire in enumerate(WIRES):
        case = Case(3, wire=wire, capacity=12, combine_wire=("mxfp8", "fp32")[n % 2])
        pool.run(plays_on, backend, case, ranks=3)
    pool.run(plays_on, backend, Case(3, capacity=12, more=large), ranks=3)


def finds_poison(ranks, backend):
    register()
    case = Case(2, wire="mxfp8", capacity=4, more={"extra": {"id": 8}})
    with opened(ranks, backend, case, debug=True) as a2a:
        rnd = Round(1)
        recv = send(a2a, case, rnd, tokens_of(case, rnd, ranks.rank))
        assert not recv.x.float().isnan().all()
        a2a.combine(a2a.combine_buffer().zero_())
        a2a.check()
        meet(ranks)
        assert recv.x.float().isnan().all()
        assert (recv.scales == 0xFF).all()
        assert (recv.topk_ids == 0x7F7F7F7F).all()
        assert recv.topk_weights.isnan().all()
        assert (recv.extra["id"] == 0xFF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_reads_views_after_their_round_finds_poison(pool, backend):
    pool.run(finds_poison, backend, ranks=2)


def waits_for_a_slow_rank(ranks, backend):
    register()
    case = Case(3, capacity=4)
    with opened(ranks, backend, case, debug=True) as a2a:
        for n in range(4):
            if ranks.rank == 1 and n == 2:
                time.sleep(LATE)
            play(a2a, ranks, case, Round(n))
        meet(ranks)
        waits = a2a.wait_times()
        text = str(waits)
        return waits, text


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slow_rank_shows(pool, backend):
    found = pool.run(waits_for_a_slow_rank, backend, ranks=3)
    for rank, (waits, text) in enumerate(found):
        assert waits.rank == rank
        assert (waits.dispatch[rank].count, waits.combine[rank].count) == (0, 0)
        for peer in {0, 1, 2} - {rank}:
            assert (waits.dispatch[peer].count, waits.combine[peer].count) == (4, 4)
            assert f"rank {peer}" in text
        if rank != 1:
            assert waits.slowest == 1
            assert LATE * 0.5e6 < waits.dispatch[1].longest < LATE * 2e6 + 1e6
            assert "slowest" in next(line for line in text.splitlines() if "rank 1" in line)
    assert max(found[1][0].dispatch[0].longest, found[1][0].dispatch[2].longest) < LATE * 1e6


def gives_up(ranks, backend):
    register()
    case = Case(2, capacity=4)
    with opened(ranks, backend, case, debug=True, timeout=LATE) as a2a:
        play(a2a, ranks, case, Round(0))
        if ranks.rank == 0:
            start = time.monotonic()
            with pytest.raises(PeerTimeout):
                play(a2a, ranks, case, Round(1))
            assert time.monotonic() - start < LATE + 1
            assert a2a.wait_times().dispatch[1].longest > LATE * 0.5e6
        meet(ranks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wait_in_vain_counts_and_is_no_longer_than_without(pool, backend):
    pool.run(gives_up, backend, ranks=2)


def traces(ranks, backend, folder):
    register()
    case = Case(2, capacity=4)
    path = folder / f"{ranks.rank}.json"
    began = time.monotonic_ns() / 1e3
    with opened(ranks, backend, case, debug=True) as a2a:
        for n in range(3):
            play(a2a, ranks, case, Round(n))
        meet(ranks)
        a2a.save_trace(path)
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    first = min(e["tid"] for e in events)
    whole = [e for e in events if e["tid"] == first and e["name"].startswith(("disp", "comb"))]
    assert [e["name"] for e in whole] == [f"{p} {n}" for n in (1, 2, 3) for p in PHASES]
    assert all(e["pid"] == ranks.rank for e in events)
    now = time.monotonic_ns() / 1e3
    assert all(e["dur"] >= 0 and began <= e["ts"] + 3e3 for e in events)
    assert all(e["ts"] + e["dur"] <= now + 3e3 for e in events)
    ends = [e["ts"] + e["dur"] for e in whole]
    slack = 3e3 if backend == "simt" else 0  # its clock jumps by up to 2 ms
    assert all(end <= e["ts"] + slack for end, e in zip(ends, whole[1:], strict=False))
    for part in (e for e in events if e["name"] in ("send", "wait", "finish")):
        end = part["ts"] + part["dur"]
        of = [e for e in whole if e["args"] == part["args"] and e["ts"] <= part["ts"] + slack]
        assert any(end <= e["ts"] + e["dur"] + slack + 1e-3 for e in of), part


PHASES = ("dispatch", "combine")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trace_has_the_phases_of_each_rank(pool, backend, tmp_path):
    pool.run(traces, backend, tmp_path, ranks=2)
    ranks, merged = [str(tmp_path / f"{n}.json") for n in (0, 1)], tmp_path / "all.json"
    assert main(["merge-traces", str(merged), *ranks]) == 0
    events = json.loads(merged.read_text())["traceEvents"]
    assert len(events) == sum(len(json.loads(Path(r).read_text())["traceEvents"]) for r in ranks)


def test_what_is_no_trace_is_named(tmp_path, capsys):
    (tmp_path / "odd.json").write_text("{}")
    for name in ("odd.json", "none.json"):
        assert main(["merge-traces", str(tmp_path / "all.json"), str(tmp_path / name)]) != 0
        assert name in capsys.readouterr().err


def wants_traces(ranks, folder, which):
    case = Case(2, capacity=4)
    if ranks.rank in which:
        os.environ["MOE_A2A_TRACE"] = str(folder)
    try:
        with AllToAll(case.spec(), ranks.group, backend="shm", timeout=20) as a2a:
            play(a2a, ranks, case, Round(0))
            a2a.wait_times()
    except GeometryError as error:
        return str(error)
    finally:
        os.environ.pop("MOE_A2A_TRACE", None)


def test_the_environment_asks_for_traces(pool, tmp_path):
    pool.run(wants_traces, tmp_path, (0, 1), ranks=2)
    assert len(list(tmp_path.glob("moe_a2a-rank0-*.json"))) == 1
    assert len(list(tmp_path.glob("moe_a2a-rank1-*.json"))) == 1


def test_the_environment_of_one_rank_alone_is_refused(pool, tmp_path):
    for text in pool.run(wants_traces, tmp_path, (1,), ranks=2):
        assert "debug" in text
        assert "rank 1" in text


@pytest.mark.parametrize("name", ["none", "x" * 300, "file", "file/below"])
def test_a_directory_that_is_none_is_named(pool, tmp_path, name):
    (tmp_path / "file").touch()
    for text in pool.run(wants_traces, tmp_path / name, (0,), ranks=2):
        assert "MOE_A2A_TRACE" in text
        assert "directory" in text


def closes_with_nobody_listening(ranks, folder):
    os.environ["MOE_A2A_TRACE"] = str(folder)
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr.close()
    try:
        a2a = opened(ranks, "shm", Case(1))
        window = a2a._impl._window
        a2a.close()
    finally:
        sys.stderr = stderr
        del os.environ["MOE_A2A_TRACE"]
    assert window._descriptor < 0


def test_a_closed_stderr_keeps_nothing_open(pool, tmp_path):
    pool.run(closes_with_nobody_listening, tmp_path, ranks=1)
    assert len(list(tmp_path.glob("*.json"))) == 1


def is_refused(call):
    try:
        call()
    except StateError as error:
        return "forked" in str(error)
    return False


def forks(ranks, backend, folder):
    os.environ["MOE_A2A_TRACE"] = str(folder)
    try:
        with opened(ranks, backend, Case(2)) as a2a:
            play(a2a, ranks, Case(2), Round(1))
            child = os.fork()
            if child == 0:
                calls = (a2a.wait_times, lambda: a2a.save_trace("never"), a2a.combine_buffer)
                refused = all(map(is_refused, calls))
                a2a.close()
                os._exit(0 if refused else 1)
            assert os.waitpid(child, 0)[1] == 0
            play(a2a, ranks, Case(2), Round(2))
    finally:
        del os.environ["MOE_A2A_TRACE"]


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_a_forked_child_ends_nothing(pool, backend, tmp_path):
    pool.run(forks, backend, tmp_path, ranks=2)
    assert len(list(tmp_path.glob("*.json"))) == 2


def blames(ranks, backend):
    case = Case(3, capacity=4)
    with opened(ranks, backend, case, debug=True) as a2a:
        play(a2a, ranks, case, Round(0))
        meet(ranks)
        time.sleep((0, 0.1, 0.25)[ranks.rank])
        play(a2a, ranks, case, Round(1))
        meet(ranks)
        return a2a.wait_times()


@pytest.mark.parametrize("backend", ["shm"])
def test_the_slowest_of_two_slow_ranks_is_named(pool, backend):
    waits = pool.run(blames, backend, ranks=3)[0]
    assert waits.slowest == 2, str(waits)


def loses_notes(ranks, rounds):
    register()
    case = Case(1, capacity=2)
    with opened(ranks, "simt", case, debug=True) as a2a:
        x, ids = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int32)
        a2a._impl._collect_now_and_then = lambda: None  # as in replays of a graph
        for _ in range(rounds):
            a2a.combine(a2a.dispatch(x, ids, torch.ones(1, 2)).x.clone())
        return a2a.wait_times().lost


def test_notes_that_were_overwritten_are_counted(pool):
    assert pool.run(loses_notes, 200, ranks=1) == [0]
    assert pool.run(loses_notes, 700, ranks=1) == [1400 - 512]


def test_times_need_debug():
    with AllToAll(Case(1).spec()) as a2a:
        for call in (a2a.wait_times, lambda: a2a.save_trace("never")):
            with pytest.raises(StateError, match="debug=True"):
                call()
    with AllToAll(Case(1).spec(), debug=True) as a2a:
        assert a2a.wait_times().slowest is None
    with pytest.raises(StateError, match="close"):
        a2a.wait_times()
