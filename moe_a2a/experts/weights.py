"""The weights of a rank's experts: two matrices each, and what belongs to them.

E local experts, H hidden_size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts.activation import SILU, Activation
from moe_a2a.experts.arguments import FLOATS, check_shape, decode_scales, dense, device_there, place
from moe_a2a.experts.matrix import ExpertMatrix
from moe_a2a.spec import Spec
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExpertWeights", "check_weights"]


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """All that a rank's experts need.

    Args:
        w13: [E, 2I, H]: the rows of gate, then those of up. (Checkpoints that interleave them are
            put in order by `moe_a2a.experts.checkpoints`.)
        w2: [E, H, I].
        activation: between the two.
        b13: [E, 2I] bf16, fp16 or fp32, ordered like w13's rows; None is no bias.
        b2: [E, H], or None.
        w13_input_scale: fp32 [E], decode scales of the rows that w13 is multiplied with, where
            those are quantized to nvfp4; None is 1.
        w2_input_scale: the same for w2.
        hidden_size: H without the padding of `moe_a2a.experts.padding`; default all of w13's
            columns.

    Raises:
        GeometryError: sizes of the two matrices that don't belong together, or a hidden_size
            outside 1..H.
        PayloadError: a tensor of another dtype, shape or device.
    """

    w13: ExpertMatrix
    w2: ExpertMatrix
    activation: Activation = SILU
    b13: Tensor | None = None
    b2: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None
    hidden_size: int = 0

    def __post_init__(self) -> None:
        for name in ("w13", "w2"):
            if not isinstance(getattr(self, name), ExpertMatrix):
                raise PayloadError(
                    f"{name} is {describe(getattr(self, name))}: expected an ExpertMatrix"
                )
        if not isinstance(self.activation, Activation):
            raise GeometryError(f"activation={shown(self.activation)}: must be an Activation")
        experts, (n13, k13), (n2, k2) = self.num_experts, _size(self.w13), _size(self.w2)
        if self.w2.num_experts != experts or n13 % 2 or (n2, 2 * k2) != (k13, n13):
            raise GeometryError(
                f"w13 is [{experts}, {n13}, {k13}] and w2 is [{self.w2.num_experts}, {n2}, {k2}]: "
                "expected [E, 2I, H] and [E, H, I]"
            )
        if self.w2.device != self.device:
            raise PayloadError(f"w2 is on {self.w2.device}: expected {self.device}, as w13")
        for name, width in (("b13", n13), ("b2", n2)):
            self._keep(name, FLOATS, (experts, width))
        for name in ("w13_input_scale", "w2_input_scale"):
            if self._keep(name, (torch.float32,), (experts,)):
                decode_scales(name, getattr(self, name), experts)
        self._check_hidden_size(k13)

    def _keep(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> bool:
        if getattr(self, name) is None:
            return False
        value = dense(name, getattr(self, name))
        check_shape(name, value, dtypes, shape)
        if value.device != self.device:
            raise PayloadError(f"{name} is on {value.device}: expected {self.device}, as w13")
        object.__setattr__(self, name, value)
        return True

    def _check_hidden_size(self, columns: int) -> None:
        size = self.hidden_size
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= columns:
            raise GeometryError(
                f"hidden_size={shown(size)}: w13 has {columns} columns, so 1..{columns}"
            )
        object.__setattr__(self, "hidden_size", size or columns)

    @property
    def num_experts(self) -> int:
        """E, of this rank."""
        return self.w13.num_experts

    @property
    def intermediate_size(self) -> int:
        """I, padding included."""
        return self.w2.columns

    @property
    def device(self) -> torch.device:
        return self.w13.device

    def check_fits(self, spec: Spec, ep_rank: int | None = None) -> None:
        """Whether these are weights for an exchange (of that rank).

        Raises:
            GeometryError: no Spec, another hidden size, or another number of local experts.
        """
        if not isinstance(spec, Spec):
            raise GeometryError(f"spec={shown(spec)}: must be a Spec")
        if self.hidden_size != spec.hidden_size:
            raise GeometryError(
                f"the weights have hidden_size={self.hidden_size}, the Spec {spec.hidden_size}"
            )
        ranks = range(spec.ep_size) if ep_rank is None else (ep_rank,)
        owned = sorted({len(spec.experts_of(rank)) for rank in ranks})
        if self.num_experts not in owned:
            whose = "a rank" if ep_rank is None else f"rank {ep_rank}"
            raise GeometryError(
                f"the weights hold {self.num_experts} experts: {whose} owns "
                f"{' or '.join(map(str, owned))} of {spec.num_experts} (ep_size={spec.ep_size})"
            )

    def check_on(self, device: torch.device | str) -> None:
        """Whether they are on that device; without an index, on any of its kind.

        Raises:
            GeometryError: no device.
            PayloadError: they are on another.
        """
        there, wanted = self.device, place(device)
        # Only CUDA's tensors say an index: what is on "cpu:0" says "cpu".
        if there.type != wanted.type or (
            None not in (wanted.index, there.index) and wanted != there
        ):
            raise PayloadError(f"the weights are on {there}: expected {wanted}; weights.to(device)")

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same on another device.

        Raises:
            GeometryError: no device, or none that this machine has.
        """
        device = device_there(device)
        moved: dict[str, Any] = {"w13": self.w13.to(device), "w2": self.w2.to(device)}
        for name in ("b13", "b2", "w13_input_scale", "w2_input_scale"):
            part = getattr(self, name)
            moved[name] = None if part is None else part.to(device)
        return replace(self, **moved)


def _size(matrix: ExpertMatrix) -> tuple[int, int]:
    return matrix.rows, matrix.columns


def check_weights(weights: object, spec: Spec, device: torch.device | str) -> None:
    """Raises `GeometryError` unless they are a rank's for that exchange, `PayloadError` where they
    are on another device."""
    if not isinstance(weights, ExpertWeights):
        raise GeometryError(f"weights={shown(weights)}: must be ExpertWeights")
    weights.check_fits(spec)
    weights.check_on(device)
