"""The parts of ``python -m moe_a2a`` that need no second rank."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from moe_a2a import backends
from moe_a2a.__main__ import main
from moe_a2a.bench.cases import PRESETS, Effort, Geometry, Sweep, UsageError, fitting_wires
from moe_a2a.bench.check import CheckFailed, Oracle, destinations
from moe_a2a.bench.inputs import InputSource
from moe_a2a.bench.machine import circumstances, shown_command
from moe_a2a.bench.plan import distinct_ranks, link_bytes
from moe_a2a.bench.plot import write_plot
from moe_a2a.bench.routing import draw, load_recorded

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Geometry("small", 256, 8, 2)


def recorded(tmp_path: Path, **arrays: np.ndarray) -> str:
    path = tmp_path / "routing.npz"
    np.savez(path, **arrays)
    return str(path)


def test_routing_file_keeps_top_k_renormalizes_and_wraps(tmp_path):
    ids = np.arange(15, dtype=np.int16).reshape(5, 3) % 8
    weights = np.tile(np.array([0.2, 0.6, 0.2], dtype=np.float32), (5, 1))
    routing = load_recorded(recorded(tmp_path, topk_ids=ids, topk_weights=weights), SMALL)
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[0.25, 0.75]] * 5))
    second = routing.slice_of(1, 3)  # rows 3, 4, 0
    assert second.topk_ids.tolist() == ids[[3, 4, 0], :2].tolist()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"topk_ids": np.zeros((4, 2), np.int32)}, "no array topk_weights"),
        ({"topk_ids": np.zeros((4, 1), np.int32)}, "1 choices per token.*top_k=2"),
        ({"topk_ids": np.full((4, 2), 8, np.int32)}, "8..8, expected 0..7"),
        ({"topk_ids": np.full((4, 2), -2, np.int32)}, "-2..-2, expected 0..7"),
        ({"topk_ids": np.zeros((4, 2), np.float32)}, "float32, expected integers"),
        ({"topk_ids": np.zeros(4, np.int32)}, r"\[4\].*expected two of the same"),
    ],
)
def test_routing_file_errors_say_what_was_given_and_expected(tmp_path, arrays, said):
    if "no array" not in said:
        arrays = {**arrays, "topk_weights": np.ones(arrays["topk_ids"].shape, np.float32)}
    with pytest.raises(UsageError, match=said):
        load_recorded(recorded(tmp_path, **arrays), SMALL)


def test_routing_file_with_weights_that_cannot_be_renormalized(tmp_path):
    weights = np.ones((4, 2), np.float32)
    weights[2] = 0
    path = recorded(tmp_path, topk_ids=np.zeros((4, 2), np.int32), topk_weights=weights)
    with pytest.raises(UsageError, match="row 2 sum to 0"):
        load_recorded(path, SMALL)


@pytest.mark.parametrize("distribution", ["uniform", "zipf", "hotspot"])
def test_drawn_choices_are_distinct_and_weighted(distribution):
    generator = torch.Generator().manual_seed(3)
    ids, weights = draw(distribution, PRESETS["deepseek-v3"], 400, generator)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(400))
    share = torch.bincount(ids.flatten().long(), minlength=256).sort(descending=True).values
    top = share[:16].sum() / share.sum()  # a sixteenth of the experts
    assert (top > 0.3) == (distribution != "uniform")


def test_link_bytes_are_those_of_the_formats_table():
    rows = [entry.payload + entry.scales for entry in link_bytes(PRESETS["deepseek-v3"])]
    assert rows == [14336, 14336, 7172, 7392, 7392, 4032, 3808]
    by_wire = {entry.wire: entry for entry in link_bytes(PRESETS["gpt-oss-120b"])}
    assert "2880" in by_wire["fp8_block128"].reason
    assert by_wire["bf16"].total == 5760 + 4 * 8


def test_distinct_ranks_of_uniform_routing():
    geometry = PRESETS["deepseek-v3"]
    assert distinct_ranks(geometry, 1) == 1
    ids = draw("uniform", geometry, 4000, torch.Generator().manual_seed(0)).topk_ids
    seen = destinations(ids, 256, 8).sum(1).float().mean()
    assert distinct_ranks(geometry, 8) == pytest.approx(float(seen), rel=0.01)


def test_wires_that_do_not_fit_are_said_and_left_out():
    wires, reasons = fitting_wires(PRESETS["gpt-oss-120b"], 2, ["bf16", "fp8_block128"], "bf16")
    assert wires == ("bf16",)
    assert "128" in reasons["fp8_block128"]
    with pytest.raises(UsageError, match="hidden_size=100"):
        fitting_wires(Geometry("odd", 100, 8, 2), 2, ["bf16"], "bf16")


@pytest.fixture(params=["bf16", "fp8", "nvfp4"])
def round_of_two(request):
    """The oracle of rank 1 of two, and what a faultless dispatch would deliver there."""
    wire = request.param
    sweep = Sweep(SMALL, 2, (6,), (wire,), "bf16", (), "uniform", 5, False, Effort(1, 0.0, 1))
    inputs = [InputSource(sweep).of(rank, 6, wire) for rank in range(2)]
    oracle = Oracle(sweep.spec(wire), 1, inputs, "planted")
    given: dict[str, torch.Tensor] = {}
    for name in ("x", "scales", "topk_ids", "topk_weights"):
        parts = [getattr(rows, name) for rows in oracle.received]
        if parts[0] is None:
            given[name] = None
            continue
        fill = -1 if name == "topk_ids" else 0
        whole = torch.full((2, 6, parts[0].shape[1]), fill).to(parts[0].dtype)
        for source, part in enumerate(parts):
            whole[source, : part.shape[0]] = part
        given[name] = whole
    counts = [rows.topk_ids.shape[0] for rows in oracle.received]
    given["counts"] = torch.tensor(counts, dtype=torch.int32)
    return oracle, given


def flip(tensor: torch.Tensor, *place: int) -> None:
    tensor.view(torch.uint8)[place] ^= 0x10


def test_the_oracle_finds_one_wrong_byte(round_of_two):
    oracle, given = round_of_two
    oracle.check_received(**given)
    for name, region in [("x", "payload"), ("scales", "scales"), ("topk_weights", "topk_weights")]:
        if given[name] is None:
            continue
        flip(given[name], 1, 2, 3)
        with pytest.raises(
            CheckFailed, match=f"rank 1, source 1, row 2, region {region}, byte 3: expected .+given"
        ):
            oracle.check_received(**given)
        flip(given[name], 1, 2, 3)
    oracle.check_received(**given)


def test_the_oracle_finds_wrong_counts_and_padding(round_of_two):
    oracle, given = round_of_two
    padded = [source for source in range(2) if int(given["counts"][source]) < 6]
    assert padded, "another seed: every token went everywhere"
    flip(given["topk_ids"], padded[0], 5, 0)
    with pytest.raises(CheckFailed, match="padding behind"):
        oracle.check_received(**given)
    given["counts"][0] += 1
    with pytest.raises(CheckFailed, match="counts"):
        oracle.check_received(**given)


def test_the_oracle_finds_a_wrong_sum(round_of_two):
    oracle, _ = round_of_two
    out = oracle.combined.clone()
    oracle.check_combined(out)
    flip(out, 4, 9)
    with pytest.raises(CheckFailed, match="combine on rank 1, row 4, region out, byte 9"):
        oracle.check_combined(out)


def test_the_json_tells_nothing_about_whose_machine_it_was():
    argv = ["bench", "--out", "/home/ada/results", "--routing=/data/ada/r.npz", "--tokens", "1,8"]
    said = json.dumps(circumstances(argv))
    assert "ada" not in said
    shown = "bench --out results --routing=r.npz --tokens 1,8"
    assert shown_command(argv) == f"python -m moe_a2a {shown}"


def test_plot_of_one_point(tmp_path):
    case = {"kind": "backend", "name": "shm", "wire": "bf16", "tokens": 8}
    case["pair_us"] = {"median": 12.0, "p10": 11.0, "p90": 13.0}
    geometry = SMALL._asdict()
    document = {"geometry": geometry, "ep_size": 2, "routing": "uniform", "cases": [case]}
    write_plot(document, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "mxfp4"], "--weights is of experts: only with --layer"),
        (["--intermediate", "64"], "--intermediate is of experts: only with --layer"),
        (["--expert-backend", "emulated"], "--expert-backend is of experts: only with --layer"),
        (["--layer", "--host-overhead"], "--layer and --host-overhead: give one of the two"),
        (["--layer", "--hidden", "16"], "hidden size 16: mxfp4 weights need a multiple of 32"),
    ],
)
def test_no_argument_is_ignored(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_a2a.bench.command.Display", nullcontext)
    monkeypatch.setattr("moe_a2a.bench.command.start_ranks", pytest.fail)
    assert main(["bench", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"python -m moe_a2a bench: {said}\n"


def test_without_a_backend_each_reason_names_its_own(capsys, monkeypatch):
    monkeypatch.setattr(
        backends, "reasons", lambda names, device: {name: f"not {name[0]}" for name in names}
    )
    assert main(["bench", "--layer", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("here: shm: not s; nvlink: not n; collective: not c\n")
