"""FlashInfer's CUTLASS experts on Hopper: MXFP4 weights, bf16 activations.

The kernels read weights in byte orders of their own, which change with FlashInfer's version, so
its own helpers put them there when they are loaded.
n rows, K top_k, E local experts, H hidden_size, I intermediate size, W ep_size, R
runtime_max_tokens; H and I padded where it says so.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from moe_a2a.errors import BackendUnavailable, GeometryError
from moe_a2a.experts.base import check_call, output_dtype
from moe_a2a.experts.padding import padded
from moe_a2a.experts.weights import ExpertWeights, check_weights
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.base import Held
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["FlashInferSm90", "Prepared", "prepare"]

_PACKAGE, _NEEDED = "flashinfer-python", (0, 6, 11)
_TILE = 128
_CAPABILITY = (9, 0)
_COMPILE = "flashinfer.fused_moe.core.get_cutlass_fused_moe_module('90')"


class Prepared(NamedTuple):
    """Weights as `cutlass_fused_moe` reads them, H and I padded to multiples of 128.

    Attributes:
        w13: uint8 [E, 2I, H/2], the rows of up, then those of gate, interleaved by FlashInfer.
        w2: uint8 [E, H, I/2], interleaved.
        scales: of w13 and w2, folded by FlashInfer, viewed as int32.
        b13: bf16 [E, 2I] in the order of w13; b2: bf16 [E, H]; both None or neither.
        alpha, beta, limit: fp32 [E].
    """

    w13: Tensor
    w2: Tensor
    scales: tuple[Tensor, Tensor]
    b13: Tensor | None
    b2: Tensor | None
    alpha: Tensor
    beta: Tensor
    limit: Tensor


class _Sizes(NamedTuple):
    of: ExpertWeights  # on meta
    device: torch.device

    def check_fits(self, spec: Spec, ep_rank: int | None = None) -> None:
        self.of.check_fits(spec, ep_rank)


class FlashInferSm90:
    """The experts of one rank on `flashinfer.fused_moe.cutlass_fused_moe`.

    Any wire: rows that arrived quantized are decoded to bf16 first. What the kernels write is
    bf16; rows without an expert here are zeros. A token's choices are summed in fp32 by a kernel of
    its own, not by atomics, where FlashInfer offers the choice, so that results repeat to the bit.

    Args:
        spec: of the exchange.
        device: of weights and rows.
        weights: of this rank's experts, both matrices mxfp4.

    Raises:
        GeometryError: weights that don't fit the Spec, or of another format.
        PayloadError: weights on another device.
        BackendUnavailable: no FlashInfer that can.
    """

    name: ClassVar[str] = "flashinfer_sm90"
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)
    accepts: ClassVar[tuple[str, ...]] = tuple(FORMATS)
    expects_unquantized_inputs: ClassVar[bool] = False

    def __init__(self, spec: Spec, device: torch.device | str, weights: ExpertWeights) -> None:
        check_weights(weights, spec, device)
        refused = _other_format(weights)
        if refused is not None:
            raise GeometryError(f"weights of {self.name}: {refused}")
        # Their sizes: what was given need not stay beside what the kernels read.
        self.spec, self._sizes = spec, _Sizes(weights.to("meta"), weights.device)
        self.invalid_expert_id = spec.invalid_expert_id
        self.hidden_dim_unpadded = spec.hidden_size
        self._kernels = _kernels()
        self._prepared = prepare(weights, self._kernels)
        takes = inspect.signature(self._kernels.cutlass_fused_moe).parameters
        # The fused one adds in bf16, by atomics, in whatever order blocks end.
        self._options = {"use_fused_finalize": False} if "use_fused_finalize" in takes else {}

    @property
    def weights(self) -> Held:
        return self._sizes

    @staticmethod
    def unusable(
        spec: Spec | None, device: torch.device, weights: ExpertWeights | None
    ) -> str | None:
        """As `moe_a2a.experts.base.Experts`; never compiles anything."""
        why = _wrong_version() or _wrong_device(device)
        if why is None and weights is not None:
            why = _other_format(weights)
        return why or _uncompiled()

    @torch.no_grad()
    def __call__(self, recv: Received, *, out: Tensor | None = None) -> Tensor:
        """As `moe_a2a.experts.base.Experts`."""
        recv = check_call(self.spec, recv, self._sizes, out)
        shape = (*recv.topk_ids.shape[:2], self.hidden_dim_unpadded)
        if out is None:
            out = torch.empty(shape, dtype=output_dtype(self.spec), device=recv.x.device)
        if not out.numel():
            return out
        if not self._sizes.of.num_experts:
            return out.zero_()
        width = self._prepared.w2.shape[1]
        direct = out.dtype == torch.bfloat16 and out.is_contiguous() and width == shape[2]
        rows = shape[0] * shape[1]
        y = out.view(rows, width) if direct else out.new_empty(rows, width, dtype=torch.bfloat16)
        self._run(recv, y)
        return out if direct else out.copy_(y[:, : shape[2]].view(shape))

    def _run(self, recv: Received, y: Tensor) -> None:
        """Writes y bf16 [W*R, H]."""
        x = recv.x if recv.x.dtype == torch.bfloat16 else recv.dequantize(torch.bfloat16)
        x = x.flatten(0, 1).contiguous()
        if x.shape[1] != y.shape[1]:
            x = torch.nn.functional.pad(x, (0, y.shape[1] - x.shape[1]))
        w = self._prepared
        self._kernels.cutlass_fused_moe(
            x,
            self._ids(recv),
            recv.topk_weights.flatten(0, 1).contiguous(),
            w.w13,
            w.w2,
            torch.bfloat16,
            list(w.scales),
            fc1_expert_biases=w.b13,
            fc2_expert_biases=w.b2,
            swiglu_alpha=w.alpha,
            swiglu_beta=w.beta,
            swiglu_limit=w.limit,
            ep_size=self.spec.ep_size,
            ep_rank=recv.ep_rank,
            output=y,
            use_w4_group_scaling=True,
            **self._options,
        )

    def _ids(self, recv: Received) -> Tensor:
        """int32 [W*R, K] as FlashInfer counts: every rank owns as many experts as this one.

        Where E divides evenly these are the ids themselves. Where it doesn't, the ranks behind the
        first few own one less; shifted by that, this rank's experts are where FlashInfer expects
        them, and no other id gets in between: the shift keeps all in order.
        """
        owned = len(self.spec.experts_of(recv.ep_rank))
        shift = owned * recv.ep_rank - self.spec.experts_of(recv.ep_rank).start
        ids = recv.topk_ids.flatten(0, 1)
        return (ids + shift if shift else ids).contiguous()


def prepare(weights: ExpertWeights, kernels: Any) -> Prepared:
    """``weights`` (mxfp4) in the order of `cutlass_fused_moe`.

    Args:
        kernels: has FlashInfer's `interleave_moe_weights_for_sm90_mixed_gemm` and
            `interleave_moe_scales_for_sm90_mixed_gemm`; the first wants CUDA tensors.
    """
    grown = padded(weights, _TILE)
    b13, b2 = grown.b13, grown.b2
    if (b13 is None) != (b2 is None):  # it reads both, or neither
        b13 = grown.w13.payload.new_zeros(grown.w13.payload.shape[:2]) if b13 is None else b13
        b2 = grown.w2.payload.new_zeros(grown.w2.payload.shape[:2]) if b2 is None else b2
    count, device = weights.num_experts, weights.device

    def each(value: float) -> Tensor:
        return torch.full((count,), value, dtype=torch.float32, device=device)

    act = weights.activation
    return Prepared(
        _interleaved(kernels, _up_then_gate(grown.w13.payload)),
        _interleaved(kernels, grown.w2.payload.contiguous()),
        tuple(
            kernels.interleave_moe_scales_for_sm90_mixed_gemm(scales).view(torch.int32)
            for scales in (_up_then_gate(grown.w13.scales), grown.w2.scales)
        ),
        None if b13 is None else _up_then_gate(b13).to(torch.bfloat16),
        None if b2 is None else b2.to(torch.bfloat16).contiguous(),
        each(act.alpha),
        each(act.beta),
        each(act.limit),
    )


def _up_then_gate(rows: Tensor | None) -> Tensor:
    """[E, 2I, ...] with the halves changed about."""
    assert rows is not None
    gate, up = rows.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


def _interleaved(kernels: Any, payload: Tensor) -> Tensor:
    found: Tensor = kernels.interleave_moe_weights_for_sm90_mixed_gemm(payload, "fp4")
    return found


def _other_format(weights: ExpertWeights) -> str | None:
    formats = dict.fromkeys((weights.w13.format, weights.w2.format))
    return (
        None if list(formats) == ["mxfp4"] else f"takes mxfp4 weights, not {' and '.join(formats)}"
    )


def _wrong_version() -> str | None:
    needed = f"{_PACKAGE} >= {'.'.join(map(str, _NEEDED))} is needed"
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        return f"{_PACKAGE} is not installed: {needed}"
    return None if _at_least(found, _NEEDED) else f"{_PACKAGE} {found} is installed: {needed}"


def _at_least(found: str, needed: tuple[int, ...]) -> bool:
    """Whether a version is ``needed`` or later; its alphas, betas and candidates come before it."""
    parts = re.match(r"v?(\d+(?:\.\d+)*)[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", found)
    if parts is None:
        return False
    release = tuple(int(part) for part in parts[1].split("."))
    release += (0,) * (len(needed) - len(release))
    return release > needed or (release == needed and parts[2] is None)


def _wrong_device(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found == _CAPABILITY:
        return None
    return f"is for compute capability 9.0 (Hopper), not {'.'.join(map(str, found))}"


@cache
def _uncompiled() -> str | None:
    """Why its kernels can't be called at once: an hour of compiling is nobody's side effect."""
    try:
        module = import_module("flashinfer.fused_moe").gen_cutlass_fused_moe_sm90_module()
        _kernels()
    except Exception as error:  # whatever a package of others raises when it is imported
        return f"FlashInfer can't be used: {type(error).__name__}: {error}"
    if getattr(module, "is_compiled", True):
        return None
    return (
        "FlashInfer's kernels for SM90 (some 240 CUDA files) are not compiled: install "
        f"flashinfer-jit-cache, or compile them once, by calling {_COMPILE}"
    )


def _kernels() -> Any:
    """The module with `cutlass_fused_moe` and the helpers of the same version."""
    try:
        found = import_module("flashinfer.fused_moe")
        for name in ("cutlass_fused_moe", *_HELPERS):
            getattr(found, name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise BackendUnavailable(
            f"experts='{FlashInferSm90.name}' can't be used: {why}",
            reasons={FlashInferSm90.name: why},
        ) from error
    return found


_HELPERS = (
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "interleave_moe_scales_for_sm90_mixed_gemm",
)
