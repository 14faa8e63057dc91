"""The emulated experts on a GPU: what they compute on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.experts import GPT_OSS, WEIGHT_FORMATS, ExpertMatrix, ExpertWeights, select
from tests.oracle_experts import far_rows

DEVICE = "cuda"
E, H, INNER, T = 5, 128, 256, 40


def weights(form):
    drawn = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, 2 * INNER, H, generator=drawn) / H**0.5
    w2 = torch.randn(E, H, INNER, generator=drawn) / INNER**0.5
    b13, b2 = torch.randn(E, 2 * INNER, generator=drawn), torch.randn(E, H, generator=drawn)
    matrices = (ExpertMatrix.quantize(w, form) for w in (w13, w2))
    return ExpertWeights(*matrices, GPT_OSS, b13, b2)


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_the_device_makes_no_difference(form):
    drawn = torch.Generator().manual_seed(1)
    wire = form if form in ("fp8", "nvfp4") else "bf16"
    spec = Spec(1, E, 2, H, T, wire=wire, combine_wire="fp32")
    x = torch.randn(T - 3, H, generator=drawn).bfloat16()
    ids = torch.randint(-1, E, (T - 3, 2), generator=drawn)
    held = weights(form)
    with AllToAll(spec, backend="shm", device="cpu") as a2a:
        recv = a2a.dispatch(x, ids, torch.rand(T - 3, 2, generator=drawn))
        here = select(spec, "cpu", held)(recv)
        parts = ("x", "scales", "topk_ids", "topk_weights", "counts")
        there = {part: getattr(recv, part) for part in parts}
        there = {part: None if t is None else t.to(DEVICE) for part, t in there.items()}
        on_device = select(spec, DEVICE, held.to(DEVICE), backend="emulated")
        first, again = on_device(replace(recv, **there)), on_device(replace(recv, **there))
    assert first.device.type == torch.device(DEVICE).type
    assert torch.equal(first, again), "two runs differ"
    assert not first[0, len(x) :].any()
    assert far_rows(first[0].cpu().double().numpy(), here[0].double().numpy(), 1e-6) <= 4
