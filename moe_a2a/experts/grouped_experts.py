"""Experts over grouped rows with four-bit weights: two grouped GEMMs, and a sum, by Triton.

Nothing here waits for the device, so that all of it can be captured in a CUDA graph.
n = W*R received rows, K top_k, L grouped rows, E local experts, H hidden_size, I intermediate size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton

from moe_a2a.experts.four_bits import CHUNK, arrange
from moe_a2a.experts.padding import padded
from moe_a2a.experts.tiles import tiles_for
from moe_a2a.experts.triton_gemm import grouped_gemm
from moe_a2a.experts.triton_sum import weighted_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_a2a.experts.activation import Activation
    from moe_a2a.experts.four_bits import Arranged
    from moe_a2a.experts.tiles import Tile, Tiles
    from moe_a2a.experts.weights import ExpertWeights
    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["GroupedExperts", "expected_rows", "multiply", "sum_up"]

_SUM_BLOCK = 1024


class GroupedExperts:
    """The weights of a rank's experts, arranged, and what is computed with them.

    Args:
        weights: mxfp4 or nvfp4; sizes that are not multiples of 128 are padded. Nothing of them is
            kept but biases.
    """

    def __init__(self, weights: ExpertWeights) -> None:
        whole = padded(weights)
        self._sizes = weights.to("meta")
        self.hidden_size = weights.hidden_size
        self.activation = weights.activation
        self.w13, self.w2 = arrange(whole.w13), arrange(whole.w2)
        self.b13, self.b2 = (
            None if bias is None else bias.to(torch.float32).contiguous()
            for bias in (whole.b13, whole.b2)
        )

    @property
    def device(self) -> torch.device:
        return self.w13.words.device

    def check_fits(self, spec: Spec, ep_rank: int | None = None) -> None:
        """As `ExpertWeights.check_fits`."""
        self._sizes.check_fits(spec, ep_rank)

    def __call__(
        self,
        x: Tensor,
        recv: Received,
        out: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        between: Callable[[Tensor], Tensor] | None = None,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """y of `moe_a2a.experts.base.Experts`, to ``out`` [W, R, H] bf16, fp16 or fp32.

        Otherwise as `rows`.
        """
        y, grouped = self.rows(x, recv, dtype, between=between, tiles=tiles)
        return sum_up(y, grouped, recv.topk_weights.flatten(0, 1), out)

    def rows(
        self,
        x: Tensor,
        recv: Received,
        dtype: torch.dtype,
        *,
        between: Callable[[Tensor], Tensor] | None = None,
        tiles: Tiles | None = None,
    ) -> tuple[Tensor, Grouped]:
        """What the experts make of rows: [L, H], not weighted yet, and how they lie.

        Args:
            x: bf16 [n, H or more], the last dimension contiguous; rows without a choice here are
                not read.
            dtype: that results are rounded to from fp32.
            between: what the rows of w2 go through first, bf16 [L, I] to the same; rows of gaps
                hold whatever memory held.
            tiles: other than those of the table.
        """
        chosen = tiles or tiles_for(expected_rows(recv))
        grouped = recv.group(chosen.align)
        length = len(grouped.row_index)
        y = x.new_empty((length, self.hidden_size), dtype=dtype)
        if not length:
            return y, grouped
        h = x.new_empty((length, self.w2.columns))
        multiply(x, grouped, self.w13, h, chosen.gate_up, bias=self.b13,
                 activation=self.activation, gather=True)  # fmt: skip
        if between is not None:
            h = between(h)
        multiply(h, grouped, self.w2, y, chosen.down, bias=self.b2)
        return y, grouped


def expected_rows(recv: Received) -> float:
    """Of each expert, if every rank sends R tokens and no expert is preferred."""
    rows = recv.topk_ids.shape[0] * recv.topk_ids.shape[1]
    return rows * recv.spec.top_k / recv.spec.num_experts


def multiply(
    x: Tensor,
    grouped: Grouped,
    matrix: Arranged,
    out: Tensor,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    gather: bool = False,
) -> None:
    """``out[l] = x[row] @ matrix[expert].T + bias[expert]``, or the activation of that.

    Args:
        x: bf16 [n, K] where ``gather`` takes rows by row_index, else [L, K]; K up to the matrix's
            columns, the rest of which meet zeros.
        grouped: with an alignment that is a multiple of ``tile.block_m``.
        out: [L, N], with an activation [L, N/2]; fewer columns drop the last ones. Rows of gaps
            are not written.
        bias: fp32 [E, N].
    """
    gated = activation is not None
    rows = matrix.rows // (2 if gated else 1)
    block_n = tile.block_n if rows % tile.block_n == 0 else CHUNK
    length = len(grouped.row_index)
    tiles_m = triton.cdiv(triton.cdiv(length, tile.block_m), tile.group_m) * tile.group_m
    limit = activation.limit if activation is not None else math.inf
    given: dict[str, Any] = {
        "experts": matrix.num_experts,
        "experts_up": triton.next_power_of_2(matrix.num_experts),
        "n": rows,
        "k": matrix.columns,
        "x_columns": min(x.shape[1], matrix.columns),
        "out_columns": out.shape[1],
        "gather": gather,
        "gated": gated,
        "alpha": activation.alpha if activation is not None else 1.0,
        "beta": activation.beta if activation is not None else 0.0,
        "limit": limit if math.isfinite(limit) else None,
        "nvfp4": matrix.format == "nvfp4",
        "wide": matrix.wide,
        "far": len(x) * x.stride(0) >= 2**31,
        "block_m": tile.block_m,
        "block_n": block_n,
        "warps": tile.warps,
    }
    grouped_gemm[(tiles_m * (rows // block_n),)](
        x, grouped.row_index, grouped.expert_offsets, matrix.words, matrix.scales,
        matrix.decode_scale, bias, out, length, x.stride(0), out.stride(0), tile.group_m,
        **given, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip


def sum_up(rows: Tensor, grouped: Grouped, router: Tensor, out: Tensor) -> Tensor:
    """``out`` [W, R, H] from the experts' rows, [L, H], and router weights, fp32 [n, K]."""
    n, top_k = grouped.positions.shape
    if not n or not len(rows):
        return out.zero_()
    hidden = out.shape[-1]
    flat = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    weighted_sum[(n, triton.cdiv(hidden, _SUM_BLOCK))](
        rows, grouped.positions, router.contiguous(), flat, rows.stride(0), top_k, hidden,
        hidden=hidden, top_k=top_k, top_k_up=triton.next_power_of_2(top_k), block=_SUM_BLOCK,
        num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    return out if flat is out else out.copy_(flat)
