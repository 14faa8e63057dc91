"""What the benchmark does for GPUs, as far as it needs none."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from moe_a2a import AllToAll, MoELayer
from moe_a2a.bench import rivals_flashinfer
from moe_a2a.bench.cases import Effort, Geometry, Sweep
from moe_a2a.bench.check import CheckFailed, Oracle
from moe_a2a.bench.command import _device
from moe_a2a.bench.device_check import check_rival, order_of
from moe_a2a.bench.device_points import device_round
from moe_a2a.bench.goals import GOALS, compared, goal_rows, goal_sweeps, shape_sweeps
from moe_a2a.bench.graphs import DeviceTimings
from moe_a2a.bench.inputs import InputSource, global_scale_of
from moe_a2a.bench.layer import LayerSweep
from moe_a2a.bench.layer_check import drawn_weights, normalized
from moe_a2a.bench.layer_rivals import FlashInferLayer
from moe_a2a.bench.link import LinkLimits
from moe_a2a.bench.report import print_results
from moe_a2a.bench.timing import Quantiles, slowest
from moe_a2a.experts.emulated import Emulated

SMALL = Geometry("small", 256, 8, 2)
EFFORT = Effort(50, 0.0, 5)


def test_the_floor_follows_the_curve_and_then_the_bandwidth():
    limits = LinkLimits(100.0, ((1000, 20.0), (2000, 30.0)))
    assert limits.floor(0) == 20
    assert limits.floor(1500) == 25
    assert limits.floor(3000) == 40
    # A payload that takes longer on the wire than the exchange was seen to take.
    assert LinkLimits(10.0, ((1000, 20.0), (2000, 30.0))).floor(2000) == 200


def test_device_is_cuda_where_only_cuda_backends_are_asked_for():
    def given(device: str | None, backend: list[str] | None) -> str:
        return _device(Namespace(device=device, backend=backend))

    assert given(None, None) == "cpu"
    assert given(None, ["shm", "collective"]) == "cpu"
    assert given("cuda", ["shm"]) == "cuda"


def test_slowest_rank_of_each_part():
    def rank(base: float) -> DeviceTimings:
        quantiles = [Quantiles(base + part, base, base) for part in range(5)]
        return DeviceTimings(*quantiles, 50, True)

    assert slowest([rank(1), rank(2)], "host_combine").median == 6


def test_rows_are_found_again_in_any_order():
    rows = torch.randn(40, 64)
    order = torch.randperm(40)
    found = order_of(rows, rows[order])
    assert found is not None
    assert torch.equal(rows[order][found], rows)
    wrong = rows[order].clone()
    wrong[3, 5] += 1
    assert order_of(rows, wrong) is None
    assert order_of(rows, rows[0].expand(40, 64)) is None


class StandIn:
    """FlashInfer's object on one rank: slots in an order of its own, bf16 in its workspace."""

    workspace = None

    def __init__(self, mapping, *, max_num_tokens, top_k, num_experts, hidden_size, mnnvl_config):
        self.phase = "idle"

    def dispatch(self, ids, payloads, rows, **clearing):
        assert self.phase == "idle"
        self.phase = "dispatched"
        self.order = torch.randperm(ids.shape[0])
        received = []
        for payload in payloads:
            there = torch.zeros(1, rows, payload.shape[1], dtype=payload.dtype)
            there[0, : len(self.order)] = payload[self.order]
            received.append(there)
        if clearing:
            there = received[clearing["expert_id_payload_index"]]
            there[0, len(self.order) :] = clearing["invalid_token_expert_id"]
        return received

    def get_combine_payload_tensor_in_workspace(self, rows, hidden, dtype):
        if self.workspace is None:
            self.workspace = torch.zeros(1, rows, hidden, dtype=dtype)
        return self.workspace

    def combine(self, y, rows, *, payload_in_workspace, output, use_low_precision):
        assert self.phase == "dispatched"
        assert payload_in_workspace == (y is self.workspace)
        self.phase = "idle"
        output[self.order] = y[0, : len(self.order)]


@pytest.fixture
def stand_in(monkeypatch):
    package = rivals_flashinfer._Package(
        StandIn,
        SimpleNamespace(
            MnnvlMemory=SimpleNamespace(comm=None),
            MnnvlConfig=lambda **given: given,
            TorchDistBackend=lambda: None,
        ),
        lambda **given: given,
    )
    monkeypatch.setattr(rivals_flashinfer, "_package", lambda: package)
    monkeypatch.setattr(rivals_flashinfer.dist, "barrier", lambda: None)
    monkeypatch.setattr(rivals_flashinfer.torch.cuda, "synchronize", lambda: None)


def oracle_and_round(wire: str, combine_wire: str):
    sweep = Sweep(SMALL, 1, (9,), (wire,), combine_wire, (), "uniform", 5, True, EFFORT)
    inputs = InputSource(sweep).of(0, 9, wire)
    oracle = Oracle(sweep.spec(wire), 0, [inputs], "planted")
    return oracle, device_round(oracle, inputs, inputs, 0, 9)


