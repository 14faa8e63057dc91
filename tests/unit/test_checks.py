"""Arguments that are right although they look odd, on one rank and without torch.distributed."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, Spec

SPEC = Spec(1, 4, 1, 32, 4)
WEIGHTS = torch.ones(3, 1)
IDS = torch.tensor([[0], [3], [7]])
X = torch.arange(96.0).view(3, 32).bfloat16()


@pytest.fixture(params=["shm", "collective"])
def a2a(request):
    with AllToAll(SPEC, backend=request.param) as opened:
        yield opened


def test_one_rank_by_itself(a2a):
    assert (a2a.ep_rank, a2a.first_expert, a2a.num_local_experts) == (0, 0, 4)
    assert (str(a2a.device), a2a.spec, a2a.phase) == ("cpu", SPEC, "idle")
    recv = a2a.dispatch(X, IDS, WEIGHTS)
    assert recv.counts.tolist() == [2]
    assert torch.equal(recv.x[0, :2], X[:2])
    assert torch.equal(
        a2a.combine(recv.x.clone()), torch.cat([X[:2], torch.zeros(1, 32)]).bfloat16()
    )
    a2a.reset()
    assert a2a.dispatch(X, IDS, WEIGHTS).counts.tolist() == [2]


def no_rows(width, dtype, stride):
    return torch.empty(0, dtype=dtype).as_strided((0, width), stride)


def test_no_tokens_with_any_strides(a2a):
    """numpy gives an array without rows strides (0, 0), and torch calls all these contiguous."""
    for stride in ((0, 0), (1, 5), (32, 1)):
        x = no_rows(32, torch.bfloat16, stride)
        assert x.is_contiguous()
        recv = a2a.dispatch(x, no_rows(1, torch.int32, stride), no_rows(1, torch.float32, stride))
        assert recv.counts.tolist() == [0]
        out = no_rows(32, torch.bfloat16, stride)
        assert a2a.combine(torch.zeros(1, 4, 32, dtype=torch.bfloat16), out=out).shape == (0, 32)


def test_one_column_with_any_stride(a2a):
    """[T, 1] of a transposed tensor: its last stride means nothing."""
    ids, weights = (t.clone().as_strided((3, 1), (1, 3)) for t in (IDS, WEIGHTS))
    assert ids.stride() == (1, 3)
    assert a2a.dispatch(X, ids, weights).counts.tolist() == [2]


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_scales_of_one_column_with_any_stride(backend):
    with AllToAll(Spec(1, 4, 1, 32, 4, wire="fp8"), backend=backend) as a2a:
        scales = torch.arange(3.0).as_strided((3, 1), (1, 3))
        recv = a2a.dispatch(X.to(torch.float8_e4m3fn), IDS, WEIGHTS, scales=scales)
        assert recv.scales[0, :2, 0].tolist() == [0.0, 1.0]


def test_one_row_and_expanded_rows(a2a):
    recv = a2a.dispatch(X[:1].expand(3, 32), IDS[:1].expand(3, 1), WEIGHTS[:1].expand(3, 1))
    assert torch.equal(recv.x[0, :3], X[:1].expand(3, 32))
    a2a.combine(torch.zeros(1, 4, 32, dtype=torch.bfloat16))
    wide = torch.zeros(1, 64, dtype=torch.bfloat16)[:, 16:48]
    assert a2a.dispatch(wide, IDS[:1], WEIGHTS[:1]).counts.tolist() == [1]
