"""Rank functions that go through `MoELayer`; the cases and what they must give are of layers.py.

T tokens of all ranks, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from moe_a2a import AllToAll, MoELayer
from moe_a2a.experts import shared_encode_scale
from moe_a2a.experts.base import output_dtype, rows_dtype
from moe_a2a.experts.emulated import Emulated
from moe_a2a.formats import quantize
from tests.collective.layers import (
    DECODE,
    EXPERTS,
    HIDDEN,
    SPLITS,
    TOKENS,
    Case,
    floats,
    numbers,
    play,
    tokens,
    weights,
)
from tests.collective.places import place_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import numpy as np

    from moe_a2a import Received
    from moe_a2a.testing import RankContext

FACTOR = 2.5
FEW = 3  # tokens of the round whose padding the round before has filled


class QuantizesItself(Emulated):
    """What W4A4 kernels are: unquantized rows in, whatever the wire."""

    accepts = ("bf16",)
    expects_unquantized_inputs = True

    def __call__(self, recv, *, out=None):
        assert recv.x.dtype == torch.bfloat16
        assert recv.scales is None
        return super().__call__(recv, out=out)


class Groups(Emulated):
    """Experts that leave the sum to combine_grouped; gaps are NaN."""

    def grouped_rows(self, recv):
        lists = recv.group(4)
        rows = recv.dequantize().flatten(0, 1)[lists.row_index.clamp(min=0)]
        made = torch.full_like(rows, torch.nan)
        edges = lists.expert_offsets.tolist()
        for expert, (first, last) in enumerate(pairwise(edges)):
            made[first:last] = self._expert(expert, rows[first:last], self.spec.wire)
        made[lists.row_index < 0] = torch.nan
        return made.to(rows_dtype(output_dtype(self.spec))), lists


class Naive:
    """Experts that skip nothing: every row times the weight 0 where it has no business, and one
    activation scale for all rows, so that a single NaN is everywhere."""

    def __init__(self, mine: range, place: torch.device) -> None:
        drawn = torch.Generator().manual_seed(mine.start)
        self.mine = torch.arange(mine.start, mine.stop).to(place)
        self.w = torch.randn(len(mine), HIDDEN, generator=drawn).to(place)

    def __call__(self, recv: Received, *, out: torch.Tensor) -> torch.Tensor:
        rows = recv.dequantize()
        rows = rows / rows.abs().amax().clamp(min=1e-3)
        chosen = recv.topk_ids.unsqueeze(-1) == self.mine  # [W, R, K, E]
        weight = (recv.topk_weights.unsqueeze(-1) * chosen).sum(2)  # [W, R, E], 0 elsewhere
        return out.copy_((weight.unsqueeze(-1) * (rows.unsqueeze(2) * self.w)).sum(2))


def shared_rows() -> np.ndarray:
    return floats(numbers(4), TOKENS, HIDDEN, scale=0.05)


def more_of(case: Case, place: torch.device) -> dict[str, torch.Tensor]:
    """Keywords of dispatch."""
    if case.wire != "nvfp4":
        return {}
    return {"global_scale": shared_encode_scale(torch.full((EXPERTS,), DECODE[0])).to(place)}


def inputs_of(
    ranks: RankContext, case: Case, place: torch.device
) -> tuple[list[torch.Tensor], slice]:
    """x, router weights, ids of the rank, and which of all tokens they are."""
    split = SPLITS[ranks.size]
    first = sum(split[: ranks.rank])
    mine = slice(first, first + split[ranks.rank])
    x, ids, router = (torch.from_numpy(array[mine]).to(place) for array in tokens(case))
    return [x.half() if case.wire == "fp16" else x.bfloat16(), router, ids], mine


def play_layer(
    ranks: RankContext,
    backend: str,
    case: Case,
    kind: type[Emulated] = Emulated,
    wrapped: Callable[[RankContext, Any], Any] = lambda _, experts: experts,
) -> dict[str, np.ndarray]:
    """By what was asked for: this rank's outputs [T of the rank, H] as float32."""
    spec, place = case.spec(ranks.size), place_of(ranks, backend)
    inputs, mine = inputs_of(ranks, case, place)
    held = weights(case, spec.experts_of(ranks.rank)).to(place)
    experts = wrapped(ranks, kind(spec, place, held, activations=case.activations))
    shared = torch.from_numpy(shared_rows()[mine]).to(place)
    more, where = more_of(case, place), {"backend": backend, "device": place}
    with MoELayer(spec, ranks.group, experts, timeout=40, **where) as layer:
        found = {"plain": layer(*inputs, **more)}
        found["scaled"] = layer(*inputs, routed_scaling_factor=FACTOR, **more)
        found["shared"] = layer(*inputs, shared=shared, **more)
        out = torch.full_like(found["plain"], float("nan"))
        got = layer(*inputs, shared=shared, routed_scaling_factor=FACTOR, out=out, **more)
        assert got is out
        found["both"] = out
        most = max(SPLITS[ranks.size])
        found["narrow"] = layer(*inputs, runtime_max_tokens=most, **more)
    return {name: value.float().cpu().numpy() for name, value in found.items()}


