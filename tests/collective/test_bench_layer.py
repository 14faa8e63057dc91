"""``bench --layer`` as people start it, and that it times nothing that is wrong."""

from __future__ import annotations

import json

import pytest

from moe_a2a.bench import layer_rivals
from moe_a2a.bench.cases import Effort, Geometry, Sweep
from moe_a2a.bench.check import CheckFailed
from moe_a2a.bench.layer import LayerSweep
from moe_a2a.bench.layer_points import run_layers
from moe_a2a.experts.emulated import Emulated
from moe_a2a.received import Received
from moe_a2a.testing import run_ranks
from tests.collective.test_bench_cli import run
from tests.conftest import PRELOAD

TINY = ["--hidden", "128", "--experts", "6", "--top-k", "2", "--intermediate", "64"]


@pytest.mark.slow
def test_quick_run_checks_times_and_writes(tmp_path):
    wires = "bf16,nvfp4"
    done = run("--layer", "--quick", *TINY, "--ranks", "2", "--wire", wires, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("layer-*.json")
    assert path.with_suffix(".png").is_file()
    document = json.loads(path.read_text())
    found = {(case["name"], case["wire"], case["tokens"]) for case in document["cases"]}
    ours = {(b, w, t) for b in ("shm", "collective") for w in wires.split(",") for t in (1, 16)}
    assert found == ours | {("gloo all-gather", "bf16", t) for t in (1, 16)}
    for case in document["cases"]:
        assert sum(case["shares"].values()) == pytest.approx(1)
        assert len(case["per_rank"]) == 2
    assert f"[{len(found)}/{len(found)}]" in done.stderr
    assert str(tmp_path) not in path.read_text()
    assert all(word in done.stdout for word in ("emulated", "exp.", "mxfp4 weights", str(path)))
    path.with_suffix(".png").unlink()
    assert run("--replot", str(path)).returncode == 0
    assert path.with_suffix(".png").is_file()


def test_a_wrong_argument_is_one_sentence_and_exit_code_2():
    done = run("--layer", *TINY, "--expert-backend", "marlin")
    assert done.returncode == 2
    assert "no such backend; there are" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def spoiled_experts(before):
    """Right experts that forget the router's weights."""

    def experts(self, recv, *, out=None):
        ones = recv.topk_weights * 0 + 1
        return before(self, Received(**{**recv.__dict__, "topk_weights": ones}), out=out)

    return experts


def spoiled_gather(before):
    """An all-gather that brings ids to the tokens of another rank."""

    def prepare(self):
        before(self)
        self._all[1].copy_(self._all[1].flip(0))

    return prepare


SPOILED = {
    "nothing": (Emulated, "__call__", lambda before: before),
    "experts": (Emulated, "__call__", spoiled_experts),
    "gather": (layer_rivals.GatherLayer, "prepare", spoiled_gather),
}


def play(ranks, weights):
    """What the check says, on this rank, and the points that it comes to: by what is spoiled."""
    geometry, effort = Geometry("custom", 128, 6, 2), Effort(2, 0.0, 1)
    own = (geometry, ranks.size, (5,), ("bf16", "mxfp4"), "bf16", ("shm",), "uniform", 0, True)
    found = {}
    for what, (owner, name, spoil) in SPOILED.items():
        told, before = [], getattr(owner, name)
        setattr(owner, name, spoil(before))
        try:
            run_layers(LayerSweep(Sweep(*own, effort), 64, weights, None), told.append)
            found[what] = None, [case["name"] for case in told[-1].cases]
        except CheckFailed as error:
            found[what] = str(error), [event.label for event in told]
        finally:
            setattr(owner, name, before)
    return found


@pytest.mark.parametrize("weights", ["bf16", "nvfp4"])
def test_what_is_wrong_is_not_timed(weights):
    for ended in run_ranks(2, play, weights, preload=PRELOAD):
        assert ended.exitcode == 0, ended.error
        found = ended.result
        assert found["nothing"] == (None, ["shm", "gloo all-gather", "shm"])
        for what, points in (("experts", 1), ("gather", 2)):
            error, labels = found[what]
            assert "from the layer in float64" in error
            assert len(labels) == points
            assert error.startswith(f"{labels[-1]}, rank ")
