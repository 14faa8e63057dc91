"""Where tensors live when nobody says so, and when somebody does; and `AllToAll.check`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec, backends
from moe_a2a.errors import BackendUnavailable, GeometryError, PeerTimeout, StateError
from moe_a2a.group import LocalRank
from moe_a2a.opening import place

HERE = "tests.unit.test_opening"


class OnlyCuda:
    device_types = ("cuda",)

    @staticmethod
    def unusable(spec, group):
        return "there is no GPU"


class Both:
    device_types = ("cpu", "cuda")


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "gpu", f"{HERE}:OnlyCuda")
    monkeypatch.setitem(backends.BACKENDS, "both", f"{HERE}:Both")


@pytest.fixture
def two_gpus(monkeypatch, names):
    """Two CUDA devices, the second of which is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_a_backend_with_a_name_decides(two_gpus):
    assert str(place(None, "gpu", None)) == "cuda:1"
    for name in ("shm", "collective", "both", "no_such_backend"):
        assert str(place(None, name, None)) == "cpu"


@pytest.mark.parametrize(
    ("config", "device"),
    [("cpu:gloo,cuda:nccl", "cuda:1"), ("cuda:nccl", "cuda:1"), ("cpu:gloo,cuda:gloo", "cpu")],
)
def test_auto_goes_where_the_group_is(two_gpus, monkeypatch, config, device):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert str(place(None, "auto", None)) == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(place(None, "auto", None)) == "cpu"


def test_auto_without_a_group(two_gpus):
    assert str(place(None, "auto", None)) == "cpu"
    assert str(place(None, "auto", LocalRank(0, 1, None))) == "cuda:1"


def test_a_named_device_gets_the_index_that_its_tensors_have(two_gpus):
    assert str(place("cuda", "gpu", None)) == "cuda:1"
    assert str(place("cuda:0", "gpu", None)) == "cuda:0"
    assert str(place(torch.device("cpu", 0), "gpu", None)) == "cpu"
    for wrong in ("cuda:2", torch.device("cuda", 7)):
        with pytest.raises(GeometryError, match="2 CUDA devices"):
            place(wrong, "gpu", None)


def test_without_a_gpu_the_backend_says_why(names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (None, "cuda", "cuda:3"):
        with pytest.raises(BackendUnavailable, match="there is no GPU"):
            AllToAll(Spec(1, 4, 1, 32, 4), backend="gpu", device=device)


def test_check_raises_what_was_recorded_and_remembers_it(backend, monkeypatch):
    x, ids, weights = torch.zeros(2, 32).bfloat16(), torch.zeros(2, 1).int(), torch.ones(2, 1)
    with AllToAll(Spec(1, 4, 1, 32, 4), backend=backend) as a2a:
        a2a.check()
        a2a.dispatch(x, ids, weights)
        a2a.check()
        assert a2a.phase == "dispatched"
        late = PeerTimeout("late", ranks=[3], phase="dispatch", round=1, waited=2.0)

        def recorded():
            raise late

        with monkeypatch.context() as patch:
            patch.setattr(a2a._impl, "check", recorded)
            with pytest.raises(PeerTimeout) as caught:
                a2a.check()
            assert caught.value is late
        y = torch.zeros(1, 4, 32, dtype=torch.bfloat16)
        for call in (a2a.check, lambda: a2a.combine(y), lambda: a2a.dispatch(x, ids, weights)):
            with pytest.raises(PeerTimeout, match="late"):
                call()
        a2a.reset()
        a2a.check()
        a2a.dispatch(x, ids, weights)
    with pytest.raises(StateError, match="close"):
        a2a.check()
