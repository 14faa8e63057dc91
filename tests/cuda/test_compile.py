"""torch.compile over a whole layer, without a break in its graph."""

from __future__ import annotations

import pytest
import torch

from moe_a2a.testing import LocalRank, RankContext
from tests.collective.places import place_of
from tests.collective.rounds import Case, Round, call_of, opened, tokens_of
from tests.cuda.playing import GPU

ALONE = RankContext(0, 1, LocalRank(0, 1, None), 0)


def layer_of(a2a):
    def layer(x, ids, weights, scale):
        recv = a2a.dispatch(x * scale, ids, weights)
        real = torch.arange(recv.x.shape[1], device=x.device) < recv.counts[:, None]
        rows = recv.dequantize(torch.bfloat16) * real[..., None]
        return a2a.combine((rows * 2).to(torch.bfloat16)) + 1

    return layer


def compare(ranks, wire, compiler):
    case = Case(ranks.size, 9, 3, 128, 12, wire)
    place = place_of(ranks, "nvlink")
    with opened(ranks, "nvlink", case) as a2a:
        layer = layer_of(a2a)
        compiled = torch.compile(layer, fullgraph=True, backend=compiler)
        for seed in range(4):
            rnd = Round(seed, tokens=(12,))
            call = call_of(case, rnd, tokens_of(case, rnd, ranks.rank), place)
            given = [call[name] for name in ("x", "topk_ids", "topk_weights")]
            given.append(torch.tensor(2.0 ** (seed - 1), dtype=torch.bfloat16, device=place))
            want = layer(*given)
            assert want.isfinite().all()
            assert want.unique().numel() > 8, "this compares constants"
            got = compiled(*given)
            assert torch.equal(got, want), f"round {seed}: {(got != want).sum()} differ"
            assert a2a.phase == "idle"
        a2a.check()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("wire", ["bf16", "nvfp4"])
def test_one_rank(wire, compiler):
    torch.compiler.reset()
    torch.cuda.set_device(GPU)
    compare(ALONE, wire, compiler)


@pytest.mark.parametrize("wire", ["bf16", "mxfp8"])
def test_rank_processes(pool, wire):
    pool.run(compare, wire, "inductor", ranks=2, timeout=110)
