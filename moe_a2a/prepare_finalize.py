"""The two ends of a MoE layer around its experts: prepare (quantize or defer, dispatch), finalize.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from moe_a2a.alltoall import AllToAll
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received

__all__ = ["PrepareFinalize", "Prepared"]


class Prepared(NamedTuple):
    """What the experts get; shapes as in `Received`, which comes along."""

    x: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    counts: Tensor
    received: Received


class PrepareFinalize:
    """Quantizes before dispatch (``quant="wire"``) or leaves that to the experts (``"defer"``).

    Raises:
        GeometryError: another ``quant``.
    """

    def __init__(self, a2a: AllToAll, quant: str = "wire") -> None:
        if not isinstance(quant, str) or quant not in ("wire", "defer"):
            raise GeometryError(f"quant={shown(quant)}: must be 'wire' or 'defer'")
        if not isinstance(a2a, AllToAll):
            raise GeometryError(f"a2a={shown(a2a)}: must be an AllToAll")
        self.a2a = a2a
        self.quant = quant

    def prepare(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        defer_input_quant: bool = False,
        **dispatch_keywords: Any,
    ) -> Prepared:
        """Dispatches ``x`` [T, H].

        Args:
            topk_weights: float32 [T, K].
            topk_ids: int32 or int64 [T, K].
            apply_router_weight_on_input: needs K == 1: x is multiplied by its weight, in fp32 and
                rounded to its dtype, into a copy, and weights of 1 are delivered.
            defer_input_quant: bf16 travels, for experts that quantize themselves.
            dispatch_keywords: of `AllToAll.dispatch`.

        Raises:
            PayloadError: K > 1 with ``apply_router_weight_on_input``, or the errors of `dispatch`.
        """
        if apply_router_weight_on_input:
            x, topk_weights = self._weighted(x, topk_weights, dispatch_keywords)
        asked = dispatch_keywords.pop("defer", False)
        defer = asked or defer_input_quant or self.quant == "defer"
        received = self.a2a.dispatch(x, topk_ids, topk_weights, defer=defer, **dispatch_keywords)
        return Prepared(
            received.x,
            received.scales,
            received.topk_ids,
            received.topk_weights,
            received.counts,
            received,
        )

    def finalize(
        self,
        y: Tensor,
        *,
        grouped: Grouped | None = None,
        out: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Combines ``y`` [W, R, H], then ``round(f32(combined) * factor + shared)``.

        Args:
            grouped: y is [N, H] in its order, for `AllToAll.combine_grouped`.
            out: [T, H] of y's dtype.
            routed_scaling_factor: default 1.
            shared: [T, H], output of the shared experts.

        Raises:
            StateError: no dispatch is open.
            PayloadError: the factor is no number, ``shared`` has another shape or device, is no
                floating tensor or requires grad; nothing was sent.
        """
        if not is_dynamo_compiling():
            self.a2a.need_dispatched("finalize")
        factor = self.check_finalize(self.a2a.round_tokens, shared, routed_scaling_factor)
        if shared is not None and isinstance(out, torch.Tensor):
            apart = not is_dynamo_compiling() and not _may_overlap(out, shared)
            # Combine writes out before shared is added; a graph has no addresses to compare.
            shared = shared if apart else shared.clone()
        if grouped is None:
            combined = self.a2a.combine(y, out=out)
        else:
            combined = self.a2a.combine_grouped(y, grouped, out=out)
        if factor is None and shared is None:
            return combined
        total = combined.to(torch.float32)
        if factor is not None:
            total = total * factor
        if shared is not None:
            total = total + shared.to(torch.float32)
        return combined.copy_(total)

    def _weighted(
        self, x: Tensor, topk_weights: Tensor, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        top_k = self.a2a.spec.top_k
        if top_k != 1:
            raise PayloadError(
                f"apply_router_weight_on_input with top_k={top_k}: a token has one row for all its "
                "experts, so only top_k == 1 can be weighted on the input"
            )
        if keywords.get("scales") is not None:
            raise PayloadError("apply_router_weight_on_input with scales: x is quantized already")
        if not (isinstance(x, torch.Tensor) and isinstance(topk_weights, torch.Tensor)):
            raise PayloadError("x and topk_weights must be tensors")
        for name, value in (("x", x), ("topk_weights", topk_weights)):
            if value.is_nested or value.layout is not torch.strided or value.dim() != 2:
                raise PayloadError(f"{name} is {describe(value)}: expected a dense [T, n]")
        if topk_weights.dtype != torch.float32 or topk_weights.shape != (x.shape[0], 1):
            raise PayloadError(
                f"topk_weights is {str(topk_weights.dtype)[6:]} {list(topk_weights.shape)}: "
                f"expected float32 [{x.shape[0]}, 1]"
            )
        weighted = (x.to(torch.float32) * topk_weights).to(x.dtype)
        return weighted, torch.ones_like(topk_weights)

    def check_finalize(
        self, tokens: int, shared: Tensor | None, routed_scaling_factor: float | None
    ) -> Tensor | None:
        """Raises what `finalize` would for a round of that many tokens.

        Returns:
            The factor as an fp32 scalar, None for 1.
        """
        factor = _factor(routed_scaling_factor)
        if shared is not None:
            self._check_shared(shared, tokens)
        return factor

    def _check_shared(self, shared: Tensor, tokens: int) -> None:
        hidden = self.a2a.spec.hidden_size
        if not isinstance(shared, torch.Tensor):
            raise PayloadError(f"shared is {type(shared).__name__}: expected a tensor")
        if shared.is_nested or shared.layout is not torch.strided:
            raise PayloadError(f"shared is {describe(shared)}: expected a dense tensor")
        if shared.shape != (tokens, hidden) or not shared.dtype.is_floating_point:
            raise PayloadError(
                f"shared is {str(shared.dtype)[6:]} {list(shared.shape)}: expected a floating "
                f"[{tokens}, {hidden}]"
            )
        if shared.device != self.a2a.device:
            raise PayloadError(f"shared is on {shared.device}: expected {self.a2a.device}")
        if shared.requires_grad and torch.is_grad_enabled():
            raise PayloadError("shared requires grad, and no gradient flows through the exchange")


def _factor(value: object) -> Tensor | None:
    """An fp32 scalar: a Python float would be kept in double precision."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PayloadError(f"routed_scaling_factor={shown(value)}: expected a number")
    try:
        return torch.tensor(float(value), dtype=torch.float32)
    except OverflowError:
        raise PayloadError(f"routed_scaling_factor={shown(value)}: too large for a float") from None


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
