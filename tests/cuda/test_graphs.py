"""CUDA graphs: captured once, replayed in any order of whole rounds, with inputs that change."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from tests.collective.places import meet, place_of
from tests.collective.rounds import Case, Round, opened
from tests.cuda.playing import in_turn, run_streams
from tests.cuda.prepared import Log, Prepared, keep_up, play

ROUTINGS = ("random", "invalid", "hot", "nowhere", "duplicates")


class Captured(NamedTuple):
    """Graphs of one shape, and the tensors that they read and write."""

    graphs: list  # one of a whole round, or one of each half
    call: dict
    y: torch.Tensor
    received: object
    out: torch.Tensor


def graph_of(body):
    """What `body` enqueues, and what it returns. Its kernels run in replays only."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():  # of a rank process, where nothing can be captured
        stream = None
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = body()
    return graph, result


def capture(a2a, prepared, halves):
    """`halves`: dispatch and combine are graphs of their own."""
    call = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in prepared.call.items()
    }
    y = prepared.y.clone()
    if halves:
        first, received = graph_of(lambda: a2a.dispatch(**call))
        second, out = graph_of(lambda: a2a.combine(y))
        return Captured([first, second], call, y, received, out)

    def whole():
        received = a2a.dispatch(**call)
        return received, a2a.combine(y)

    graph, (received, out) = graph_of(whole)
    return Captured([graph], call, y, received, out)


def replay(captured, prepared, log, what):
    for name, value in captured.call.items():
        if isinstance(value, torch.Tensor):
            value.copy_(prepared.call[name])
    captured.y.copy_(prepared.y)
    first, *second = captured.graphs
    first.replay()
    delivery = None
    if second:  # between its halves the views hold what came
        delivery = prepared.wrong_delivery(captured.received)
        second[0].replay()
    sums = prepared.wrong_sums(captured.out)
    if delivery is None:
        counts = torch.zeros(6, dtype=torch.bool, device=sums.device)
        counts[0] = prepared.wrong_delivery(captured.received)[0]  # the rest a peer may overwrite
        delivery = counts
    log.note(what, delivery, sums)


def rounds_of(tokens, rows, count, **more):
    """Rounds of one shape: fewer live tokens are ids that route nowhere."""
    return [
        Round(seed, tokens=tokens, rows=rows, routing=ROUTINGS[seed % len(ROUTINGS)], **more)
        for seed in range(count)
    ]


def play_graphs(ranks, case, shapes, replays):
    """Graphs of several shapes, each as a whole and in halves, between eager rounds."""
    place, shared = place_of(ranks, "nvlink"), random.Random(7)
    pool = {
        shape: [
            Prepared(case, rnd, ranks.rank, place) for rnd in rounds_of(*shape, 6, wide_ids=True)
        ]
        for shape in shapes
    }
    odd = [Prepared(case, Round(seed, rows=seed % 5), ranks.rank, place) for seed in range(6)]
    log = Log(replays, place)
    with opened(ranks, "nvlink", case) as a2a:
        play(a2a, odd[0], Log(1, place))  # before the first capture
        captured = [
            (shape, halves, in_turn(ranks, lambda s=shape, h=halves: capture(a2a, pool[s][0], h)))
            for shape in shapes
            for halves in (False, True)
        ]
        assert a2a.phase == "idle"
        for number in range(replays):
            if shared.random() < 0.25:
                play(a2a, shared.choice(odd), log, "eager")
            else:
                shape, halves, graphs = shared.choice(captured)
                prepared = shared.choice(pool[shape])
                replay(graphs, prepared, log, f"{'halves' if halves else 'graph'} {prepared.rnd}")
            keep_up(number)
        a2a.check()
        log.check()
        meet(ranks)


@pytest.mark.parametrize(
    ("wire", "back"), [("bf16", "bf16"), ("mxfp8", "fp32"), ("nvfp4", "mxfp8")]
)
@pytest.mark.parametrize("size", [2, 4])
def test_replays_in_any_order_between_eager_rounds(size, wire, back):
    case = Case(size, 9, 3, 128, 48, wire, back, {"scrub": "all"})
    shapes = [((1,), 1), ((8, 7), 8), ((48, 40), 48), ((0, 3), 3)]
    run_streams(size, play_graphs, case, shapes, 240)


def test_replays_of_rank_processes(pool):
    case = Case(2, 9, 3, 128, 48)
    pool.run(play_graphs, case, [((4,), 4), ((48, 40), 48)], 40, ranks=2)


def play_layers(ranks, case, layers, replays):
    """One graph of many rounds, as a model has them; each replay runs them all."""
    place = place_of(ranks, "nvlink")
    rounds = rounds_of((6, 5), 6, layers)
    prepared = [Prepared(case, rnd, ranks.rank, place) for rnd in rounds]
    with opened(ranks, "nvlink", case) as a2a:
        play(a2a, prepared[0], Log(1, place))

        def model():
            wrong = []
            for layer in prepared:
                delivery = layer.wrong_delivery(a2a.dispatch(**layer.call))
                wrong.append(torch.cat([delivery, layer.wrong_sums(a2a.combine(layer.y))]))
            return torch.stack(wrong)

        graph, wrong = in_turn(ranks, lambda: graph_of(model))
        total = torch.zeros_like(wrong, dtype=torch.int32)
        for number in range(replays):
            graph.replay()
            total += wrong
            keep_up(number)
        a2a.check()
        assert not total.any(), f"by layer and part (prepared.PARTS):\n{total.tolist()}"
        meet(ranks)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_graph_of_many_layers(size):
    run_streams(size, play_layers, Case(size, 9, 3, 128, 6, "mxfp4", "fp32"), 12, 60)
