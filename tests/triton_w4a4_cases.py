"""Tests of the W4A4 kernels, as triton_cases.py has those of the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a import Spec
from moe_a2a.errors import GeometryError
from moe_a2a.experts import GPT_OSS, ExpertMatrix, ExpertWeights
from moe_a2a.experts.mxfp4_w4a4 import Mxfp4W4A4
from moe_a2a.formats.swizzle import unswizzle
from tests import oracle_experts as oracle
from tests import oracle_formats as wires
from tests.triton_cases import (
    DEVICE,
    E,
    T,
    computed,
    decoded,
    floats,
    foreseen,
    group,
    weights,
)

SIZES = (0, 1, 127, 128, 129)  # rows of each expert


def sized_groups():
    """Every row has one expert, drawn so that the experts have SIZES rows; and how they lie."""
    ids = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    ids = ids[torch.from_numpy(np.random.default_rng(3).permutation(len(ids)))]
    local = ids.int()[:, None].to(DEVICE)
    return ids, group(local, torch.ones(local.shape, device=DEVICE), len(SIZES), 128)


def w4a4(hidden, inner, **options):
    """Experts of an exchange of its own, for the parts that need none."""
    count = len(SIZES)
    spec = Spec(1, count, 1, hidden, sum(SIZES))
    w13 = ExpertMatrix.quantize(floats(count, 2 * inner, hidden, seed=1), "mxfp4", rule="even")
    w2 = ExpertMatrix.quantize(floats(count, hidden, inner, seed=2), "mxfp4", rule="even")
    more = {"b13": floats(count, 2 * inner, seed=5), "b2": floats(count, hidden, seed=6)}
    held = ExpertWeights(w13, w2, GPT_OSS, **more)
    return held, Mxfp4W4A4(spec, DEVICE, held.to(DEVICE), **options)


def check_quantized(rows, grouped, wanted):
    """Bytes of every row and of the gaps; `wanted` fp32 [L, K], gaps as zeros."""
    end = int(grouped.expert_offsets[-1])
    codes, scales = wires.quantize(wanted[:end], "mxfp4", 1.0, rule="even")
    np.testing.assert_array_equal(rows.codes[:end].cpu().numpy(), codes)
    linear = unswizzle(rows.scales, rows=end).cpu().numpy()
    np.testing.assert_array_equal(linear, scales)


def test_rows_are_quantized_to_the_bit():
    ids, grouped = sized_groups()
    x = floats(len(ids), 96, seed=2) * 2.0 ** torch.arange(-60, 60, 1.25).floor()[:96]
    x[3, :64] = 0
    x[4, 5], x[4, 40], x[5, 70], x[6, 1] = torch.nan, torch.inf, -torch.inf, -0.0
    x[7, :32], x[8, :32] = 1e-39, 3e38
    _, experts = w4a4(128, 128)
    rows = experts.quantize(x.bfloat16().to(DEVICE), grouped)
    index = grouped.row_index.cpu()
    assert (index >= 0).sum() == len(ids)
    padded = torch.nn.functional.pad(x.bfloat16().float(), (0, 32))
    wanted = torch.where((index >= 0)[:, None], padded[index.clamp(min=0).long()], 0.0)
    check_quantized(rows, grouped, wanted.numpy())


def test_the_activation_is_quantized_with_it():
    _, experts = w4a4(128, 128)
    _, grouped = sized_groups()
    live = (grouped.row_index >= 0).cpu()
    gate_up = floats(len(live), 256, seed=4, scale=3.0)
    gate_up[~live] = torch.nan
    rows = experts.activate(gate_up.to(DEVICE), grouped)
    act = oracle.Layer(None, None, alpha=1.702, beta=1.0, limit=7.0)
    h = oracle.bf16(oracle.activation(act, gate_up.double().numpy()))
    wanted = np.where(live.numpy()[:, None], h, 0.0).astype(np.float32)
    codes, scales = wires.quantize(wanted, "mxfp4", 1.0, rule="even")
    end = int(grouped.expert_offsets[-1])
    got, got_scales = rows.codes[:end].cpu().numpy(), unswizzle(rows.scales, rows=end).cpu().numpy()
    # A sigmoid that differs in its last bit tips a rounding to bf16 over now and then.
    assert (got != codes[:end]).mean() < 1e-3
    assert (got_scales != scales[:end]).mean() < 1e-3


@pytest.mark.parametrize("block_k", [128, 256])
def test_w4a4_products(block_k):
    held, experts = w4a4(256, 128, block_k=block_k)
    ids, grouped = sized_groups()
    x = floats(len(ids), 256, seed=7)
    rows = experts.quantize(x.bfloat16().to(DEVICE), grouped)
    out = experts.multiply(rows, grouped, 0, 256).cpu().double().numpy()
    w, b = decoded(held.w13), held.b13.double().numpy()
    payload, scales = wires.quantize(x.numpy(), "mxfp4", 1.0, rule="even")
    seen = wires.dequantize(payload, scales, "mxfp4", None, 1.0).astype(np.float64)
    plain = floats(len(SIZES), 256, 256, seed=1).double().numpy()
    index = grouped.row_index.tolist()
    for e, size in enumerate(SIZES):
        first, end = grouped.expert_offsets[e : e + 2].tolist()
        at = [place for place in range(first, end) if index[place] >= 0]
        assert len(at) == size
        if not size:
            continue
        own = [index[place] for place in at]
        assert oracle.distance(out[at], seen[own] @ w[e].T + b[e]) < 1e-10
        unquantized = x[own].double().numpy() @ plain[e].T + b[e]
        assert 1e-4 < oracle.distance(out[at], unquantized) < 0.15
    check_fidelity(x.double().numpy(), seen, payload)


def check_fidelity(x, seen, payload):
    cosine = (x * seen).sum() / np.sqrt((x * x).sum() * (seen * seen).sum())
    assert cosine > 0.99
    codes = np.stack([payload & 15, payload >> 4])
    assert ((codes & 7) == 7).mean() < 0.05


def test_w4a4_layer():
    spec, held = Spec(1, E, 3, 128, T), weights(hidden=128)
    got = computed(Mxfp4W4A4, spec, held)
    assert oracle.far_rows(got, foreseen(spec, held, "mxfp4", "even"), 1e-5) <= 1


def test_w4a4_wants_rows_unquantized():
    spec, held = Spec(1, E, 3, 128, T, wire="mxfp8"), weights(hidden=128)
    with pytest.raises(Exception, match="rows arrived as mxfp8"):
        computed(Mxfp4W4A4, spec, held)
    for other, text in ((weights("nvfp4", hidden=128), "not nvfp4"), (weights(), "padded")):
        spec = Spec(1, E, 3, other.hidden_size, T)
        with pytest.raises(GeometryError, match=text):
            Mxfp4W4A4(spec, DEVICE, other.to(DEVICE))
