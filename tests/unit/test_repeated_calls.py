"""Tensors like those of the round before take a short way past the rules: a call that went well
must not let a wrong one through. T tokens, H hidden_size, R runtime_max_tokens."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.errors import CapacityError, PayloadError, StateError

T, H, K, CAPACITY = 3, 32, 2, 4
SPEC = Spec(1, 4, K, H, CAPACITY, wire="fp8", combine_wire="mxfp8", allow_defer=True)
X = torch.randn(T, H).bfloat16()
IDS = torch.tensor([[0, 3], [1, 2], [-1, 9]], dtype=torch.int32)
WEIGHTS = torch.ones(T, K)
Y = torch.randn(1, CAPACITY, H).bfloat16()


@pytest.fixture
def a2a():
    with AllToAll(SPEC, backend="shm") as opened:
        for _ in range(2):
            opened.dispatch(X, IDS, WEIGHTS)
            opened.combine(Y)
            opened.dispatch(X, IDS, WEIGHTS)
            opened.combine(Y, out=torch.empty_like(X))
        yield opened


def across(tensor):
    """The same values, columns first."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights"])
def test_each_input_is_looked_at_in_every_dispatch(a2a, name):
    given = {"x": X, "topk_ids": IDS, "topk_weights": WEIGHTS}
    right = given[name]
    wrong = [across(right), right[:2], right[:, :1], right.double(), right.to("meta")]
    wrong += [right.to_sparse(), right.tolist(), None]
    wrong += [right.clone().requires_grad_()] if right.dtype.is_floating_point else []
    recv = a2a.dispatch(X, IDS, WEIGHTS, defer=True)  # its views are of these very kinds
    a2a.combine(Y)
    a2a.dispatch(X, IDS, WEIGHTS)
    a2a.combine(Y)
    wrong.append(getattr(recv, name)[0, :T])
    for value in wrong:
        with pytest.raises(PayloadError):
            a2a.dispatch(**given | {name: value})
        assert a2a.phase == "idle"
    a2a.dispatch(**given)


def test_r_and_deferral_are_looked_at_in_every_dispatch(a2a):
    for rows in (2, -1, 5, 3.0, True):
        with pytest.raises(CapacityError):
            a2a.dispatch(X, IDS, WEIGHTS, runtime_max_tokens=rows)
    with pytest.raises(PayloadError, match="to defer"):
        a2a.dispatch(X.float(), IDS, WEIGHTS, defer=True)
    a2a.dispatch(X.float(), IDS, WEIGHTS)
    a2a.combine(Y)
    with pytest.raises(PayloadError, match="to defer"):
        a2a.dispatch(X.float(), IDS, WEIGHTS, defer=True)
    with pytest.raises(StateError):
        a2a.combine(Y)


def test_y_is_looked_at_in_every_combine(a2a):
    recv = a2a.dispatch(X, IDS, WEIGHTS, defer=True)
    wrong = [Y[:, :3], Y.double(), Y.to("meta"), Y.clone().requires_grad_(), Y.to_sparse(), None]
    wrong += [Y.transpose(1, 2).contiguous().transpose(1, 2), recv.x]
    for y in wrong:
        with pytest.raises(PayloadError):
            a2a.combine(y)
        assert a2a.phase == "dispatched"
    a2a.combine(Y)
    a2a.dispatch(X, IDS, WEIGHTS, runtime_max_tokens=3)
    with pytest.raises(PayloadError, match="R=3"):
        a2a.combine(Y)


def test_out_is_looked_at_in_every_combine(a2a):
    a2a.dispatch(X, IDS, WEIGHTS)
    out = torch.empty_like(X)
    wrong = [out[:2], out.float(), across(out), out[:1].expand(T, H), out.to_sparse(), "out"]
    wrong += [Y[0, :T], Y[0, 1:], out.clone().requires_grad_(), out.to("meta")]
    for value in wrong:
        with pytest.raises(PayloadError):
            a2a.combine(Y, out=value)
        assert a2a.phase == "dispatched"
    a2a.combine(Y, out=out)


def test_out_and_a_y_whose_gradient_nobody_records(a2a):
    """The extent of y is that of this round's y, not of the last one that was remembered."""
    memory = torch.zeros(2 * CAPACITY, H, dtype=torch.bfloat16)
    a2a.dispatch(X, IDS, WEIGHTS, runtime_max_tokens=3)
    a2a.combine(memory[:3].view(1, 3, H), out=torch.empty_like(X))
    a2a.dispatch(X, IDS, WEIGHTS)
    y = memory[:CAPACITY].view(1, CAPACITY, H).detach().requires_grad_()
    with torch.no_grad(), pytest.raises(PayloadError, match="shares memory"):
        a2a.combine(y, out=memory[3 : 3 + T])


def test_a_token_more_or_less(a2a):
    for tokens in (1, 3, 4, 0, 2, 2):
        x = torch.ones(tokens, H, dtype=torch.bfloat16)
        ids = torch.zeros(tokens, K, dtype=torch.int32)
        assert a2a.dispatch(x, ids, torch.ones(tokens, K)).counts.tolist() == [tokens]
        assert a2a.combine(Y).shape == (tokens, H)


def test_what_passed_where_no_gradient_is_recorded_is_refused_where_one_is(a2a):
    x, weights, y, out = (t.clone().requires_grad_() for t in (X, WEIGHTS, Y, torch.empty_like(X)))
    for _ in range(2):
        with torch.no_grad():
            a2a.dispatch(x, IDS, weights)
            a2a.combine(y, out=out)
        for given in ((x, IDS, weights), (x, IDS, WEIGHTS), (X, IDS, weights)):
            with pytest.raises(PayloadError, match="requires grad"):
                a2a.dispatch(*given)
        a2a.dispatch(X, IDS, WEIGHTS)
        with pytest.raises(PayloadError, match="y requires grad"):
            a2a.combine(y)
        with pytest.raises(PayloadError, match="out requires grad"):
            a2a.combine(Y, out=out)
        with torch.no_grad():
            a2a.combine(y, out=out)


def test_the_receive_views_after_a_reset(a2a):
    windows = []
    for _ in range(3):
        a2a.reset()
        windows.append(a2a.dispatch(X, IDS, WEIGHTS, defer=True).x)  # held: a new address each
        with pytest.raises(PayloadError, match="receive views"):
            a2a.combine(windows[-1])
        a2a.combine(Y)
