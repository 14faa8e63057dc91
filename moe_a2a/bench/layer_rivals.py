"""The same experts behind other exchanges: all-gather and reduce-scatter, and FlashInfer's.

T tokens of a rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from moe_a2a.bench.rivals import newest
from moe_a2a.moe_layer import MoELayer
from moe_a2a.prepare_finalize import PrepareFinalize
from moe_a2a.received import Received

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.alltoall import AllToAll
    from moe_a2a.bench.inputs import Inputs
    from moe_a2a.bench.rivals_cuda import DeviceRound
    from moe_a2a.bench.rivals_flashinfer import FlashInfer
    from moe_a2a.experts import Experts
    from moe_a2a.spec import Spec

__all__ = ["FlashInferLayer", "GatherLayer", "OwnLayer", "TimedLayer"]


class TimedLayer(Protocol):
    """A layer of which each phase is a call: in turn, round after round."""

    def prepare(self) -> None: ...

    def experts(self) -> None: ...

    def finalize(self) -> None: ...

    def output(self) -> Tensor:
        """[T, H] of the last round."""
        ...


class OwnLayer:
    """What `MoELayer` does, call by call."""

    def __init__(
        self, a2a: AllToAll, experts: Experts, inputs: Inputs, rows: int, scale: Tensor | None
    ) -> None:
        self._ends, self._inputs = PrepareFinalize(a2a), inputs
        self._layer = MoELayer(a2a, experts=experts)
        self._keywords: dict[str, Any] = {
            "runtime_max_tokens": rows,
            "global_scale": scale,
            "defer_input_quant": a2a.spec.quantized and experts.expects_unquantized_inputs,
        }

    def prepare(self) -> None:
        x, ids, router = self._inputs
        self._received = self._ends.prepare(x, router, ids, **self._keywords).received

    def experts(self) -> None:
        self._y, self._grouped = self._layer.compute(self._received)

    def finalize(self) -> None:
        self._out = self._ends.finalize(self._y, grouped=self._grouped)

    def output(self) -> Tensor:
        return self._out


class GatherLayer:
    """The default of serving engines: every rank gets all tokens, computes those that chose its
    experts, and the partial sums are reduced and scattered. bf16 there; back in bf16 through NCCL,
    in fp32 through gloo, which has no sum of bf16 worth timing.

    Every rank brings as many tokens.
    """

    def __init__(self, spec: Spec, rank: int, experts: Experts, inputs: Inputs) -> None:
        self._experts, self._inputs = experts, inputs
        self._all_gather = newest("all_gather_single", "all_gather_into_tensor")
        self._reduce_scatter = newest("reduce_scatter_single", "reduce_scatter_tensor")
        x, ids, router = inputs
        size = spec.ep_size
        self._on_gpu = x.device.type == "cuda"
        self._all = [part.new_empty(size, *part.shape) for part in (x, ids.int(), router)]
        self._own = [x, ids.int().contiguous(), router]
        counts = torch.full((size,), len(x), dtype=torch.int32, device=x.device)
        rows, all_ids, weights = self._all
        # Rows of tokens without an expert here among them: their ids say so.
        self._received = Received(
            rows, None, all_ids, weights, counts, {}, None, spec, rank, deferred=False
        )
        if not self._on_gpu:
            try:
                self._reduce_scatter(torch.zeros(1), torch.zeros(size))
            except RuntimeError:  # gloo of older torch has none
                self._reduce_scatter = self._by_all_reduce

    def prepare(self) -> None:
        for whole, part in zip(self._all, self._own, strict=True):
            self._all_gather(whole.flatten(0, 1), part)

    def experts(self) -> None:
        self._y = self._experts(self._received)

    def finalize(self) -> None:
        rows = self._y.flatten(0, 1)
        rows = rows if self._on_gpu else rows.float()
        total = torch.empty_like(rows[: len(self._inputs.x)])
        self._reduce_scatter(total, rows)
        self._out = total.to(self._y.dtype)

    def _by_all_reduce(self, total: Tensor, partial: Tensor) -> None:
        dist.all_reduce(partial)
        total.copy_(partial.chunk(dist.get_world_size())[dist.get_rank()])

    def output(self) -> Tensor:
        return self._out


class FlashInferLayer:
    """FlashInfer's exchange; ids of padding are cleared, experts write where its combine reads."""

    def __init__(self, rival: FlashInfer, round: DeviceRound, experts: Experts, scale: Any) -> None:
        self._rival, self._round, self._experts, self._scale = rival, round, experts, scale
        device, size = round.payload.device, round.spec.ep_size
        self._counts = torch.full((size,), round.rows, dtype=torch.int32, device=device)

    def prepare(self) -> None:
        round, rival = self._round, self._rival
        shape = (round.spec.ep_size, round.rows, -1)
        rows = rival.dispatch().view(shape)
        scales = rival.scales()
        ids, weights = rival.choices()
        self._received = Received(
            rows,
            None if scales is None else scales.view(shape),
            ids.view(shape),
            weights.view(shape),
            self._counts,
            {},
            self._scale,
            round.spec,
            round.rank,
            deferred=False,
        )

    def experts(self) -> None:
        self._y = self._experts(self._received, out=self._rival.combine_target())

    def finalize(self) -> None:
        self._rival.stage(self._y)
        self._rival.combine()

    def output(self) -> Tensor:
        return self._rival.output()
