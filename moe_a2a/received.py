"""What a dispatch delivers.

Shape letters: K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_a2a import formats
from moe_a2a.grouped import gather, group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_a2a.backends.base import Views
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

__all__ = ["Received", "delivered"]

_new = object.__new__


@dataclass(frozen=True, eq=False)
class Received:
    """The rows that this rank's experts have to compute, rank-major.

    Row i of source s is the i-th token of rank s, in its own order, that has an expert here. Rows
    at or past ``counts[s]`` are padding. Everything but ``counts`` is a view of memory that peers
    write, valid until this round's combine.

    Attributes:
        x: [W, R, row] in the wire's storage dtype (bf16 where quantization is deferred).
        scales: [W, R, n] float32 or uint8, None without scales.
        topk_ids: int32 [W, R, K], global ids; a choice that routes nowhere, and every choice of a
            padding row, has the invalid id. Ids of experts that live elsewhere stay.
        topk_weights: float32 [W, R, K], 0 where the id is the invalid one.
        counts: int32 [W], local memory that no peer writes.
        extra: name -> uint8 [W, R, n].
        global_scale: encode scale of this rank's dispatch call (nvfp4), or None.
    """

    x: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    counts: Tensor
    extra: Mapping[str, Tensor]
    global_scale: Tensor | None
    spec: Spec
    ep_rank: int
    deferred: bool

    def local_ids(self) -> Tensor:
        """int32 [W, R, K]: ids counted from this rank's first expert, all others the invalid id."""
        mine = self.spec.experts_of(self.ep_rank)
        here = (self.topk_ids >= mine.start) & (self.topk_ids < mine.stop)
        local = self.topk_ids - mine.start
        return local.masked_fill_(~here, self.spec.invalid_expert_id)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[W, R, H] in ``dtype``, a copy; padding rows decode to whatever they hold."""
        if self.deferred or self.scales is None:
            return self.x.to(dtype, copy=True)
        return formats.dequantize(
            self.x,
            self.scales,
            self.spec.wire,
            hidden_size=self.spec.hidden_size,
            global_scale=self.global_scale,
            dtype=dtype,
        )

    def group(self, align: int = 128) -> Grouped:
        """Lists the rows by local expert, each expert's from a multiple of ``align`` on.

        Local copies. On CUDA at most three kernels on the current stream and no wait of the host,
        so that a graph may hold it. A row that names an expert twice is listed once per choice.

        Raises:
            GeometryError: ``align`` is no integer >= 1, or makes the list longer than 2**31 - 1.
            PayloadError: on the CPU, where rows that name experts twice need more places than the
                list has; on CUDA see `Grouped`.
        """
        return group(self, align)

    def gather(self, grouped: Grouped) -> tuple[Tensor, Tensor | None]:
        """The rows as `group` listed them: x [N, row], and scales [N, n] where there are any.

        Copies; zeros where ``row_index`` is -1. Reads the receive views: before combine.

        Raises:
            PayloadError: not what `group` returned in this round.
        """
        return gather(self, grouped)


def delivered(
    views: Views,
    counts: Tensor,
    global_scale: Tensor | None,
    spec: Spec,
    ep_rank: int,
    deferred: bool,
) -> Received:
    """What `Received` makes of the same arguments, in a third of the time: the constructor of a
    frozen dataclass calls ``object.__setattr__`` for each field, 1 us in every dispatch."""
    received: Received = _new(Received)
    x, scales, topk_ids, topk_weights, extra = views
    received.__dict__.update(
        x=x,
        scales=scales,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        counts=counts,
        extra=extra,
        global_scale=global_scale,
        spec=spec,
        ep_rank=ep_rank,
        deferred=deferred,
    )
    return received
