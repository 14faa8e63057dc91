"""Experts in plain torch, for hardware that lacks the formats: right on any device, fast on none.

Rows and weights are quantized and decoded exactly as hardware would see them, then multiplied as
bf16 with fp32 accumulation. One expert at a time is expanded in memory, as fp32; four-bit weights
on CUDA are not, where Triton is installed.
n rows of one expert, K top_k, H hidden_size, I intermediate size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from moe_a2a.errors import GeometryError
from moe_a2a.experts.base import check_call, output_dtype
from moe_a2a.experts.four_bits import FORMATS as FOUR_BITS
from moe_a2a.experts.input_scale import shared_encode_scale
from moe_a2a.experts.matrix import weight_format
from moe_a2a.experts.triton_w4a16 import without_triton
from moe_a2a.experts.weights import ExpertWeights, check_weights
from moe_a2a.formats import FORMATS
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.matrix import ExpertMatrix
    from moe_a2a.formats import WireFormat
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["Emulated"]

_UNIT = 32


class Emulated:
    """The experts of one rank, computed as hardware with the formats would.

    For a row x of an expert: x is quantized to the activation format and decoded, unless it arrived
    in that format; ``h = x @ w13 + b13``; the activation in fp32, its result rounded to bf16;
    quantized and decoded again; ``y = h @ w2 + b2``, in fp32. What enters a product is rounded to
    bf16 (not with fp32 weights), and accumulated in fp32. On CUDA mxfp4 and nvfp4 weights are
    decoded inside a Triton kernel and the host never waits; with other weights, or without Triton,
    it waits for the device, so that a call can't be captured in a graph.

    Args:
        spec: of the exchange.
        device: of weights and rows.
        weights: of this rank's experts; H of w13 may be padded.
        activations: format that both matrices' inputs are quantized to, a key of
            `moe_a2a.experts.WEIGHT_FORMATS`; "bf16" and "fp32" quantize nothing. None is each
            matrix's own.
        rule: shared exponent of mxfp4 and mxfp6 activations. The wires' "ceil" by default;
            hardware W4A4 pipelines use "even".

    Raises:
        GeometryError: no Spec, no device, weights that don't fit the Spec, an unknown format or
            rule, or a format whose blocks don't divide a matrix's columns.
        PayloadError: weights on another device.
    """

    name: ClassVar[str] = "emulated"
    device_types: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    accepts: ClassVar[tuple[str, ...]] = tuple(FORMATS)
    expects_unquantized_inputs: ClassVar[bool] = False

    def __init__(
        self,
        spec: Spec,
        device: torch.device | str,
        weights: ExpertWeights,
        *,
        activations: str | None = None,
        rule: str = "ceil",
    ) -> None:
        check_weights(weights, spec, device)
        self.spec, self.weights = spec, weights
        self._in_kernels = None
        if decodes_in_kernels(weights):
            from moe_a2a.experts.grouped_experts import GroupedExperts

            self._in_kernels = GroupedExperts(weights)
            self.weights = weights.to("meta")  # sizes; the bytes are there in another order
        self.invalid_expert_id = spec.invalid_expert_id
        self.hidden_dim_unpadded = spec.hidden_size
        inputs = (
            ("w13", weights.w13, weights.w13_input_scale),
            ("w2", weights.w2, weights.w2_input_scale),
        )
        self._w13_input, self._w2_input = (
            _Input(name, activations or matrix.format, matrix.columns, scale, rule)
            for name, matrix, scale in inputs
        )

    def __repr__(self) -> str:
        weights = dict.fromkeys((self.weights.w13.format, self.weights.w2.format))
        rows = dict.fromkeys((self._w13_input.format, self._w2_input.format))
        return f"Emulated(weights={'+'.join(weights)}, activations={'+'.join(rows)})"

    @staticmethod
    def unusable(
        spec: Spec | None, device: torch.device, weights: ExpertWeights | None
    ) -> str | None:
        return None

    @torch.no_grad()
    def __call__(self, recv: Received, *, out: Tensor | None = None) -> Tensor:
        """As `moe_a2a.experts.base.Experts`."""
        recv = check_call(self.spec, recv, self._in_kernels or self.weights, out)
        local = recv.local_ids().flatten(0, 1)  # [W*R, K]
        router = recv.topk_weights.flatten(0, 1)
        arrived = None if recv.deferred else self.spec.wire
        decoded = recv.dequantize().flatten(0, 1)
        if self._in_kernels is not None:
            return self._grouped(decoded, arrived, recv, out)
        total = torch.zeros_like(decoded)
        for expert in range(self.weights.num_experts):
            hit = local == expert
            rows = hit.any(-1).nonzero().squeeze(-1)
            if not len(rows):
                continue
            y = self._expert(expert, decoded[rows], arrived)
            for choice in range(local.shape[1]):
                chose = hit[rows, choice]
                at = rows[chose]
                # No row occurs twice in `at`, so nothing hangs on the order of these stores.
                total[at] = total[at] + y[chose] * router[at, choice].unsqueeze(-1)
        out = self._output(recv, out)
        return out.copy_(total.view(out.shape))

    def _output(self, recv: Received, out: Tensor | None) -> Tensor:
        shape = (*recv.topk_ids.shape[:2], self.hidden_dim_unpadded)
        if out is not None:
            return out
        return torch.empty(shape, dtype=output_dtype(self.spec), device=recv.topk_ids.device)

    def _grouped(
        self, decoded: Tensor, arrived: str | None, recv: Received, out: Tensor | None
    ) -> Tensor:
        """All experts at once; rows of gaps and padding are quantized too, and never looked at."""
        assert self._in_kernels is not None

        def seen(h: Tensor) -> Tensor:
            return self._w2_input.seen_by_hardware(h.to(torch.float32), None).to(torch.bfloat16)

        x = torch.nn.functional.pad(decoded, (0, self.weights.w13.columns - decoded.shape[1]))
        x = self._w13_input.seen_by_hardware(x, arrived).to(torch.bfloat16)
        return self._in_kernels(x, recv, self._output(recv, out), between=seen)

    def _expert(self, expert: int, x: Tensor, arrived: str | None) -> Tensor:
        """fp32 [n, H] -> fp32 [n, H]; ``arrived`` is the wire's format, None for bf16."""
        weights = self.weights
        x = torch.nn.functional.pad(x, (0, weights.w13.columns - x.shape[1]))
        x = self._w13_input.seen_by_hardware(x, arrived)
        h = weights.activation(_product(x, weights.w13, weights.b13, expert))
        if weights.w2.format != "fp32":
            h = _bf16(h)
        h = self._w2_input.seen_by_hardware(h, None)
        return _product(h, weights.w2, weights.b2, expert)[:, : self.hidden_dim_unpadded]


