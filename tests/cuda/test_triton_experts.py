"""The Triton kernels on a GPU: the interpreter's tests, graphs, and shapes too large for it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `cuda`)")

from moe_a2a import AllToAll, Spec
from moe_a2a.experts import select
from moe_a2a.experts.emulated import Emulated
from moe_a2a.experts.four_bits import arrange
from moe_a2a.experts.mxfp4_w4a4 import Mxfp4W4A4
from moe_a2a.experts.tiles import Tile, Tiles
from moe_a2a.experts.triton_w4a16 import TritonW4A16
from tests.triton_cases import *  # noqa: F403
from tests.triton_cases import (
    DEVICE,
    check_rows,
    decoded,
    floats,
    multiplied,
    oracle,
    received,
    weights,
)
from tests.triton_w4a4_cases import *  # noqa: F403

BUILDS = [TritonW4A16, Mxfp4W4A4, Emulated]


@pytest.mark.parametrize("build", BUILDS)
def test_a_graph_sees_new_rows_without_the_host(build):
    spec = Spec(1, 4, 3, 256, 64, combine_wire="fp32")
    experts = build(spec, DEVICE, weights(hidden=256).to(DEVICE))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=rng)
    router = torch.rand(64, 3, generator=rng)
    ids = torch.randint(-1, 4, (64, 3), generator=rng)
    ids[:, 0] = ids[:, 0].clamp(min=0)  # so that every token has a row
    a2a, recv = received(spec, x, ids.tolist(), router)
    with a2a:
        out = torch.full((1, 64, 256), torch.nan, device=DEVICE)
        experts(recv, out=out)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(recv, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            experts(recv, out=out)
        for shift in range(3):
            recv.topk_ids.copy_(((ids + shift) % 4).reshape(1, 64, 3))
            recv.x.copy_(torch.randn(1, 64, 256, generator=rng).to(recv.x.dtype))
            graph.replay()
            replayed = out.clone()
            assert torch.equal(replayed, experts(recv)), f"round {shift}"
            assert replayed.isfinite().all() and replayed.any()


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(
    "tile",
    [Tile(16, 64, 4, 5), Tile(32, 128, 8, 4, 4), Tile(64, 64, 4, 3, 8), Tile(128, 128, 8, 3, 8),
     Tile(256, 128, 8, 2, 4)],
)  # fmt: skip
def test_large_products(form, tile):
    from moe_a2a.experts import ExpertMatrix

    matrix = ExpertMatrix.quantize(floats(6, 512, 1280, seed=1), form)
    x = floats(600, 1280, seed=2)
    ids = torch.randint(-1, 6, (600, 2), generator=torch.Generator().manual_seed(1)).tolist()
    out, where = multiplied(matrix, x, ids, tile)
    w = oracle.bf16(decoded(matrix))
    rows = x.double().numpy()
    check_rows(out, where, lambda row, e: w[e] @ rows[row], 1e-10)


@pytest.mark.parametrize("build", BUILDS)
def test_all_sizes_of_tiles_give_the_same_layer(build):
    """From one row to a thousand for each expert; the emulated path on the CPU says what."""
    for tokens in (1, 30, 90, 700):
        spec = Spec(1, 4, 2, 512, tokens, combine_wire="fp32")
        held = weights(hidden=512, inner=256)
        activations = "bf16" if build is TritonW4A16 else "mxfp4"
        rng = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, 512, generator=rng).bfloat16()
        ids = torch.randint(0, 4, (tokens, 2), generator=rng)
        router = torch.rand(tokens, 2, generator=rng)
        options = {"rule": "even"} if build is Emulated else {}
        on_gpu = build(spec, DEVICE, held.to(DEVICE), **options)
        a2a, recv = received(spec, x.float(), ids.tolist(), router)
        with a2a:
            got = on_gpu(recv)[0].cpu().double().numpy()
        plain = Emulated(spec, "cpu", held, activations=activations, rule="even")
        with AllToAll(spec, backend="shm", device="cpu") as again:
            wanted = plain(again.dispatch(x, ids, router))[0].double().numpy()
        assert oracle.far_rows(got, wanted, 1e-5) <= max(2, tokens // 50)


def test_what_is_selected_here():
    spec, held = Spec(1, 4, 3, 256, 8), weights(hidden=256).to(DEVICE)
    native = torch.cuda.get_device_capability()[0] == 10
    assert isinstance(select(spec, DEVICE, held), Mxfp4W4A4 if native else TritonW4A16)
    emulated = select(spec, DEVICE, held, backend="emulated")
    assert emulated._in_kernels is not None


def test_weights_are_held_once():
    held = weights(hidden=1024, inner=512).to(DEVICE)
    packed = held.w13.payload.nbytes + held.w2.payload.nbytes
    spec = Spec(1, 4, 3, 1024, 8)
    for build in (TritonW4A16, Emulated):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        experts = build(spec, DEVICE, held)
        grown = torch.cuda.memory_allocated() - before
        assert packed <= grown < 1.3 * packed, build
        del experts
    assert arrange(held.w2).words.is_cuda
    assert Tiles(Tile(16, 64, 4, 3), Tile(32, 64, 4, 3)).align == 32
