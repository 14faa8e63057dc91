"""Which expert backend is taken, and why the others are not."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import Spec, experts
from moe_a2a.errors import BackendUnavailable, GeometryError, PayloadError
from moe_a2a.experts import ExpertMatrix, ExpertWeights, selection
from moe_a2a.experts.emulated import Emulated
from moe_a2a.formats import FORMATS

SPEC = Spec(1, 2, 1, 64, 4, wire="nvfp4")
ROWS = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
WEIGHTS = ExpertWeights(ExpertMatrix(ROWS), ExpertMatrix(ROWS[..., :32]))


class OnGpus(Emulated):
    name, device_types = "on_gpus", ("cuda",)


class Plain(Emulated):
    name, accepts = "plain", ("bf16",)


class Defers(Emulated):
    name, accepts, expects_unquantized_inputs = "defers", ("bf16",), True


class Old(Emulated):
    name = "old"

    @staticmethod
    def unusable(spec, device, weights):
        return "other 0.5 is installed, 0.6 is needed"


@pytest.fixture
def table(monkeypatch):
    added = {found.name: f"{__name__}:{found.__name__}" for found in (OnGpus, Plain, Defers, Old)}
    last = {"emulated": selection.EXPERTS["emulated"]}
    monkeypatch.setattr(selection, "EXPERTS", added | last)


def test_emulated_takes_every_wire():
    for wire in FORMATS:
        chosen = experts.select(Spec(1, 2, 1, 128, 4, wire=wire), "cpu", wide())
        assert isinstance(chosen, Emulated)
        assert (chosen.name, chosen.invalid_expert_id) == ("emulated", -1)
        assert (chosen.hidden_dim_unpadded, chosen.expects_unquantized_inputs) == (128, False)
        assert wire in chosen.accepts


def wide():
    rows = torch.zeros(2, 64, 128, dtype=torch.bfloat16)
    return ExpertWeights(ExpertMatrix(rows), ExpertMatrix(rows.mT[..., :32].contiguous()))


def test_every_backend_passed_over_has_its_reason(table):
    found = experts.reasons(SPEC, "cpu", WEIGHTS)
    assert found == {
        "on_gpus": "computes with cuda tensors, not cpu",
        "plain": "takes rows of wire bf16, not nvfp4",
        "defers": "quantizes by itself, and wire nvfp4 arrives quantized: open with "
        "Spec(allow_defer=True) and defer",
        "old": "other 0.5 is installed, 0.6 is needed",
        "emulated": None,
    }
    assert type(experts.select(SPEC, "cpu", WEIGHTS)) is Emulated
    assert experts.explain(SPEC, "cpu", WEIGHTS).splitlines() == [
        "experts for bf16 weights, wire nvfp4, on cpu",
        "  on_gpus   not usable: computes with cuda tensors, not cpu",
        "  plain     not usable: takes rows of wire bf16, not nvfp4",
        f"  defers    not usable: {found['defers']}",
        "  old       not usable: other 0.5 is installed, 0.6 is needed",
        "  emulated  chosen",
    ]
    assert experts.reasons(None, "cpu", None)["plain"] is None, "of the machine alone"


def test_the_first_that_can_is_taken(table):
    deferred = Spec(1, 2, 1, 64, 4, wire="nvfp4", allow_defer=True)
    assert type(experts.select(deferred, "cpu", WEIGHTS)).__name__ == "Defers"
    assert "  emulated  usable" in experts.explain(deferred, "cpu", WEIGHTS)
    plain = Spec(1, 2, 1, 64, 4)
    assert type(experts.select(plain, "cpu", WEIGHTS)).__name__ == "Plain"
    assert type(experts.select(plain, "cpu", WEIGHTS, backend="emulated")) is Emulated


def test_a_backend_wanted_that_can_not(table):
    with pytest.raises(BackendUnavailable, match=r"'old' can't be used:\n  old: other 0") as error:
        experts.select(SPEC, "cpu", WEIGHTS, backend="old")
    assert error.value.reasons == {"old": "other 0.5 is installed, 0.6 is needed"}
    with pytest.raises(BackendUnavailable, match=r"no such expert backend.*emulated") as error:
        experts.select(SPEC, "cpu", WEIGHTS, backend="marlin")
    assert list(error.value.reasons) == ["marlin"]


def test_the_reference_is_the_last_resort():
    assert list(experts.EXPERTS)[-1] == "emulated"
    for name in experts.EXPERTS:
        assert experts.load(name).name == name


def test_nothing_usable(monkeypatch):
    only = {"old": f"{__name__}:Old", "on_gpus": f"{__name__}:OnGpus"}
    monkeypatch.setattr(selection, "EXPERTS", only)
    with pytest.raises(BackendUnavailable) as error:
        experts.select(SPEC, "cpu", WEIGHTS)
    assert set(error.value.reasons) == set(only)
    assert "chosen" not in experts.explain(SPEC, "cpu", WEIGHTS)


@pytest.mark.parametrize("spec", [None, "x", 5])
def test_no_spec(spec):
    calls = [experts.select, experts.explain, Emulated]
    for call in calls if spec is None else [*calls, experts.reasons]:
        with pytest.raises(GeometryError, match=f"spec={spec!r}: must be a Spec"):
            call(spec, "cpu", WEIGHTS)
    with pytest.raises(GeometryError, match="spec=None: must be a Spec"):
        WEIGHTS.check_fits(None)
    with pytest.raises(GeometryError, match="weights='x': must be ExpertWeights, or None"):
        experts.reasons(SPEC, "cpu", "x")


@pytest.mark.parametrize("device", ["bogus", "cpu:x", "", None, 5])
def test_no_device(device):
    text = f"device={device!r}: .*must be a device such as 'cpu'"
    for call in (experts.select, experts.explain, experts.reasons, Emulated):
        with pytest.raises(GeometryError, match=text):
            call(SPEC, device, WEIGHTS)
    for call in (WEIGHTS.to, WEIGHTS.w13.to, WEIGHTS.check_on):
        with pytest.raises(GeometryError, match=text):
            call(device)


def test_a_device_that_is_not_there():
    there = torch.cuda.device_count()
    for held in (WEIGHTS, WEIGHTS.w2):
        with pytest.raises(GeometryError, match=f"has {there} CUDA devices"):
            held.to(f"cuda:{there}")
        assert held.to("cpu:0").device.type == "cpu"


def test_the_first_cpu_is_the_cpu():
    assert type(experts.select(SPEC, "cpu:0", WEIGHTS, backend="emulated")) is Emulated
    WEIGHTS.check_on("cpu:0")
    WEIGHTS.to("meta:0").check_on("meta")


def test_weights_that_fit_no_backend():
    for wrong, error in (
        (ExpertWeights(ExpertMatrix(ROWS[:1]), ExpertMatrix(ROWS[:1, :, :32])), GeometryError),
        (wide(), GeometryError),
        (WEIGHTS.to("meta"), PayloadError),
        ("weights", GeometryError),
    ):
        for call in (experts.select, experts.explain):
            with pytest.raises(error):
                call(SPEC, "cpu", wrong)
