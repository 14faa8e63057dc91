"""Whole layers in the benchmark: what is checked before it is timed, and what is made of times."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from moe_a2a.bench import layer_check, layer_timing
from moe_a2a.bench.cases import PRESETS, Effort, Geometry, Sweep, UsageError
from moe_a2a.bench.check import CheckFailed
from moe_a2a.bench.inputs import Inputs
from moe_a2a.bench.layer import SMALL, LayerSweep, layer_sweep
from moe_a2a.bench.layer_check import check_layer, drawn_weights, normalized
from moe_a2a.bench.layer_report import layer_case, layer_document, layer_panels, print_layers
from moe_a2a.bench.layer_timing import LayerTimings, measure_layer
from moe_a2a.bench.timing import Quantiles
from moe_a2a.experts import WEIGHT_FORMATS

CPU = torch.device("cpu")
TINY = Geometry("custom", 128, 5, 2)


def sweep(ranks=2, geometry=TINY, wires=("bf16",)):
    return Sweep(
        geometry, ranks, (4, 8), wires, "bf16", ("shm",), "uniform", 3, True, Effort(1, 0.0, 1)
    )


def arguments(**given):
    usual = dict.fromkeys(("preset", "intermediate", "weights", "expert_backend"))
    return Namespace(**(usual | given))


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_the_number_of_ranks_changes_no_expert(form):
    alone = drawn_weights(LayerSweep(sweep(1), 128, form, None), 0, CPU)
    several = LayerSweep(sweep(2), 128, form, None)
    spec = several.sweep.spec("bf16")
    for rank in range(2):
        mine = spec.experts_of(rank)
        own = drawn_weights(several, rank, CPU)
        own.check_fits(spec, rank)
        for one, whole in ((own.w13, alone.w13), (own.w2, alone.w2)):
            part = whole.dequantize(slice(mine.start, mine.stop))
            assert torch.equal(one.dequantize(), part)
    assert (own.w13_input_scale is not None) == (form == "nvfp4")
    assert not torch.equal(*alone.w13.dequantize(slice(0, 2))), "experts differ"


def test_a_rank_without_experts():
    few = LayerSweep(sweep(3, TINY._replace(num_experts=2, top_k=1)), 64, "nvfp4", None)
    none = drawn_weights(few, 2, CPU)
    assert (none.num_experts, none.hidden_size, none.intermediate_size) == (0, 128, 64)


def test_the_float64_layer(monkeypatch):
    """Against a loop over tokens and choices."""
    weights = drawn_weights(LayerSweep(sweep(1), 64, "fp32", None), 0, CPU)
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(6, 128, generator=drawn).bfloat16()
    ids = torch.randint(-1, 6, (6, 2), generator=drawn).int()
    inputs = Inputs(x, ids, torch.rand(6, 2, generator=drawn))
    parts = [Inputs(*(p[:4] for p in inputs)), Inputs(*(p[4:] for p in inputs))]
    monkeypatch.setattr(layer_check.dist, "all_reduce", lambda total: None)
    found = torch.cat([layer_check.expected(parts, weights, 0, rank) for rank in range(2)])
    w13, w2 = weights.w13.payload.double(), weights.w2.payload.double()
    for t in range(6):
        wanted = torch.zeros(128, dtype=torch.float64)
        for k in range(2):
            e = int(ids[t, k])
            if 0 <= e < 5:
                gate, up = (w13[e] @ x[t].double()).chunk(2)
                h = gate / (1 + torch.exp(-gate)) * up
                wanted += float(inputs.topk_weights[t, k]) * (w2[e] @ h)
        torch.testing.assert_close(found[t], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["bf16", "nvfp4"])
def test_an_output_that_is_wrong_is_found(form):
    drawn = torch.Generator().manual_seed(2)
    wanted = torch.randn(16, 64, generator=drawn, dtype=torch.float64)
    near = wanted * (1 + (0.15 if form == "nvfp4" else 0.01) * torch.randn(16, 64, generator=drawn))
    check_layer(near, wanted, ("mxfp8", form), "here")
    swapped, nan, scaled = near.clone(), near.clone(), near * 2
    swapped[[3, 5]] = near[[5, 3]]
    nan[7, 7] = float("nan")
    for wrong in (swapped, nan, scaled, near * 0, near[1:]):
        with pytest.raises(CheckFailed, match=r"^here: "):
            check_layer(wrong, wanted, ("mxfp8", form), "here")
    many, one = wanted.repeat(40, 1), near.repeat(40, 1)
    check_layer(one, many, (form,), "here")
    one[639] = one[0]
    with pytest.raises(CheckFailed, match="row 639 is"):
        check_layer(one, many, (form,), "here")
    check_layer(near[:0], wanted[:0], (form,), "no tokens")
    check_layer(near * 0, wanted * 0, (form,), "routed nowhere")


def test_rows_come_normalized():
    x = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [30.0], [4.0], [0.2]])
    given = Inputs(x.bfloat16(), torch.zeros(5, 1).int(), torch.ones(5, 1))
    found = normalized(given)
    assert found.x.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.x.float().square().mean(1), torch.ones(5), rtol=0.01, atol=0.01
    )


def timings(*medians):
    parts = [Quantiles(value, value / 2, value * 2) for value in medians]
    return LayerTimings(*parts, Quantiles(sum(medians), 0.0, 0.0), 7)


def cases():
    spec = sweep().spec("bf16")
    ranks = [timings(10.0, 70.0, 20.0), timings(10.0, 20.0, 75.0)]
    rival = [timings(50.0, 70.0, 80.0)] * 2
    return [
        layer_case("backend", "shm", "emulated", spec, 8, ranks),
        layer_case("rival", "gloo all-gather", "emulated", spec, 8, rival),
        layer_case("backend", "shm", "emulated", spec, 4, rival),
    ]


def test_phases_are_of_the_rank_that_the_others_wait_for():
    case = cases()[0]
    assert case["layer_us"]["median"] == 105.0
    assert case["shares"] == {"prepare": 0.1, "experts": 0.7, "finalize": 0.2}
    assert [rank["finalize_us"]["median"] for rank in case["per_rank"]] == [20.0, 75.0]


@pytest.fixture
def alone(monkeypatch):
    """One rank, of no group."""
    monkeypatch.setattr(layer_timing.dist, "all_reduce", lambda *given, **more: None)
    monkeypatch.setattr(layer_timing.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(layer_timing.dist, "all_gather_object", lambda *given: None)


@pytest.fixture
def device_clock(monkeypatch):
    """Milliseconds of a device that only the calls move, for events to note."""
    now = [0.0]

    class Event:
        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(layer_timing, "_event", Event)
    monkeypatch.setattr(layer_timing.torch.cuda, "synchronize", lambda: None)
    return now


def test_a_point_ends(monkeypatch, alone):
    """Phases that take long are timed less often; each of them is the time between two calls."""
    now, dones = [0], []
    monkeypatch.setattr(layer_timing.time, "perf_counter_ns", lambda: now[0])

    def phase(microseconds):
        def call():
            now[0] += microseconds * 1000
            dones.append(microseconds)

        return call

    for scale, iterations in ((1, 40), (100_000, 16), (10_000_000, 5)):
        phases = [phase(scale * part) for part in (1, 4, 1)]
        (found,) = measure_layer(phases, Effort(40, 0.0, 2), None)
        assert found.iterations == iterations
        assert found.shares() == pytest.approx(
            {"prepare": 1 / 6, "experts": 2 / 3, "finalize": 1 / 6}
        )
        assert found.layer.median == 6.0 * scale
        assert len(dones) == 3 * (2 + iterations)
        dones.clear()
    (found,) = measure_layer([phase(1)] * 3, Effort(4, 3e-4, 2), None)
    assert found.iterations == 100, "0.3 ms of rounds of 3 us"


def test_on_gpus_the_first_round_behind_a_start_is_not_counted(device_clock):
    now, lines = device_clock, []

    def phase(milliseconds):
        def call():
            now[0] += milliseconds

        return call

    def line():
        lines.append(now[0])
        now[0] += 100

    slow = iter([9.0] + [1.0] * 7 + [9.0] + [1.0] * 7)

    def first():
        now[0] += next(slow)

    found = layer_timing._on_device([first, phase(2), phase(3)], 10, line)
    assert found == [[1_000_000, 2_000_000, 3_000_000]] * 14
    assert len(lines) == 2


def test_graphs_are_timed_without_their_launches(monkeypatch, device_clock, alone):
    """Launching one takes half a millisecond here, and the whole layer is one of them."""
    now, played = device_clock, []

    class Graph:
        def __init__(self, call):
            self.call = call

        def replay(self):
            now[0] += 0.5
            self.call()

    def phase(milliseconds):
        def call():
            now[0] += milliseconds
            played.append(milliseconds)

        return call

    monkeypatch.setattr(layer_timing, "capture", Graph)
    phases = [phase(part) for part in (1, 4, 2)]
    (found,) = measure_layer(phases, Effort(10, 0.0, 2), lambda: None, captured=True)
    medians = [getattr(found, part).median for part in ("prepare", "experts", "finalize", "layer")]
    assert medians == [1000.0, 4000.0, 2000.0, 7000.0]
    assert found.captured
    assert played[-3:] == [1, 4, 2], "the last thing that runs is a whole layer"


def test_table_and_figure(capsys):
    one = LayerSweep(sweep(), 64, "mxfp4", None)
    document = layer_document(one, cases(), {"utc": "now"}, {})
    assert (document["bench"], document["weights"], document["schema"]) == ("layer", "mxfp4", 1)
    print_layers(document)
    said = capsys.readouterr().out
    assert "intermediate 64, mxfp4 weights" in said
    lines = [line.split() for line in said.splitlines()]
    (ours,) = (line for line in lines if line[:4] == ["shm", "emulated", "bf16", "8"])
    assert ours[4:] == ["105.0", "0.0", "0.0", "10.0", "70.0", "20.0", "10%", "70%", "20%", "1.00"]
    (rival,) = (line for line in lines if line[:1] == ["gloo"])
    assert rival[-1] == "1.90"
    title, panels = layer_panels(document)
    assert title.startswith("layer of custom")
    assert [name for name, _ in panels] == ["whole layer", "dispatch + combine in it"]
    assert panels[0][1][0] == ("shm bf16", [4, 8], [200.0, 105.0])
    assert panels[1][1] == [
        ("shm bf16", [4, 8], [130.0, 30.0]),
        ("gloo all-gather bf16", [8], [130.0]),
    ]


def test_sizes_of_models():
    assert layer_sweep(sweep(geometry=SMALL), arguments()).intermediate == 256
    kimi = layer_sweep(sweep(geometry=PRESETS["kimi-k2"]), arguments(preset="kimi-k2"))
    assert kimi.intermediate == 2048
    assert layer_sweep(sweep(), arguments()).intermediate == 256, "small, but for --hidden"
    own = layer_sweep(sweep(), arguments(intermediate=64, expert_backend=["emulated"]))
    assert (own.intermediate, own.weights, own.backends) == (64, "mxfp4", ("emulated",))
    assert (own.ep_size, own.device) == (2, "cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "deepseek-v4"}, "intermediate size of deepseek-v4"),
        ({"intermediate": 48}, "--intermediate 48: mxfp4 weights need a multiple of 32"),
        ({"intermediate": 64, "weights": "int4"}, "--weights: format='int4'"),
        ({"intermediate": 64, "expert_backend": ["marlin"]}, "there are .*emulated"),
        ({"expert_backend": ["triton_w4a16"]}, "computes with cuda tensors, .* on cpu"),
    ],
)
def test_wrong_arguments(given, said):
    with pytest.raises(UsageError, match=said):
        layer_sweep(sweep(), arguments(**given))
