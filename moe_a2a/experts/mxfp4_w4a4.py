"""MXFP4 weights and MXFP4 activations: W4A4, native on Blackwell, the same result on Hopper.

n = W*R received rows, L grouped rows, E local experts, H hidden_size, I intermediate size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from moe_a2a.errors import GeometryError
from moe_a2a.experts.base import check_call, output_dtype, rows_dtype
from moe_a2a.experts.triton_w4a16 import other_format, without_triton
from moe_a2a.experts.weights import ExpertWeights, check_weights
from moe_a2a.formats.swizzle import swizzle

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.matrix import ExpertMatrix
    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["Mxfp4W4A4", "Quantized"]

_ALIGN = 128
_NATIVE = 10  # compute capability, its first number
_QUANTIZED_ROWS, _QUANTIZED_COLUMNS = 32, 128  # of one program


class Quantized(NamedTuple):
    """Grouped rows.

    Attributes:
        codes: uint8 [L, K/2].
        scales: uint8 [L rounded up to 128, K/32], E8M0, swizzled 128x4. Experts start at multiples
            of 128 rows, so where an expert's rows begin its scales do too.
    """

    codes: Tensor
    scales: Tensor


class Mxfp4W4A4:
    """The experts of one rank; both products are MXFP4 times MXFP4.

    Rows are quantized (rule `even`, block scales only), multiplied by w13 with fp32 accumulation,
    b13 is added, the activation computed in fp32, rounded to bf16 and quantized, and multiplied by
    w2. Up to the order of additions this is ``Emulated(..., rule="even")``. Tensor cores of compute
    capability 10.x multiply the codes as they are; others, for whom Triton decodes them to bf16,
    give the same result but are no faster than W4A16, which `select` prefers there.

    It never waits for the device. A call takes 8 bytes of each of I and 2 of each of H columns (4
    for outputs other than bf16) of
    as many rows as could arrive, W*R*min(top_k, experts) and up to 127 for each expert.

    Args:
        spec: of the exchange.
        device: of weights and rows.
        weights: mxfp4, H and I multiples of 128 (`moe_a2a.experts.padded` makes them so).
        block_k: columns of a step, 128 or 256; where it doesn't divide H and I, 128 is taken.
        warps: of a program.
        stages: steps that are under way at once.

    Raises:
        GeometryError: weights that don't fit the Spec, of another format, or with other sizes.
        PayloadError: weights on another device.
    """

    name: ClassVar[str] = "mxfp4_w4a4"
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)
    accepts: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    expects_unquantized_inputs: ClassVar[bool] = True

    def __init__(
        self,
        spec: Spec,
        device: torch.device | str,
        weights: ExpertWeights,
        *,
        block_k: int = 256,
        warps: int = 8,
        stages: int = 3,
    ) -> None:
        check_weights(weights, spec, device)
        reason = _unfit(weights)
        if reason is not None:
            raise GeometryError(reason)
        self.spec, self.weights = spec, weights
        self.invalid_expert_id = spec.invalid_expert_id
        self.hidden_dim_unpadded = spec.hidden_size
        both = (weights.w13, weights.w2)
        self._payloads = [matrix.payload.contiguous() for matrix in both]
        self._scales = [swizzle(_scales(matrix)) for matrix in both]
        self._biases = [
            None if bias is None else bias.to(torch.float32).contiguous()
            for bias in (weights.b13, weights.b2)
        ]
        self._block_k, self._warps, self._stages = block_k, warps, stages

    @staticmethod
    def unusable(
        spec: Spec | None, device: torch.device, weights: ExpertWeights | None
    ) -> str | None:
        missing = without_triton(device)
        if missing is not None:
            return missing
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != _NATIVE:
            return (
                f"MXFP4 tensor cores have compute capability {_NATIVE}.x, this is "
                f"{capability[0]}.{capability[1]}"
            )
        return None if weights is None else _unfit(weights)

    @torch.no_grad()
    def __call__(self, recv: Received, *, out: Tensor | None = None) -> Tensor:
        """As `moe_a2a.experts.base.Experts`; rows have to arrive unquantized."""
        from moe_a2a.experts.grouped_experts import sum_up

        recv = check_call(self.spec, recv, self.weights, out)
        if out is None:
            shape = (*recv.topk_ids.shape[:2], self.hidden_dim_unpadded)
            out = torch.empty(shape, dtype=output_dtype(self.spec), device=recv.x.device)
        rows, grouped = self._rows(recv, rows_dtype(out.dtype))
        return sum_up(rows, grouped, recv.topk_weights.flatten(0, 1), out)

    @torch.no_grad()
    def grouped_rows(self, recv: Received) -> tuple[Tensor, Grouped]:
        """As `moe_a2a.experts.base.GroupsRows`; rows have to arrive unquantized."""
        recv = check_call(self.spec, recv, self.weights, None)
        return self._rows(recv, rows_dtype(output_dtype(self.spec)))

    def _rows(self, recv: Received, dtype: torch.dtype) -> tuple[Tensor, Grouped]:
        if self.spec.quantized and not recv.deferred:
            raise GeometryError(
                f"rows arrived as {self.spec.wire}: these experts quantize by themselves, so "
                "prepare(..., defer_input_quant=experts.expects_unquantized_inputs)"
            )
        grouped = recv.group(_ALIGN)
        if not len(grouped.row_index):
            return recv.x.new_empty((0, self.hidden_dim_unpadded), dtype=dtype), grouped
        rows = self.quantize(recv.x.flatten(0, 1), grouped)
        gate_up = self.multiply(rows, grouped, 0, self.weights.w13.rows)
        h = self.activate(gate_up, grouped)
        return self.multiply(h, grouped, 1, self.hidden_dim_unpadded, dtype), grouped

    def quantize(self, x: Tensor, grouped: Grouped) -> Quantized:
        """Rows [n, H] bf16 or fp16 by row_index; gaps are zeros up to the last expert's end."""
        from moe_a2a.experts.triton_mxfp4 import quantize_rows

        columns = self.weights.w13.columns
        made, length = _quantized(grouped, columns)
        grid = (-(-length // _QUANTIZED_ROWS), columns // _QUANTIZED_COLUMNS)
        quantize_rows[grid](
            x, grouped.row_index, grouped.expert_offsets, *made, length, x.stride(0),
            experts=self.weights.num_experts, k=columns, x_columns=x.shape[1],
            rows=_QUANTIZED_ROWS, columns=_QUANTIZED_COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return made

    def activate(self, gate_up: Tensor, grouped: Grouped) -> Quantized:
        """fp32 [L, 2I] -> quantized [L, I]."""
        from moe_a2a.experts.triton_mxfp4 import activate_and_quantize

        columns, act = self.weights.w2.columns, self.weights.activation
        made, length = _quantized(grouped, columns)
        grid = (-(-length // _QUANTIZED_ROWS), columns // _QUANTIZED_COLUMNS)
        activate_and_quantize[grid](
            gate_up, grouped.row_index, grouped.expert_offsets, *made, length,
            experts=self.weights.num_experts, k=columns, alpha=act.alpha, beta=act.beta,
            limit=act.limit if math.isfinite(act.limit) else None,
            rows=_QUANTIZED_ROWS, columns=_QUANTIZED_COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return made

    def multiply(
        self,
        rows: Quantized,
        grouped: Grouped,
        which: int,
        columns: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """[L, columns] of the product with w13 (0) or w2 (1); gaps hold whatever was there."""
        import triton

        from moe_a2a.experts.triton_mxfp4 import scaled_gemm

        matrix = (self.weights.w13, self.weights.w2)[which]
        length = len(grouped.row_index)
        out = torch.empty((length, columns), dtype=dtype, device=rows.codes.device)
        tiles_m, group_m = triton.cdiv(length, _ALIGN), 8
        tiles_m = triton.cdiv(tiles_m, group_m) * group_m
        block_k = _ALIGN if matrix.columns % self._block_k else self._block_k
        scaled_gemm[(tiles_m * (matrix.rows // _ALIGN),)](
            rows.codes, rows.scales, grouped.row_index, grouped.expert_offsets,
            self._payloads[which], self._scales[which], self._biases[which], out,
            length, out.stride(0), group_m,
            experts=matrix.num_experts, experts_up=triton.next_power_of_2(matrix.num_experts),
            n=matrix.rows, k=matrix.columns, out_columns=columns, block_k=block_k,
            num_warps=self._warps, num_stages=self._stages, enable_fp_fusion=False,
        )  # fmt: skip
        return out


def _quantized(grouped: Grouped, columns: int) -> tuple[Quantized, int]:
    """Memory for the quantized rows, and L."""
    length = len(grouped.row_index)
    # A whole number of tiles is loaded, so there is one behind the last row.
    whole = -(-length // _ALIGN) * _ALIGN
    empty = grouped.row_index.new_empty
    codes, scales = (empty((whole, columns // n), dtype=torch.uint8) for n in (2, 32))
    return Quantized(codes, scales), length


def _scales(matrix: ExpertMatrix) -> Tensor:
    assert matrix.scales is not None
    return matrix.scales


def _unfit(weights: ExpertWeights) -> str | None:
    reason = other_format(weights)
    if reason is not None:
        return reason
    hidden, inner = weights.w13.columns, weights.intermediate_size
    if hidden % _ALIGN or inner % _ALIGN:
        return (
            f"H = {hidden} and I = {inner} must be multiples of {_ALIGN}: "
            "moe_a2a.experts.padded pads weights"
        )
    return None
