"""MXFP4 weights and bf16 activations, by Triton: W4A16.

H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar

import torch

from moe_a2a.errors import GeometryError
from moe_a2a.experts.base import check_call, output_dtype, rows_dtype
from moe_a2a.experts.weights import ExpertWeights, check_weights
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.base import Held
    from moe_a2a.experts.tiles import Tiles
    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["TritonW4A16", "other_format", "without_triton"]

_LEAST_TRITON = (3, 4)
# Compute capabilities by their first number: tiles are cut for the 227 KiB of shared memory that a
# program can have there, twice what others have.
_CAPABILITIES = (9, 10)


def without_triton(device: torch.device) -> str | None:
    """Why Triton's kernels can't run on that device; None where they can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install 'moe-a2a[cuda]'"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < _LEAST_TRITON:
        return f"triton {found} is installed, {'.'.join(map(str, _LEAST_TRITON))} is needed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in _CAPABILITIES:
        return (
            f"its programs need the shared memory of compute capability 9.x or 10.x, this is "
            f"{capability[0]}.{capability[1]}"
        )
    return None


class TritonW4A16:
    """The experts of one rank; weights are decoded in registers.

    ``h = x @ w13 + b13`` with fp32 accumulation, the activation in fp32, its result rounded to
    bf16, ``y = h @ w2 + b2`` in fp32, rounded to bf16 where the output is bf16. Decoded weights are
    bf16 exactly, so but for the order of additions and that last step this is what
    ``Emulated(..., activations="bf16")`` computes. It never waits for the device and can be
    captured in a CUDA graph.

    A call takes memory for as many rows as could arrive, L = W*R*min(top_k, experts) and the
    alignment: 2 bytes of each of I and 2 of each of H columns (4 for outputs other than bf16).
    Weights are kept in an order of their own, as many bytes: drop yours to have them once.

    Args:
        spec: of the exchange.
        device: of weights and rows.
        weights: mxfp4, of this rank's experts.
        tiles: how products are cut into programs; None is a table's choice for the rows that an
            expert can be expected to have, W*R*top_k / num_experts.

    Raises:
        GeometryError: weights that don't fit the Spec, or of another format.
        PayloadError: weights on another device.
    """

    name: ClassVar[str] = "triton_w4a16"
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)
    accepts: ClassVar[tuple[str, ...]] = tuple(FORMATS)
    expects_unquantized_inputs: ClassVar[bool] = False

    def __init__(
        self,
        spec: Spec,
        device: torch.device | str,
        weights: ExpertWeights,
        *,
        tiles: Tiles | None = None,
    ) -> None:
        check_weights(weights, spec, device)
        reason = other_format(weights)
        if reason is not None:
            raise GeometryError(reason)
        from moe_a2a.experts.grouped_experts import GroupedExperts

        self.spec, self.tiles = spec, tiles
        self.invalid_expert_id = spec.invalid_expert_id
        self.hidden_dim_unpadded = spec.hidden_size
        self._experts = GroupedExperts(weights)

    @property
    def weights(self) -> Held:
        return self._experts

    @staticmethod
    def unusable(
        spec: Spec | None, device: torch.device, weights: ExpertWeights | None
    ) -> str | None:
        missing = without_triton(device)
        if missing is not None or weights is None:
            return missing
        return other_format(weights)

    @torch.no_grad()
    def __call__(self, recv: Received, *, out: Tensor | None = None) -> Tensor:
        """As `moe_a2a.experts.base.Experts`; rows of other wires are decoded to bf16 first."""
        recv = check_call(self.spec, recv, self._experts, out)
        if out is None:
            shape = (*recv.topk_ids.shape[:2], self.hidden_dim_unpadded)
            out = torch.empty(shape, dtype=output_dtype(self.spec), device=recv.x.device)
        dtype = rows_dtype(out.dtype)
        return self._experts(self._decoded(recv), recv, out, dtype=dtype, tiles=self.tiles)

    @torch.no_grad()
    def grouped_rows(self, recv: Received) -> tuple[Tensor, Grouped]:
        """As `moe_a2a.experts.base.GroupsRows`."""
        recv = check_call(self.spec, recv, self._experts, None)
        dtype = rows_dtype(output_dtype(self.spec))
        return self._experts.rows(self._decoded(recv), recv, dtype, tiles=self.tiles)

    @staticmethod
    def _decoded(recv: Received) -> Tensor:
        from moe_a2a.experts.triton_decode import as_bf16

        return as_bf16(recv)


def other_format(weights: ExpertWeights) -> str | None:
    """What these weights are, unless both matrices are mxfp4."""
    found = dict.fromkeys((weights.w13.format, weights.w2.format))
    if tuple(found) == ("mxfp4",):
        return None
    return f"computes with mxfp4 weights, not {' and '.join(found)}"