def play_layers(ranks: RankContext, backend: str, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    """A rank function."""
    return [play_layer(ranks, backend, case) for case in cases]


def play_by_hand(ranks: RankContext, cases: list[Case]) -> list[np.ndarray]:
    """A rank function: prepare, experts and finalize one by one, over `shm`."""
    return [play(ranks, replace(case, poison=False)) for case in cases]


def play_deferring(ranks: RankContext, backend: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A rank function: experts that take the wire's rows, and some that quantize by themselves."""
    kinds = Emulated, QuantizesItself
    first, later = (play_layer(ranks, backend, case, kind)["plain"] for kind in kinds)
    return first, later


def play_grouped(ranks: RankContext, backend: str, case: Case) -> list[dict[str, np.ndarray]]:
    """A rank function: experts with grouped rows, and a function that returns them."""

    def returned(_: RankContext, experts: Groups) -> Callable[..., Any]:
        return lambda recv, *, out: experts.grouped_rows(recv)

    return [
        play_layer(ranks, backend, case, Groups),
        play_layer(ranks, backend, case, Groups, returned),
    ]


def play_behind_nan(
    ranks: RankContext, backend: str, case: Case, naive: bool, scrub: str
) -> tuple[np.ndarray, np.ndarray]:
    """A rank function: a small round in fresh memory, and behind one that was full of NaN."""
    spec = replace(case.spec(ranks.size), scrub=scrub)
    own, place = spec.experts_of(ranks.rank), place_of(ranks, backend)
    held = weights(case, own).to(place)
    experts = Naive(own, place) if naive else Emulated(spec, place, held)
    x, ids, router = (torch.from_numpy(array).to(place) for array in tokens(case))
    x = x.half() if case.wire == "fp16" else x.bfloat16()
    some = slice(ranks.rank, ranks.rank + FEW)
    few, more = (x[some], router[some], ids[some]), more_of(case, place)
    found = []
    for before in (False, True):
        with AllToAll(spec, ranks.group, backend=backend, device=place, timeout=40) as a2a:
            layer = MoELayer(a2a, experts=experts)
            if before:
                rows, scales = all_ones(x, case.wire)
                everywhere = torch.randint(0, case.experts, ids.shape).to(place)
                assert layer(rows, router, everywhere, **scales).isnan().any()
            found.append(layer(*few, **more).float().cpu().numpy())
    return found[0], found[1]


def all_ones(x: torch.Tensor, wire: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows and keywords of dispatch that put NaN, by every bit of rows and scales, on the wire."""
    if wire in ("bf16", "fp16"):
        return torch.full_like(x, float("nan")), {}
    payload, scales = quantize(x, wire)
    for part in (payload, scales):
        part.view(torch.uint8).fill_(255)
    return payload, {"scales": scales}