@pytest.mark.parametrize("wire", ["bf16", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("combine_wire", ["bf16", "mxfp8"])
@pytest.mark.usefixtures("stand_in")
def test_flashinfer_is_checked_though_its_rows_have_no_order(wire, combine_wire):
    oracle, round = oracle_and_round(wire, combine_wire)
    assert rivals_flashinfer.FlashInfer.unusable(oracle.spec) is None
    rival = rivals_flashinfer.FlashInfer(round)
    for _ in range(3):
        check_rival(rival, oracle)
    round.payload.view(torch.uint8)[4, 3] ^= 1
    with pytest.raises(CheckFailed, match="missing or wrong"):
        check_rival(rival, oracle)


@pytest.mark.parametrize("wire", ["bf16", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("combine_wire", ["bf16", "mxfp8"])
@pytest.mark.usefixtures("stand_in")
def test_experts_behind_flashinfers_exchange(wire, combine_wire):
    sweep = Sweep(SMALL, 1, (9,), (wire,), combine_wire, (), "uniform", 5, True, EFFORT)
    inputs = normalized(InputSource(sweep).of(0, 6, wire))  # of nine rows three are padding
    spec = sweep.spec(wire)
    weights = drawn_weights(LayerSweep(sweep, 64, "mxfp8", None), 0, torch.device("cpu"))
    round = device_round(Oracle(spec, 0, [inputs], "planted"), inputs, inputs, 0, 9)
    seen, outs = [], []
    backend = Emulated(spec, "cpu", weights)

    def experts(recv, *, out):
        seen.append(recv.topk_ids.clone())
        outs.append(out)
        return backend(recv, out=out)

    scale = global_scale_of(wire)
    rival = rivals_flashinfer.FlashInfer(round, cleared=True)
    layer = FlashInferLayer(rival, round, experts, scale)
    with AllToAll(spec, backend="shm") as a2a:
        x, ids, router = inputs
        ours = MoELayer(a2a, experts=backend)(x, router, ids, global_scale=scale)
    for _ in range(2):
        layer.prepare()
        layer.experts()
        layer.finalize()
        if combine_wire == "bf16":  # the stand-in sends everything back as it is
            assert torch.equal(layer.output(), ours)
    assert (seen[0][0, 6:] == -1).all()
    assert (outs[0] is None) == (combine_wire == "mxfp8")


@pytest.mark.usefixtures("stand_in")
def test_flashinfer_is_left_out_where_it_has_no_kernels():
    spec = Sweep(
        Geometry("odd", 256, 64, 32), 1, (4,), ("bf16",), "bf16", (), "uniform", 0, True, EFFORT
    ).spec("bf16")
    reason = rivals_flashinfer.FlashInfer.unusable(spec)
    assert reason is not None
    assert "top_k=32" in reason


def case(sweep: Sweep, wire: str, tokens: int, kind: str, name: str, base: float):
    spread = {"median": base, "p10": base - 1, "p90": base + 1}
    return {
        "sweep": sweep.label,
        "hidden_size": sweep.geometry.hidden_size,
        "num_experts": sweep.geometry.num_experts,
        "top_k": sweep.geometry.top_k,
        "max_blocks": sweep.max_blocks,
        "kind": kind,
        "name": name,
        "wire": wire,
        "combine_wire": sweep.combine_wire,
        "tokens": tokens,
        "dispatch_bytes": int(base * 1e5),
        "pair_bytes": int(base * 2e5),
        **{f"{part}_us": spread for part in ("dispatch", "combine", "pair")},
        **({} if kind == "bound" else {"host_us": {"dispatch": base, "combine": tokens + base}}),
        "captured": True,
    }


def test_every_goal_finds_its_case(capsys):
    sweeps = goal_sweeps(2, "nvlink", EFFORT, 20)
    cases = [
        case(sweep, wire, tokens, kind, name, base)
        for sweep in sweeps
        for wire in sweep.wires
        for tokens in sweep.tokens
        for kind, name, base in [
            ("backend", "nvlink", 10.0),
            ("rival", "FlashInfer", 12.0),
            ("rival", "NCCL a2a, wire only", 99.0),
            ("bound", "link floor", 5.0),
        ]
        if kind == "backend" or sweep.rivals or kind == "bound"
    ]
    rows = {row["name"]: row for row in goal_rows(cases)}
    assert len(rows) == len(GOALS)
    assert all(row["ours"] is not None for row in rows.values())
    assert rows["pair bf16, 8 tokens, us"]["flashinfer"] == 12.0
    assert rows["dispatch bf16, 4096 tokens, 24 blocks, GB/s"]["ours"] == pytest.approx(100)
    assert rows["dispatch bf16, 4096 tokens, 24 blocks, GB/s"]["flashinfer"] is None
    assert rows["eager combine below 512 tokens, host us"]["ours"] == 128 + 10.0
    geometry = sweeps[0].geometry._asdict()
    document = {"geometry": geometry, "ep_size": 2, "routing": "uniform", "cases": cases}
    print_results(document)
    assert "10.0 + 11.0" in capsys.readouterr().out
    assert goal_rows([])[0]["ours"] is None


def test_slower_than_flashinfer_means_by_more_than_the_noise():
    sweep = shape_sweeps(2, "nvlink", EFFORT, 20)[0]
    pairs = [(1, 10.0, 20.0), (16, 21.0, 20.0), (128, 30.0, 20.0)]
    cases = []
    for tokens, ours, theirs in pairs:
        cases.append(case(sweep, "bf16", tokens, "backend", "nvlink", ours))
        cases.append(case(sweep, "bf16", tokens, "rival", "FlashInfer", theirs))
    found = compared(cases)
    assert [c.ratio for c in found] == [1.5] * 3 + [1.05] * 3 + [0.5] * 3
    assert [c.slower for c in found] == [True] * 3 + [False] * 6


def test_every_shape_is_a_legal_one():
    sizes = {sweep.spec("bf16").workspace_bytes() for sweep in shape_sweeps(2, "x", EFFORT, 20)}
    assert len(sizes) > 8
