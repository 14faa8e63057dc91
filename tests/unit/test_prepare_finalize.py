"""PrepareFinalize on one rank: what it changes on the way in and out, and nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from moe_a2a import AllToAll, PrepareFinalize, Spec
from moe_a2a.errors import GeometryError, PayloadError, StateError
from tests.formats_cases import raw

T, H = 5, 64
X = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).bfloat16()
IDS = torch.tensor([[0], [3], [-1], [2], [9]])
WEIGHTS = torch.rand(T, 1, generator=torch.Generator().manual_seed(2))
REAL = [0, 1, 3]  # the tokens that go somewhere


def opened(backend, **more):
    options = {"wire": "nvfp4", "allow_defer": True} | more
    return AllToAll(Spec(1, 4, 1, H, 8, **options), backend=backend)


def bf16(array):
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("quant", ["wire", "defer"])
def test_quantizes_or_defers(backend, quant):
    for keywords in ({}, {"defer_input_quant": True}, {"defer": True}):
        check_prepared(backend, quant, keywords)


def check_prepared(backend, quant, keywords):
    with opened(backend) as a2a:
        prepared = PrepareFinalize(a2a, quant).prepare(X, WEIGHTS, IDS, **keywords)
        deferred = quant == "defer" or len(keywords) > 0
        assert (prepared.scales is None) == deferred
        assert prepared.x.dtype == (torch.bfloat16 if deferred else torch.uint8)
        assert prepared.received.counts is prepared.counts
        if deferred:
            assert torch.equal(prepared.x[0, :3], X[REAL])
        assert prepared.topk_weights[0, :3, 0].tolist() == WEIGHTS[REAL, 0].tolist()


def test_deferring_needs_room_and_an_unquantized_wire_has_nothing_to_defer(backend):
    with opened(backend, allow_defer=False) as a2a:
        with pytest.raises(PayloadError, match="allow_defer=True"):
            PrepareFinalize(a2a, "defer").prepare(X, WEIGHTS, IDS)
        assert a2a.phase == "idle"
    with opened(backend, wire="bf16", allow_defer=False) as a2a:
        assert PrepareFinalize(a2a, "defer").prepare(X, WEIGHTS, IDS).scales is None
    with pytest.raises(GeometryError, match="later"):
        PrepareFinalize(a2a, "later")


def test_router_weight_on_input(backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_weighted(backend, dtype)


def check_weighted(backend, dtype):
    x = X.to(dtype)
    before = x.clone()
    product = (x.float().numpy() * WEIGHTS.numpy()).astype(np.float32)
    wanted = torch.from_numpy(product).to(dtype)
    with opened(backend) as a2a:
        both = PrepareFinalize(a2a)
        weighted = both.prepare(x, WEIGHTS, IDS, apply_router_weight_on_input=True)
        assert torch.equal(x, before), "never in place"
        assert weighted.topk_weights[0, :3, 0].tolist() == [1.0] * 3
        got = raw(weighted.x).copy(), raw(weighted.scales).copy()
        both.finalize(a2a.combine_buffer().zero_())
        direct = both.prepare(wanted, WEIGHTS, IDS)
        assert np.array_equal(got[0][0, :3], raw(direct.x)[0, :3])
        assert np.array_equal(got[1][0, :3], raw(direct.scales)[0, :3])


def test_router_weight_on_input_needs_top_k_1(backend):
    with AllToAll(Spec(1, 4, 2, H, 8), backend=backend) as a2a:
        both = PrepareFinalize(a2a)
        ids, weights = IDS.repeat(1, 2), WEIGHTS.repeat(1, 2)
        with pytest.raises(PayloadError, match="top_k=2"):
            both.prepare(X, weights, ids, apply_router_weight_on_input=True)
        assert a2a.phase == "idle"
        both.prepare(X, weights, ids)


@pytest.mark.parametrize("with_shared", [False, True])
def test_finalize_scales_and_adds_the_shared_experts(backend, with_shared):
    for factor in (None, 2.5, 0.1):
        check_finalized(backend, factor, with_shared)


def check_finalized(backend, factor, with_shared):
    rng = np.random.default_rng(3)
    y = torch.from_numpy(rng.standard_normal((1, 8, H)).astype(np.float32)).bfloat16()
    shared = torch.from_numpy(rng.standard_normal((T, H)).astype(np.float32)).bfloat16()
    combined = np.zeros((T, H), np.float32)
    combined[REAL] = y[0, :3].float().numpy()
    wanted = combined * np.float32(1.0 if factor is None else factor)
    wanted = bf16(wanted + (shared.float().numpy() if with_shared else np.float32(0)))
    given = shared if with_shared else None
    out = torch.full((T, 2 * H), 7.0, dtype=torch.bfloat16)[:, 3 : H + 3]
    memory = [None, out] + ([shared.clone()] if with_shared else [])
    with opened(backend) as a2a:
        both = PrepareFinalize(a2a)
        for into in memory:
            both.prepare(X, WEIGHTS, IDS)
            added = into if into is not None and into is not out else given
            got = both.finalize(y, out=into, routed_scaling_factor=factor, shared=added)
            assert into is None or got is into
            assert got.dtype == torch.bfloat16
            assert np.array_equal(got.float().numpy(), wanted), "also where out is shared"


def test_finalize_wants_a_dispatch_whatever_it_is_given(backend):
    with opened(backend) as a2a:
        for more in ({}, {"shared": torch.zeros(3, 5)}, {"routed_scaling_factor": "x"}):
            with pytest.raises(StateError, match="finalize in phase 'idle': dispatch comes first"):
                PrepareFinalize(a2a).finalize(torch.zeros(1), **more)


def test_a_wrong_shared_is_refused_before_anything_is_sent(backend):
    y = torch.zeros(1, 8, H, dtype=torch.bfloat16)
    with opened(backend) as a2a:
        both = PrepareFinalize(a2a)
        both.prepare(X, WEIGHTS, IDS)
        for shared, text in (
            (torch.zeros(T + 1, H), r"\[6, 64\].*\[5, 64\]"),
            (torch.zeros(T, H, dtype=torch.int32), "int32.*floating"),
            (3.0, "float"),
        ):
            with pytest.raises(PayloadError, match=text):
                both.finalize(y, shared=shared)
            assert a2a.phase == "dispatched"
        assert both.finalize(y, shared=torch.ones(T, H)).sum() == T * H
