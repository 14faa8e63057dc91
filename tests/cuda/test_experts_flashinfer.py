"""FlashInfer's experts on Hopper: weights in its own order, and what its kernels make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from moe_a2a import Spec
from moe_a2a.experts import GPT_OSS, SILU, select
from moe_a2a.experts.emulated import Emulated
from moe_a2a.experts.flashinfer_sm90 import FlashInferSm90, prepare
from tests import oracle_experts as oracle
from tests.unit.test_experts_flashinfer import received, weights

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def kernels():
    reason = FlashInferSm90.unusable(None, DEVICE, None)
    if reason is not None:
        pytest.skip(reason)
    return __import__("flashinfer.fused_moe").fused_moe


@pytest.mark.parametrize("hidden", [128, 192])
def test_weights_are_what_flashinfers_own_helpers_make(kernels, hidden):
    held = weights(3, hidden, GPT_OSS, "12").to(DEVICE)
    found = prepare(held, kernels)
    to, inner = -hidden % 128, 96  # of I = 160
    gate, up = held.w13.payload.chunk(2, 1)
    w13 = torch.cat([pad(part, (0, to // 2, 0, inner)) for part in (up, gate)], 1)
    w2 = pad(held.w2.payload, (0, inner // 2, 0, to))
    gate, up = held.w13.scales.chunk(2, 1)
    s13 = torch.cat([pad(part, (0, to // 32, 0, inner)) for part in (up, gate)], 1)
    s2 = pad(held.w2.scales, (0, inner // 32, 0, to))
    for mine, theirs in ((found.w13, w13), (found.w2, w2)):
        wanted = kernels.interleave_moe_weights_for_sm90_mixed_gemm(theirs.contiguous(), "fp4")
        assert torch.equal(mine, wanted)
        assert not torch.equal(mine, theirs)
    for mine, theirs in zip(found.scales, (s13, s2), strict=True):
        wanted = kernels.interleave_moe_scales_for_sm90_mixed_gemm(theirs)
        assert torch.equal(mine, wanted.view(torch.int32))


@pytest.mark.parametrize(("act", "biases"), [(SILU, ""), (GPT_OSS, "12"), (GPT_OSS, "1")])
@pytest.mark.parametrize("hidden", [128, 192])
def test_computes_what_the_emulated_backend_does(hidden, act, biases):
    spec = Spec(2, 5, 3, hidden, 8, invalid_expert_id=-1 if biases else 5)
    for rank in range(2):
        held = weights(len(spec.experts_of(rank)), hidden, act, biases).to(DEVICE)
        recv = received(spec, rank)
        moved = {
            n: getattr(recv, n).to(DEVICE) for n in ("x", "topk_ids", "topk_weights", "counts")
        }
        recv = replace(recv, **moved)
        mine = select(spec, DEVICE, held, backend="flashinfer_sm90")
        wanted = Emulated(spec, DEVICE, held, activations="bf16")(recv)
        for out in (None, torch.full_like(wanted, float("nan"))):
            got = mine(recv, out=out)
            assert not got[:, -2:].any(), "padding rows, which arrived as NaN"
            torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1)
            assert oracle.distance(got.double().cpu().numpy(), wanted.double().cpu().numpy()) < 1e-4
            assert torch.equal(got, mine(recv)), "two runs differ"
