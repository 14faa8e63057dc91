"""What stands between an expert's two matrices: a gated unit with a slope, an offset and a limit.

n rows, I intermediate size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts.arguments import dense
from moe_a2a.wording import describe, shown

__all__ = ["GPT_OSS", "SILU", "Activation", "deepseek_v4"]


_FP32_MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Activation:
    """``g * sigmoid(alpha * g) * (u + beta)``, g = min(gate, limit), u = clamp(up, -limit, limit).

    Args:
        alpha: slope inside the sigmoid.
        beta: added to u.
        limit: > 0; infinity limits nothing.

    Raises:
        GeometryError: no number, one that is not finite in fp32, or a limit that is not positive.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise GeometryError(f"{name}={shown(value)}: must be a number")
            if not (abs(value) <= _FP32_MOST or (name == "limit" and value == math.inf)):
                raise GeometryError(f"{name}={shown(value)}: must be finite in fp32")
            object.__setattr__(self, name, float(value))
        if self.limit <= 0:
            raise GeometryError(f"limit={self.limit}: must be > 0")

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 2I], gates in the first I columns -> fp32 [n, I].

        Five roundings, in this order: t = alpha*g, s = sigmoid(t), p = g*s, q = u + beta, p*q; the
        constants are rounded to fp32 first. NaN stays NaN.

        Raises:
            PayloadError: no dense tensor, another dtype, or an odd number of columns.
        """
        dense("gate_up", gate_up)
        if gate_up.dtype != torch.float32 or gate_up.ndim < 1 or gate_up.shape[-1] % 2:
            raise PayloadError(f"gate_up is {describe(gate_up)}: expected float32 [n, 2I]")
        gate, up = gate_up.chunk(2, dim=-1)
        g, u = gate, up
        if math.isfinite(self.limit):
            g, u = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return g * torch.sigmoid(self.alpha * g) * (u + self.beta)


SILU = Activation()
GPT_OSS = Activation(alpha=1.702, beta=1.0, limit=7.0)


def deepseek_v4(limit: float) -> Activation:
    """SiLU-and-mul with the limit that the model's config gives (``swiglu_limit``)."""
    return Activation(limit=limit)
