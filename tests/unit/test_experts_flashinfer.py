"""The adapter to FlashInfer's experts, against a stand-in that refuses what FlashInfer refuses.

Its kernels themselves are in tests/cuda. H hidden_size, I intermediate size, E local experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from moe_a2a import AllToAll, Received, Spec
from moe_a2a.errors import BackendUnavailable, GeometryError, PayloadError
from moe_a2a.experts import GPT_OSS, SILU, ExpertMatrix, ExpertWeights, deepseek_v4, select
from moe_a2a.experts import flashinfer_sm90 as adapter
from moe_a2a.experts.emulated import Emulated
from moe_a2a.experts.flashinfer_sm90 import FlashInferSm90, prepare

INNER, R = 160, 6


class StandIn:
    """`flashinfer.fused_moe` in torch: the same arguments and checks, another interleaving."""

    def __init__(self):
        self.calls = 0

    def interleave_moe_weights_for_sm90_mixed_gemm(self, weight, quant_type="fp4"):
        assert (weight.dim(), weight.dtype, quant_type) == (3, torch.uint8, "fp4")
        assert weight.is_contiguous()
        return weight.roll(1, -1)

    def interleave_moe_scales_for_sm90_mixed_gemm(self, scales, group_size=32):
        experts, rows, groups = scales.shape
        assert scales.dtype == torch.uint8
        assert rows % 64 == groups % 4 == 0
        return scales.reshape(experts, rows // 64, groups // 4, 16, 16)

    def _matrix(self, weight, scales):
        assert scales.dtype == torch.int32
        scales = scales.view(torch.uint8).reshape(*weight.shape[:2], -1)
        return ExpertMatrix(weight.roll(-1, -1), "mxfp4", scales).dequantize()

    def cutlass_fused_moe(
        self, input, token_selected_experts, token_final_scales, fc1_expert_weights,
        fc2_expert_weights, output_dtype, quant_scales, fc1_expert_biases=None,
        fc2_expert_biases=None, input_sf=None, swiglu_alpha=None, swiglu_beta=None,
        swiglu_limit=None, ep_size=1, ep_rank=0, output=None, use_w4_group_scaling=False,
        use_fused_finalize=True,
    ):  # fmt: skip
        self.calls += 1
        w13 = self._matrix(fc1_expert_weights, quant_scales[0])
        w2 = self._matrix(fc2_expert_weights, quant_scales[1])
        experts, hidden, inner = w2.shape
        assert w13.shape == (experts, 2 * inner, hidden)
        assert (hidden % 128, inner % 128, input.shape[1]) == (0, 0, hidden)
        assert input.dtype == output.dtype == output_dtype == torch.bfloat16
        assert token_selected_experts.dtype == torch.int32
        assert token_final_scales.dtype == torch.float32
        assert all(t.is_contiguous() for t in (input, token_selected_experts, token_final_scales))
        for part in (swiglu_alpha, swiglu_beta, swiglu_limit):
            assert (part.dtype, part.shape) == (torch.float32, (experts,))
        biases = (fc1_expert_biases, fc2_expert_biases)
        assert all(b is None for b in biases) or all(b.dtype == torch.bfloat16 for b in biases)
        assert use_w4_group_scaling
        assert not use_fused_finalize
        total = torch.zeros(len(input), hidden)
        for e in range(experts):
            h = input.float() @ w13[e].T + (0 if biases[0] is None else biases[0][e].float())
            up, gate = h.chunk(2, -1)
            g = gate.minimum(swiglu_limit[e])
            u = up.minimum(swiglu_limit[e]).maximum(-swiglu_limit[e])
            h = (g * torch.sigmoid(swiglu_alpha[e] * g) * (u + swiglu_beta[e])).bfloat16().float()
            y = h @ w2[e].T + (0 if biases[1] is None else biases[1][e].float())
            weight = token_final_scales * (token_selected_experts == ep_rank * experts + e)
            for k in range(weight.shape[1]):
                chosen = weight[:, k] != 0  # rows of other ranks are never multiplied
                total[chosen] += weight[chosen, k, None] * y[chosen]
        output.copy_(total)


@pytest.fixture
def kernels(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(adapter, "_kernels", lambda: found)
    return found


def weights(count, hidden, act=SILU, biases=""):
    drawn = torch.Generator().manual_seed(count + hidden)
    w13 = torch.randn(count, 2 * INNER, hidden, generator=drawn) / hidden**0.5
    w2 = torch.randn(count, hidden, INNER, generator=drawn) / INNER**0.5
    b13 = torch.randn(count, 2 * INNER, generator=drawn).bfloat16() if "1" in biases else None
    b2 = torch.randn(count, hidden, generator=drawn).bfloat16() if "2" in biases else None
    matrices = (ExpertMatrix.quantize(w, "mxfp4") for w in (w13, w2))
    return ExpertWeights(*matrices, act, b13, b2)


def received(spec, rank):
    """As a dispatch would leave it, NaN in padding rows."""
    drawn = torch.Generator().manual_seed(rank)
    shape = (spec.ep_size, R, spec.top_k)
    ids = torch.randint(-1, spec.num_experts + 1, shape, generator=drawn, dtype=torch.int32)
    ids.masked_fill_(ids == spec.num_experts, spec.invalid_expert_id)
    ids.masked_fill_(ids == -1, spec.invalid_expert_id)
    x = torch.randn(spec.ep_size, R, spec.hidden_size, generator=drawn).bfloat16()
    ids[:, R - 2 :], x[:, R - 2 :] = spec.invalid_expert_id, float("nan")
    router = torch.rand(shape, generator=drawn).masked_fill(ids == spec.invalid_expert_id, 0.0)
    counts = torch.full((spec.ep_size,), R - 2, dtype=torch.int32)
    return Received(x, None, ids, router, counts, {}, None, spec, rank, False)


@pytest.mark.parametrize("hidden", [128, 192])
@pytest.mark.parametrize(
    ("act", "biases"), [(SILU, ""), (GPT_OSS, "12"), (deepseek_v4(0.5), "1"), (SILU, "2")]
)
def test_computes_what_the_emulated_backend_does(kernels, hidden, act, biases):
    spec = Spec(2, 5, 3, hidden, 8, invalid_expert_id=-1 if biases else 5)
    for rank in range(2):  # 3 experts, then 2
        held = weights(len(spec.experts_of(rank)), hidden, act, biases)
        recv = received(spec, rank)
        mine = FlashInferSm90(spec, "cpu", held)
        wanted = Emulated(spec, "cpu", held, activations="bf16")(recv).float()
        outs = [None, torch.full_like(wanted, 7).bfloat16(), torch.full_like(wanted, 7)]
        for out in outs:
            got = mine(recv, out=out)
            assert out is None or got is out
            np.testing.assert_allclose(got.float(), wanted, 2**-7, 2**-7)
            assert not got[:, R - 2 :].any()
            assert (mine.hidden_dim_unpadded, got.shape[-1]) == (hidden, hidden)
    assert kernels.calls == 6


def test_writes_where_combine_reads_if_nothing_is_padded(kernels):
    seen = []
    run = kernels.cutlass_fused_moe
    kernels.cutlass_fused_moe = lambda *a, output, use_fused_finalize=True, **more: (
        seen.append(output.data_ptr()),
        run(*a, output=output, use_fused_finalize=use_fused_finalize, **more),
    )
    for hidden, same in ((128, True), (192, False)):
        spec = Spec(1, 3, 2, hidden, R)
        out = torch.empty(1, R, hidden, dtype=torch.bfloat16)
        FlashInferSm90(spec, "cpu", weights(3, hidden))(received(spec, 0), out=out)
        assert (seen.pop() == out.data_ptr()) == same


@pytest.mark.parametrize("wire", ["fp16", "mxfp8", "nvfp4"])
def test_rows_of_any_wire_are_decoded_to_bf16(kernels, wire):
    spec = Spec(1, 3, 2, 128, R, wire=wire)
    held = weights(3, 128)
    recv = received(spec, 0)
    with AllToAll(spec, backend="shm") as a2a:
        x = recv.x[0, :3].half() if wire == "fp16" else recv.x[0, :3]
        got = a2a.dispatch(x, recv.topk_ids[0, :3], recv.topk_weights[0, :3])
        mine = FlashInferSm90(spec, "cpu", held)(got)
        wanted = Emulated(spec, "cpu", held, activations="bf16")(got)
        np.testing.assert_allclose(mine.float(), wanted.float(), 2**-6, 2**-7)


def test_no_rows_and_no_experts_are_no_call(kernels):
    spec = Spec(2, 1, 1, 128, R)
    none = weights(0, 128)
    out = torch.full((2, R, 128), 7.0)
    assert not FlashInferSm90(spec, "cpu", none)(received(spec, 1), out=out).any()
    recv = received(spec, 0)
    parts = ("x", "topk_ids", "topk_weights")
    empty = replace(recv, **{part: getattr(recv, part)[:, :0] for part in parts})
    assert FlashInferSm90(spec, "cpu", weights(1, 128))(empty).shape == (2, 0, 128)
    assert not kernels.calls


def test_wrong_weights_and_rows(kernels):
    spec = Spec(1, 2, 1, 128, R)
    plain = ExpertMatrix(torch.zeros(2, 64, 128, dtype=torch.bfloat16))
    other = ExpertWeights(plain, ExpertMatrix.quantize(torch.zeros(2, 128, 32), "mxfp4"))
    for wrong, error, said in (
        (other, GeometryError, "takes mxfp4 weights, not bf16 and mxfp4"),
        (weights(3, 128), GeometryError, "hold 3 experts"),
        (weights(2, 128).to("meta"), PayloadError, "the weights are on meta"),
        (None, GeometryError, "must be ExpertWeights"),
    ):
        with pytest.raises(error, match=said):
            FlashInferSm90(spec, "cpu", wrong)
    mine = FlashInferSm90(spec, "cpu", weights(2, 128))
    with pytest.raises(PayloadError, match="these experts are for"):
        mine(received(Spec(1, 2, 1, 128, R + 1), 0))
    recv = received(spec, 0)
    with pytest.raises(PayloadError, match=r"recv\.x is on meta: the weights are on cpu"):
        mine(replace(recv, x=recv.x.to("meta")))


@pytest.mark.parametrize(
    ("found", "good"),
    [
        ("0.6.11", True), ("0.6.18.post1", True), ("0.6.11+cu128", True), ("0.10", True),
        ("1.0.0rc1", True), ("0.6.10", False), ("0.6.11rc1", False), ("0.6.11.dev2", False),
        ("0.6", False), ("unknown", False),
    ],
)  # fmt: skip
def test_versions(monkeypatch, found, good):
    monkeypatch.setattr(adapter, "version", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    why = FlashInferSm90.unusable(None, torch.device("cuda"), None)
    if good:
        assert why == "is for compute capability 9.0 (Hopper), not 10.0"
    else:
        assert why == (
            f"flashinfer-python {found} is installed: flashinfer-python >= 0.6.11 is needed"
        )


def test_reasons_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda name: "0.6.18")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    held = weights(2, 128).to("meta")
    square = torch.zeros(1, 64, 64)
    plain = ExpertWeights(ExpertMatrix(square, "fp32"), ExpertMatrix(square[..., :32], "fp32"))
    place = torch.device("cuda")
    assert FlashInferSm90.unusable(None, place, plain) == "takes mxfp4 weights, not fp32"
    for compiled in (True, False):
        module = type("Module", (), {"is_compiled": compiled})

        def package(name, module=module):
            assert name == "flashinfer.fused_moe"
            found = StandIn()
            found.gen_cutlass_fused_moe_sm90_module = module
            return found

        adapter._uncompiled.cache_clear()
        monkeypatch.setattr(adapter, "import_module", package)
        why = FlashInferSm90.unusable(None, place, held)
        assert (why is None) == compiled
    assert "not compiled" in why
    adapter._uncompiled.cache_clear()
    monkeypatch.setattr(adapter, "import_module", lambda name: torch.nn)
    assert "AttributeError" in FlashInferSm90.unusable(None, place, held)
    adapter._uncompiled.cache_clear()


def test_asked_for_by_name_where_it_is_not_installed(monkeypatch):
    def missing(name):
        raise adapter.PackageNotFoundError

    monkeypatch.setattr(adapter, "version", missing)
    monkeypatch.setattr(FlashInferSm90, "device_types", ("cpu", "cuda"))
    with pytest.raises(BackendUnavailable) as error:
        select(Spec(1, 2, 1, 128, R), "cpu", weights(2, 128), backend="flashinfer_sm90")
    assert error.value.reasons == {
        "flashinfer_sm90": "flashinfer-python is not installed: flashinfer-python >= 0.6.11 is "
        "needed"
    }


def test_weights_are_what_flashinfers_own_helpers_make():
    """The part of them that is plain torch; the other one needs a GPU, see tests/cuda."""
    helpers = pytest.importorskip(
        "flashinfer.fused_moe", reason="no FlashInfer to compare with", exc_type=ImportError
    )

    class Folding(StandIn):
        interleave_moe_scales_for_sm90_mixed_gemm = staticmethod(
            helpers.interleave_moe_scales_for_sm90_mixed_gemm
        )

    held = weights(3, 192, GPT_OSS, "12")
    found = prepare(held, Folding())
    gate, up = held.w13.scales.chunk(2, 1)
    sides = [pad(part, (0, 2, 0, 96)) for part in (up, gate)]
    w13 = helpers.interleave_moe_scales_for_sm90_mixed_gemm(torch.cat(sides, 1))
    w2 = helpers.interleave_moe_scales_for_sm90_mixed_gemm(pad(held.w2.scales, (0, 3, 0, 64)))
    for mine, theirs in zip(found.scales, (w13, w2), strict=True):
        assert torch.equal(mine, theirs.view(torch.int32))
    assert found.limit.tolist() == [7.0] * 3
    assert not math.isinf(found.alpha[0])
