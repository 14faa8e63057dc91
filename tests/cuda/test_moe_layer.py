"""`MoELayer` on ranks that are streams of one GPU, eager and in a CUDA graph.

The collective tests run on this backend too, in processes. T tokens of a rank, H hidden_size.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from moe_a2a import MoELayer, Spec
from moe_a2a.experts.emulated import Emulated
from tests import oracle_experts as oracle
from tests.collective.layers import Case, plain
from tests.collective.places import meet
from tests.collective.test_moe_layer import check_close
from tests.collective.whole_layers import play_layer
from tests.cuda.playing import GPU, InTurn, in_turn, run_streams
from tests.cuda.test_graphs import graph_of
from tests.oracle_formats import WIRES
from tests.triton_layers import w4a4, w4a16

E, H, T = 6, 128, 12


NEEDS = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (extra `cuda`)"
)
KINDS = [Emulated, *(pytest.param(kind, marks=NEEDS) for kind in (w4a16, w4a4))]


def play_in_turn(ranks, case, kind=Emulated):
    return play_layer(ranks, "nvlink", case, kind, InTurn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_against_float64(wire, kind):
    for back in ("fp32", "bf16", "mxfp8"):
        case = Case(wire, "mxfp4", combine_wire=back, defer=kind is w4a4)
        by_rank = run_streams(2, play_in_turn, case, kind)
        check_close(case, {name: np.concatenate([p[name] for p in by_rank]) for name in by_rank[0]})


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        (Emulated, "bf16"),
        (Emulated, "mxfp4"),
        pytest.param(w4a16, "mxfp4", marks=NEEDS),
        pytest.param(w4a4, "mxfp4", marks=NEEDS),
    ],
)
def test_any_number_of_ranks_gives_what_one_does(kind, weight):
    case = Case("mxfp8", weight, top_k=1, combine_wire="bf16", defer=kind is w4a4)
    alone = run_streams(1, play_in_turn, case, kind)[0]["plain"]
    for size in (2, 3, 4):
        parts = run_streams(size, play_in_turn, case, kind)
        several = np.concatenate([part["plain"] for part in parts])
        np.testing.assert_array_equal(several, alone)
    assert oracle.distance(alone, plain(case)) < (0.01 if weight == "bf16" else 0.06)


class Dense:
    """Experts that launch kernels and wait for nothing: every expert on every row, times 0."""

    def __init__(self, mine):
        drawn = torch.Generator().manual_seed(mine.start)
        self.mine = torch.arange(mine.start, mine.stop).to(GPU)
        self.w = (torch.randn(len(mine), H, H, generator=drawn) / H**0.5).to(GPU)

    def __call__(self, recv, *, out):
        chosen = recv.topk_ids.unsqueeze(-1) == self.mine
        weight = (recv.topk_weights.unsqueeze(-1) * chosen).sum(2)
        y = torch.einsum("wrh,ehk->wrek", recv.dequantize(), self.w)
        return out.copy_((weight.unsqueeze(-1) * y).sum(2))


def replayed(ranks):
    spec = Spec(ranks.size, E, 2, H, T, wire="mxfp8", scrub="all")
    drawn = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(T, H, generator=drawn).bfloat16().to(GPU)
    router = torch.rand(T, 2, generator=drawn).to(GPU)
    choices = [torch.randint(-1, E, (T, 2), generator=drawn).to(GPU) for _ in range(4)]
    experts = Dense(spec.experts_of(ranks.rank))
    static, shared = choices[0].clone(), x.clone()
    with MoELayer(spec, ranks.group, experts, backend="nvlink", device=GPU, timeout=20) as layer:
        options = {"shared": shared, "routed_scaling_factor": 0.5}
        eager = [layer(x, router, ids, **options).clone() for ids in choices]
        meet(ranks)
        graph, out = in_turn(ranks, lambda: graph_of(lambda: layer(x, router, static, **options)))
        for ids, wanted in zip(choices, eager, strict=True):
            static.copy_(ids)
            graph.replay()
            meet(ranks)
            assert torch.equal(out, wanted)
            assert not torch.equal(out, shared)
        layer.a2a.check()
        meet(ranks)
        del graph


def test_a_layer_in_a_cuda_graph():
    run_streams(2, replayed)
