"""Calls run on the caller's current stream, whichever that is; events order what several do."""

from __future__ import annotations

import torch

from tests.collective.places import meet, place_of
from tests.collective.rounds import Case, Round, opened
from tests.cuda.playing import MILLISECOND, run_streams
from tests.cuda.prepared import Log, Prepared

CASE = Case(2, 7, 3, 128, 16, "nvfp4", "fp32")


def play_on_two_streams(ranks, count):
    """Dispatch on one stream, combine on another, neither the constructor's.

    A sleep stands before everything that a call depends on, so that one that ran on another stream
    would find the inputs of the round before.
    """
    place = place_of(ranks, "nvlink")
    pool = [Prepared(CASE, Round(seed, tokens=(9, 7)), ranks.rank, place) for seed in range(4)]
    log = Log(count, place)
    with opened(ranks, "nvlink", CASE) as a2a:
        streams = [torch.cuda.Stream(place), torch.cuda.Stream(place)]
        x, ids, y = (torch.zeros_like(t) for t in (*inputs(pool[0]), pool[0].y))
        torch.cuda.current_stream().synchronize()
        meet(ranks)
        for number in range(count):
            prepared = pool[number % 4]
            first, second = streams if number % 3 else reversed(streams)
            with torch.cuda.stream(first):
                torch.cuda._sleep(MILLISECOND // 4)
                for mine, given in zip((x, ids), inputs(prepared), strict=True):
                    mine.copy_(given)
                call = prepared.call | {"x": x, "topk_ids": ids}
                recv = a2a.dispatch(**call)
                delivery = prepared.wrong_delivery(recv)
                torch.cuda._sleep(MILLISECOND // 4)
                y.copy_(prepared.y)
                received = first.record_event()
            second.wait_event(received)
            with torch.cuda.stream(second):
                sums = prepared.wrong_sums(a2a.combine(y))
                log.note(str(number), delivery, sums)
                combined = second.record_event()
            for stream in streams:
                stream.wait_event(combined)
            if number % 8 == 7:
                combined.synchronize()
        combined.synchronize()
        a2a.check()
        log.check()
        meet(ranks)


def inputs(prepared):
    return prepared.call["x"], prepared.call["topk_ids"]


def test_two_streams_ordered_by_events():
    run_streams(2, play_on_two_streams, 60)


def result_by_event(ranks):
    """An event after combine is all that a reader on another stream has to wait for."""
    place = place_of(ranks, "nvlink")
    pool = [Prepared(CASE, Round(seed), ranks.rank, place) for seed in range(6)]
    reader = torch.cuda.Stream(place)
    with opened(ranks, "nvlink", CASE) as a2a:
        for number, prepared in enumerate(pool):
            if ranks.rank == number % 2:
                torch.cuda._sleep(2 * MILLISECOND)  # this one comes late, the other waits for it
            a2a.dispatch(**prepared.call)
            out = a2a.combine(prepared.y)
            done = torch.cuda.current_stream().record_event()
            reader.wait_event(done)
            with torch.cuda.stream(reader):
                wrong = prepared.wrong_sums(out)
            reader.synchronize()
            assert not wrong.any(), number
        meet(ranks)


def test_a_reader_on_another_stream_waits_for_an_event():
    run_streams(2, result_by_event)


def default_stream(ranks):
    """The constructor on a stream of its own, the calls on the default one."""
    place = place_of(ranks, "nvlink")
    stream, prepared = torch.cuda.Stream(place), Prepared(CASE, Round(3), ranks.rank, place)
    with torch.cuda.stream(stream):
        a2a = opened(ranks, "nvlink", CASE)
    log = Log(5, place)
    for _ in range(5):
        delivery = prepared.wrong_delivery(a2a.dispatch(**prepared.call))
        log.note("default stream", delivery, prepared.wrong_sums(a2a.combine(prepared.y)))
    a2a.check()
    log.check()
    a2a.close()


def test_the_default_stream_of_a_process(pool):
    pool.run(default_stream, ranks=2)