def decodes_in_kernels(weights: ExpertWeights) -> bool:
    """Whether a Triton kernel can take these weights as they are packed."""
    known = {weights.w13.format, weights.w2.format} <= set(FOUR_BITS)
    return known and weights.device.type == "cuda" and without_triton(weights.device) is None


class _Input:
    """What the rows that meet a matrix go through first."""

    def __init__(
        self, which: str, name: str, columns: int, decode: Tensor | None, rule: str
    ) -> None:
        self._form: WireFormat = weight_format(name)
        form = self._form
        if columns % form.block:
            raise GeometryError(
                f"{which} has {columns} columns: activations={name!r} needs a multiple of "
                f"{form.block}; moe_a2a.experts.padded pads weights"
            )
        if rule not in ("ceil", "even", "floor"):
            raise GeometryError(f"rule={shown(rule)}: must be one of ceil, even, floor")
        self._rule = rule if rule in form.rules else form.rules[0]
        self._scale = None
        if form.takes_global_scale and decode is not None:
            self._scale = shared_encode_scale(decode, name=f"{which}_input_scale")

    @property
    def format(self) -> str:
        return self._form.name

    def seen_by_hardware(self, x: Tensor, arrived: str | None) -> Tensor:
        """fp32 [n, K], quantized and decoded; as it is if that is how it ``arrived``."""
        form = self._form
        if form.scale_dtype is None or form.name == arrived:
            return x
        payload, scales = form.quantize(
            x.contiguous(),
            global_scale=self._scale,
            alignment=_UNIT,
            rule=self._rule,
            ue8m0=False,
        )
        return form.dequantize(payload, scales, hidden_size=x.shape[-1], global_scale=self._scale)


def _product(x: Tensor, matrix: ExpertMatrix, bias: Tensor | None, expert: int) -> Tensor:
    """``x @ matrix.T + bias`` of one expert, fp32 [n, K] -> fp32 [n, N]."""
    w = matrix.dequantize(slice(expert, expert + 1))[0]
    # Products of bf16 are exact in fp32, so this is what a bf16 unit accumulates.
    y = x @ w.T if matrix.format == "fp32" else _bf16(x) @ _bf16(w).T
    return y if bias is None else y + bias[expert].to(torch.float32)


def _bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, kept as fp32."""
    return x.to(torch.bfloat16).to(torch.float32)
