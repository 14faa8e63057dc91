"""Tests of the Triton kernels: in Triton's interpreter on the CPU, and on GPUs as they are.

`tests/unit/test_triton_interpreted.py` and `tests/cuda/test_triton_experts.py` import all of it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_a2a import AllToAll, Received, Spec
from moe_a2a.experts import (
    GPT_OSS,
    SILU,
    Activation,
    ExpertMatrix,
    ExpertWeights,
    from_deepseek_v4,
)
from moe_a2a.experts.four_bits import arrange
from moe_a2a.experts.mxfp4_w4a4 import Mxfp4W4A4
from moe_a2a.experts.tiles import Tile, Tiles
from moe_a2a.formats import FORMATS
from moe_a2a.grouped import Choices, Grouped, listed, weighted_sums
from tests import oracle_experts as oracle
from tests import oracle_formats as wires
from tests.formats_cases import raw

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
E, H, INNER, T = 4, 192, 128, 6
# Tensor cores add up fp32 with a few bits less than numpy.
CLOSE = 1e-12 if DEVICE == "cpu" else 1e-10
SMALL = Tiles(Tile(16, 64, 4, 2), Tile(32, 128, 4, 2, 2))


def floats(*shape, seed=0, scale=1.0):
    """fp32 that bf16 holds exactly."""
    drawn = np.random.default_rng(seed).standard_normal(shape) * scale
    return torch.from_numpy(oracle.bf16(drawn).astype(np.float32))


def decoded(matrix):
    decode = None if matrix.decode_scale is None else matrix.decode_scale.cpu().numpy()
    return oracle.weights(
        raw(matrix.payload.cpu()), raw(matrix.scales.cpu()), matrix.format, decode
    )


def group(local, router, experts, align):
    counts = torch.tensor([len(local)], dtype=torch.int32, device=local.device)
    return Grouped(*listed(Choices(local[None], router[None], counts, 0, experts), align))


def multiplied(matrix, x, ids, tile, *, columns=None, **more):
    """[L, N] with NaN where nothing was stored, and the (row, expert) of each of its rows."""
    from moe_a2a.experts.grouped_experts import multiply

    matrix = matrix.to(DEVICE)
    local = torch.tensor(ids, dtype=torch.int32).to(DEVICE)
    grouped = group(local, torch.ones(local.shape, device=DEVICE), matrix.num_experts, tile.block_m)
    width = columns or matrix.rows // (2 if more.get("activation") else 1)
    out = torch.full((len(grouped.row_index), width), torch.nan, device=DEVICE)
    multiply(x.bfloat16().to(DEVICE), grouped, arrange(matrix), out, tile, gather=True, **more)
    ends = grouped.expert_offsets.tolist()[1:]
    where = [
        None if row < 0 else (row, sum(end <= at for end in ends))
        for at, row in enumerate(grouped.row_index.tolist())
    ]
    return out.cpu().numpy(), where


def check_rows(out, where, wanted, limit):
    """`wanted(row, expert)` float64 [N]; other rows are as they were."""
    assert any(where), "nothing was computed"
    for got, which in zip(out, where, strict=True):
        if which is None:
            assert np.isnan(got).all(), "a row of a gap was stored"
        else:
            assert oracle.distance(got.astype(np.float64), wanted(*which)) < limit, which


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_every_code_under_every_scale(form):
    """Rows of the unit matrix pick single weights, so that bits can be compared."""
    count = 252 if form == "mxfp4" else 127  # beyond, 6 is too large for fp32, or it is NaN
    block = 32 if form == "mxfp4" else 16
    rng = np.random.default_rng(1)
    payload = torch.from_numpy(rng.integers(0, 256, (2, 128, 64), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(0, count, (2, 128, 128 // block), dtype=np.uint8))
    scales[0].clamp_(max=128)  # in the first pass all of them
    payload[0, :8] = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat_interleave(2, 1)
    decode = torch.tensor([1.0, 0.37]) if form == "nvfp4" else None
    for experts in (slice(0, 1), slice(0, 2)):
        matrix = ExpertMatrix(
            payload[experts], form, scales[experts], None if decode is None else decode[experts]
        )
        assert arrange(matrix).wide == (form == "mxfp4" and experts.stop == 2)
        ids = [[e] for e in range(matrix.num_experts) for _ in range(128)]
        x = torch.eye(128).repeat(matrix.num_experts, 1)
        out, where = multiplied(matrix, x, ids, Tile(32, 64, 4, 2))
        wanted = oracle.bf16(decoded(matrix))
        for got, which in zip(out, where, strict=True):
            if which is not None:
                np.testing.assert_array_equal(got, wanted[which[1]][:, which[0] % 128])


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 3, 2), Tile(32, 128, 4, 2), Tile(16, 256, 8, 2)])
def test_products_of_grouped_rows(form, tile):
    matrix = ExpertMatrix.quantize(
        floats(E, 256, 256, seed=1) * 2.0 ** torch.arange(4)[:, None, None], form
    )
    x = floats(9, 256, seed=2)
    ids = [[0, -1], [0, 2], [9, 9], [2, 0], [3, 3], [3, -1], [0, 3], [0, 0], [3, 0]]
    x[2] = torch.nan  # a row that no expert here computes
    out, where = multiplied(matrix, x, ids, tile, bias=floats(E, 256, seed=3).to(DEVICE))
    assert sum(which is not None for which in where) == 14
    w, b = oracle.bf16(decoded(matrix)), floats(E, 256, seed=3).double().numpy()
    check_rows(out, where, lambda row, e: w[e] @ x[row].double().numpy() + b[e], CLOSE)


@pytest.mark.parametrize("rows", [(70, 60), (64, 65), (129, 193)])
def test_tiles_that_end_in_their_first_half(rows):
    matrix = ExpertMatrix.quantize(floats(2, 128, 128, seed=1), "mxfp4")
    x = floats(sum(rows), 160, seed=2)
    out, where = multiplied(
        matrix, x, [[e] for e in (0, 1) for _ in range(rows[e])], Tile(128, 128, 4, 2)
    )
    assert sum(which is not None for which in where) == sum(rows)
    w, known = decoded(matrix), x[:, :128].double().numpy()
    check_rows(out, where, lambda row, e: w[e] @ known[row], CLOSE)


def test_fewer_columns_in_and_out():
    matrix = ExpertMatrix.quantize(floats(2, 128, 256, seed=1), "mxfp4")
    x = floats(3, 160, seed=2)
    out, where = multiplied(matrix, x, [[0], [1], [1]], Tile(16, 64, 4, 2), columns=96)
    w = decoded(matrix)[:, :96, :160]
    check_rows(out, where, lambda row, e: w[e] @ x[row].double().numpy(), CLOSE)


@pytest.mark.parametrize("act", [SILU, GPT_OSS, Activation(1.0, 0.0, 0.5)])
@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_gated_products(act, form):
    matrix = ExpertMatrix.quantize(floats(2, 256, 128, seed=1, scale=0.3), form)
    x, bias = floats(5, 128, seed=2), floats(2, 256, seed=3)
    ids = [[0], [1], [-1], [1], [0]]
    more = {"bias": bias.to(DEVICE), "activation": act}
    out, where = multiplied(matrix, x, ids, Tile(16, 64, 4, 2), **more)
    w, b = oracle.bf16(decoded(matrix)), bias.double().numpy()
    layer = oracle.Layer(w, w, alpha=act.alpha, beta=act.beta, limit=act.limit)
    check_rows(
        out,
        where,
        lambda row, e: oracle.activation(layer, w[e] @ x[row].double().numpy() + b[e]),
        CLOSE,
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_sum_is_ordered_and_unfused(kind):
    from moe_a2a.experts.grouped_experts import sum_up

    choices = [[2, 0, 3], [3, 1, 0], [1, 1, 0], [-1, 9, -1], [2, -1, 2]]
    ids = torch.tensor(choices, dtype=torch.int32)
    router = torch.tensor([[0.3, 0.7, 1e3]]).repeat(5, 1) * (1 + torch.arange(5)[:, None] / 7)
    grouped = group(ids.to(DEVICE), router.to(DEVICE), 4, 16)
    rows = torch.full((len(grouped.row_index), 200), torch.nan, dtype=kind, device=DEVICE)
    there = grouped.row_index >= 0
    rows[there] = floats(int(there.sum()), 200, seed=4).mul(1 / 3).to(DEVICE, kind)
    held = rows.float().cpu().numpy()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((1, 5, 200), torch.nan, dtype=dtype, device=DEVICE)
        sum_up(rows, grouped, router.to(DEVICE), out)
        for token in range(5):
            total = np.zeros(200, np.float32)
            for _, k in sorted((int(e), k) for k, e in enumerate(ids[token]) if 0 <= e < 4):
                total = total + held[grouped.positions[token, k]] * router[token, k].numpy()
            wanted = torch.from_numpy(total).to(dtype)
            assert torch.equal(out[0, token].cpu(), wanted), (dtype, token)
    lost = replace(grouped, positions=grouped.positions.clone())
    lost.positions[4, 2] = -2
    out = torch.zeros((1, 5, 200), device=DEVICE)
    sum_up(rows, lost, router.to(DEVICE), out)
    assert out[0, 4].isnan().all(), "a choice was lost without a word"
    assert out[0, :4].isfinite().all()


def weights(form="mxfp4", hidden=H, inner=INNER, **more):
    w13 = ExpertMatrix.quantize(floats(E, 2 * inner, hidden, seed=1, scale=hidden**-0.5), form)
    w2 = ExpertMatrix.quantize(floats(E, hidden, inner, seed=2, scale=inner**-0.5), form)
    more = {"b13": floats(E, 2 * inner, seed=5), "b2": floats(E, hidden, seed=6)} | more
    return ExpertWeights(w13, w2, GPT_OSS, **more)


def layer_of(held):
    biases = [b.double().numpy() for b in (held.b13, held.b2)]
    act = held.activation
    return oracle.Layer(
        decoded(held.w13), decoded(held.w2), *biases, act.alpha, act.beta, act.limit
    )


IDS = [[0, 1, 2], [2, 3, 3], [-1, -1, -1], [3, -1, 0], [9, 9, 2]]
GS = 1 / 500


def received(spec, x, ids, router):
    """As a GPU would have it, padding poisoned."""
    more = {"global_scale": torch.tensor(1 / GS)} if spec.wire == "nvfp4" else {}
    a2a = AllToAll(spec, backend="shm", device="cpu")
    x = x.half() if spec.wire == "fp16" else x.bfloat16()
    recv = a2a.dispatch(x, torch.tensor(ids), router, **more)
    count = int(recv.counts[0])
    for rows in (recv.x, recv.scales):
        if rows is not None:
            rows[0, count:].view(torch.uint8).fill_(255)
    parts = ("x", "scales", "topk_ids", "topk_weights", "counts", "global_scale")
    there = {part: getattr(recv, part) for part in parts}
    there = {part: None if t is None else t.to(DEVICE) for part, t in there.items()}
    return a2a, replace(recv, **there)


def computed(build, spec, held, ids=IDS, router=None, x=None):
    """Rows [T, H] as float64, of tokens that went somewhere; all others are checked to be zeros."""
    x = floats(len(ids), spec.hidden_size, seed=3) if x is None else x
    router = floats(len(ids), spec.top_k, seed=9).abs() if router is None else router
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experts = build(spec, DEVICE, held.to(DEVICE))
    a2a, recv = received(spec, x, ids, router)
    with a2a:
        out = torch.full((1, T, spec.hidden_size), torch.nan, device=DEVICE)
        experts(recv, out=out)
        y = out[0].cpu()
        if spec.wire == "bf16":
            check_default(experts, recv, y)
    assert y.isfinite().all()
    sent = [any(0 <= e < spec.num_experts for e in row) for row in ids]
    assert not y[sum(sent) :].any(), "padding"
    rows = np.zeros((len(ids), spec.hidden_size))
    rows[np.array(sent)] = y[: sum(sent)].double().numpy()
    return rows


def check_default(experts, recv, y):
    """Without `out` the result is bf16: of rows in bf16 too, where they can be had by themselves,
    or rounded from fp32."""
    got = experts(recv)[0]
    assert got.dtype == torch.bfloat16
    if not hasattr(experts, "grouped_rows"):
        assert torch.equal(y.to(torch.bfloat16), got.cpu())
        return
    rows, lists = experts.grouped_rows(recv)
    assert (rows.dtype, rows.shape) == (torch.bfloat16, (len(lists.row_index), y.shape[1]))
    wanted = weighted_sums(rows, lists, 0, len(y)).to(torch.bfloat16)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(got.cpu().float(), y, rtol=2e-2, atol=2e-2)


def foreseen(spec, held, name, rule="ceil", gs=(1.0, 1.0), ids=IDS, x=None, router=None):
    """float64 [T, H] of rows and activations quantized as `name` says."""
    x = floats(len(ids), spec.hidden_size, seed=3) if x is None else x
    router = floats(len(ids), spec.top_k, seed=9).abs() if router is None else router
    x = x.numpy()
    if spec.quantized:
        x = wires.dequantize(*wires.quantize(x, spec.wire, 1 / GS), spec.wire, None, 1 / GS)
    seen = oracle.hardware(name, name, held.w13.format, spec.wire, gs, rule)
    ids = np.where((np.array(ids) >= 0) & (np.array(ids) < E), ids, -1)
    return oracle.run(layer_of(held), x, ids, router.numpy(), seen)[0]


@pytest.mark.parametrize("hidden", [128, 1280])
@pytest.mark.parametrize("wire", wires.WIRES)
def test_rows_are_decoded_to_the_bit(wire, hidden, monkeypatch):
    """Of every byte that a payload and its scales can have; padding rows are not looked at."""
    from moe_a2a.experts.triton_decode import as_bf16

    spec = Spec(2, E, 3, hidden, T, wire=wire)
    rng = np.random.default_rng(hidden)
    form = FORMATS[wire]
    width = form.payload_width(hidden, 128) * form.payload_dtype.itemsize
    x = torch.from_numpy(rng.integers(0, 256, (2, T, width), dtype=np.uint8)).to(DEVICE)
    scales = None
    if form.scale_dtype is not None:
        drawn = rng.integers(0, 256, (2, T, form.scale_width(hidden, 128)), dtype=np.uint8)
        scales = torch.from_numpy(drawn)
        if form.scale_dtype == torch.float32:
            scales = torch.exp2(scales.float() - 127) * 1.1
        scales = scales.to(DEVICE)
    ids = torch.zeros((2, T, 3), dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([T, 2], dtype=torch.int32, device=DEVICE)
    for gs in (None, torch.tensor(0.37, device=DEVICE))[: 1 + (wire == "nvfp4")]:
        rows = x.view(form.payload_dtype)
        recv = Received(rows, scales, ids, ids.float(), counts, {}, gs, spec, 0, deferred=False)
        wanted = recv.dequantize(torch.bfloat16)[..., :hidden].cpu()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda size, **more: torch.full(size, 7.0, **more))
            got = as_bf16(recv).view(2, T, -1)[..., :hidden].cpu()
        assert wire == "bf16" or (got[1, 2:] == 7).all(), "padding was decoded"
        for source, count in enumerate(counts.tolist()):
            mine, theirs = got[source, :count], wanted[source, :count]
            nan = theirs.isnan()
            assert torch.equal(mine.isnan(), nan)
            bits = [rows.view(torch.int16).masked_fill(nan, 0) for rows in (mine, theirs)]
            assert torch.equal(*bits)


@pytest.mark.parametrize("wire", wires.WIRES)
def test_w4a16_takes_every_wire(wire):
    from moe_a2a.experts.triton_w4a16 import TritonW4A16

    spec, held = Spec(1, E, 3, 128, T, wire=wire), weights(hidden=128)
    got = computed(TritonW4A16, spec, held)
    assert oracle.far_rows(got, foreseen(spec, held, "bf16"), 2e-7) == 0


def test_a_rank_without_experts():
    from moe_a2a.experts.emulated import Emulated
    from moe_a2a.experts.triton_w4a16 import TritonW4A16

    spec = Spec(4, 3, 1, 256, T)
    none = from_deepseek_v4([], limit=7.0, hidden_size=256, intermediate_size=128).to(DEVICE)
    rows = torch.full((4, T, 256), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.full((4, T, 1), -1, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    recv = Received(rows, None, ids, ids.float(), counts, {}, None, spec, 3, deferred=False)
    for build in (TritonW4A16, Mxfp4W4A4, Emulated):
        experts = build(spec, DEVICE, none)
        assert not experts(recv).any()
        if build is not Emulated:
            made, lists = experts.grouped_rows(recv)
            assert made.shape == (0, 256)
            assert len(lists.row_index) == 0


@pytest.mark.parametrize("sizes", [(96, 64), (128, 96)])
def test_w4a16_pads_weights(sizes):
    from moe_a2a.experts.triton_w4a16 import TritonW4A16

    hidden, inner = sizes
    held = weights(hidden=hidden, inner=inner)
    spec = Spec(1, E, 3, hidden, T)
    got = computed(lambda *given: TritonW4A16(*given, tiles=SMALL), spec, held)
    assert oracle.far_rows(got, foreseen(spec, held, "bf16"), 2e-7) == 0


@pytest.mark.parametrize(
    ("wire", "form", "activations"),
    [("bf16", "mxfp4", "mxfp4"), ("nvfp4", "nvfp4", "nvfp4"), ("mxfp8", "nvfp4", "fp8"),
     ("fp8", "mxfp4", "bf16")],
)  # fmt: skip
def test_emulated_decodes_in_kernels(wire, form, activations, monkeypatch):
    from moe_a2a.experts import emulated, grouped_experts

    monkeypatch.setattr(emulated, "decodes_in_kernels", lambda weights: True)
    used = []
    multiply = grouped_experts.multiply
    monkeypatch.setattr(
        grouped_experts, "multiply", lambda *a, **k: (used.append(a), multiply(*a, **k))
    )
    scales = {"w13_input_scale": torch.full((E,), GS), "w2_input_scale": torch.full((E,), GS / 3)}
    spec, held = Spec(1, E, 3, 128, T, wire=wire), weights(form, 128, **scales)

    def build(*given):
        return emulated.Emulated(*given, activations=activations, rule="even")

    got = computed(build, spec, held)
    assert used, "the plain path was taken"
    gs = tuple(float(np.float32(1) / np.float32(scale)) for scale in (GS, GS / 3))
    wanted = foreseen(spec, held, activations, "even", gs)
    assert oracle.far_rows(got, wanted, 2e-7) <= 1
