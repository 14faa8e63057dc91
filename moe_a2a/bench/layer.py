"""What ``bench --layer`` runs: whole layers, the same experts behind each exchange.

E num_experts, H hidden_size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from moe_a2a import experts
from moe_a2a.bench.cases import Geometry, UsageError
from moe_a2a.errors import GeometryError
from moe_a2a.experts.matrix import weight_format
from moe_a2a.experts.selection import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from moe_a2a.bench.cases import Sweep

__all__ = ["SMALL", "LayerSweep", "layer_sweep"]

SMALL = Geometry("small", 512, 16, 4)  # what plain torch computes in milliseconds on a core
_WEIGHTS = "mxfp4"
_INTERMEDIATE: Mapping[str, int] = MappingProxyType(
    {
        SMALL.name: 256,
        "deepseek-v3": 2048,
        "deepseek-v4-flash": 2048,
        "gpt-oss-120b": 2880,
        "qwen3-235b": 1536,
        "kimi-k2": 2048,
    }
)


@dataclass(frozen=True)
class LayerSweep:
    """All points of a run of whole layers. Picklable.

    Attributes:
        sweep: geometry, ranks, tokens, wires, exchanges, effort.
        intermediate: I.
        weights: format of the experts' weights.
        backends: of the experts, by name; None is every one that is usable.
    """

    sweep: Sweep
    intermediate: int
    weights: str
    backends: tuple[str, ...] | None

    @property
    def ep_size(self) -> int:
        return self.sweep.ep_size

    @property
    def device(self) -> str:
        return self.sweep.device


def layer_sweep(sweep: Sweep, arguments: argparse.Namespace) -> LayerSweep:
    """``sweep`` with what the arguments say of the experts.

    Raises:
        UsageError: an argument that is wrong, or missing for this model.
    """
    geometry = sweep.geometry
    model = arguments.preset or SMALL.name  # its I also where --hidden, say, changed the rest
    inner = arguments.intermediate or _INTERMEDIATE.get(model)
    if inner is None:
        raise UsageError(f"--layer: give the intermediate size of {model} (--intermediate)")
    try:
        form = weight_format(arguments.weights or _WEIGHTS)
    except GeometryError as error:
        raise UsageError(f"--weights: {error}") from None
    for option, size in (("hidden size", geometry.hidden_size), ("--intermediate", inner)):
        if size % form.block:
            needed = f"{form.name} weights need a multiple of {form.block}"
            raise UsageError(f"{option} {size}: {needed}")
    wanted = arguments.expert_backend
    for name in wanted or ():
        if name not in experts.EXPERTS:
            there = ", ".join(experts.EXPERTS)
            raise UsageError(f"--expert-backend {name}: no such backend; there are {there}")
        takes = load(name).device_types
        if sweep.device not in takes:
            raise UsageError(
                f"--expert-backend {name}: computes with {'/'.join(takes)} tensors, and the "
                f"ranks' are on {sweep.device}"
            )
    return LayerSweep(sweep, inner, form.name, None if wanted is None else tuple(wanted))
