"""The experts of a benchmark, and what a layer of them must give, in float64.

T tokens of a rank, K top_k, E local experts, H hidden_size, I intermediate size, W ep_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moe_a2a.bench.check import CheckFailed
from moe_a2a.experts import ExpertMatrix, ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moe_a2a.bench.inputs import Inputs
    from moe_a2a.bench.layer import LayerSweep

__all__ = ["check_layer", "drawn_weights", "expected", "normalized"]

_LARGEST = 32.0  # of what enters a matrix; nvfp4's scale on the wire is made for it too
_FOUR_BITS = ("mxfp4", "nvfp4")
# |out - wanted|^2 / (|out|^2 + |wanted|^2): of all tokens, and of the worst one. Rows and what is
# between the matrices lose a tenth each in four bits, so 0.02 is usual there.
_LIMITS = {True: (0.06, 0.2), False: (0.005, 0.02)}


def normalized(inputs: Inputs) -> Inputs:
    """Rows as they come out of an RMS norm, which is what stands before a layer of experts."""
    x = inputs.x.float()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    return inputs._replace(x=x.to(inputs.x.dtype))


def drawn_weights(sweep: LayerSweep, rank: int, device: torch.device) -> ExpertWeights:
    """Of a rank's experts, each a function of its id alone, quantized."""
    spec, inner = sweep.sweep.spec(sweep.sweep.wires[0]), sweep.intermediate
    hidden, mine = spec.hidden_size, spec.experts_of(rank)
    parts: list[list[ExpertMatrix]] = [[], []]
    for expert in mine:
        drawn = torch.Generator(device).manual_seed(sweep.sweep.seed * 1_000_003 + expert)
        for part, (rows, columns) in zip(parts, _shapes(hidden, inner), strict=True):
            w = torch.randn(1, rows, columns, generator=drawn, device=device) * columns**-0.5
            part.append(ExpertMatrix.quantize(w.to(torch.bfloat16), sweep.weights))
    w13, w2 = (
        _stacked(part, shape, sweep.weights, device)
        for part, shape in zip(parts, _shapes(hidden, inner), strict=True)
    )
    scale = None
    if sweep.weights == "nvfp4":
        scale = torch.full((len(mine),), _LARGEST / (448.0 * 6.0), device=device)
    return ExpertWeights(w13, w2, w13_input_scale=scale, w2_input_scale=scale)


def _shapes(hidden: int, inner: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2 * inner, hidden), (hidden, inner)


def _stacked(
    matrices: Sequence[ExpertMatrix], shape: tuple[int, int], form: str, device: torch.device
) -> ExpertMatrix:
    """One expert each -> all; none -> a matrix of none."""
    if not matrices:
        empty = ExpertMatrix.quantize(torch.zeros(1, *shape, device=device), form)
        kept = [p if p is None else p[:0] for p in (empty.scales, empty.decode_scale)]
        return ExpertMatrix(empty.payload[:0], form, *kept)

    def cat(name: str) -> Tensor | None:
        found = [getattr(matrix, name) for matrix in matrices]
        return None if found[0] is None else torch.cat(found)

    payload = torch.cat([m.payload.view(torch.uint8) for m in matrices])
    return ExpertMatrix(
        payload.view(matrices[0].payload.dtype), form, cat("scales"), cat("decode_scale")
    )


@torch.no_grad()
def expected(inputs: Sequence[Inputs], weights: ExpertWeights, first: int, rank: int) -> Tensor:
    """float64 [T, H] of this rank's tokens: decoded weights, rows as they are. Collective.

    Each rank computes what its experts make of all tokens; the sum over ranks is the layer.

    Args:
        inputs: of every rank, by rank, on the CPU.
        first: this rank's first expert.
    """
    device = weights.device
    x, ids, router = (torch.cat(parts).to(device) for parts in zip(*inputs, strict=True))
    total = torch.zeros(x.shape, dtype=torch.float64, device=device)
    for expert in range(weights.num_experts):
        weight = (router.double() * (ids == first + expert)).sum(1)
        rows = (ids == first + expert).any(1).nonzero().squeeze(1)
        one = slice(expert, expert + 1)
        gate, up = (x[rows].double() @ weights.w13.dequantize(one)[0].double().T).chunk(2, -1)
        h = gate * torch.sigmoid(gate) * up
        y = h @ weights.w2.dequantize(one)[0].double().T
        total[rows] += weight[rows, None] * y
    summed = total.cpu()
    dist.all_reduce(summed)
    before = sum(len(part.x) for part in inputs[:rank])
    return summed[before : before + len(inputs[rank].x)]


def check_layer(out: Tensor, wanted: Tensor, formats: Sequence[str], where: str) -> None:
    """Compares a layer's output [T, H] with what it must be.

    Args:
        formats: that rows or weights went through.

    Raises:
        CheckFailed: how far apart they are, and where.
    """
    if out.shape != wanted.shape:
        raise CheckFailed(f"{where}: {list(out.shape)} given, expected {list(wanted.shape)}")
    got = out.double().cpu()
    off = (got - wanted).square().sum(1)
    size = (got.square() + wanted.square()).sum(1)
    rows = torch.where(size > 0, off / size, torch.zeros_like(size))
    most, worst = _LIMITS[any(form in _FOUR_BITS for form in formats)]
    whole = float(off.sum() / size.sum()) if float(size.sum()) else 0.0
    at = int(rows.nan_to_num(torch.inf).argmax()) if len(rows) else 0
    if not (whole <= most and (not len(rows) or float(rows[at]) <= worst)):
        raise CheckFailed(
            f"{where}: the output is {whole:.2g} from the layer in float64 (at most {most}), row "
            f"{at} is {float(rows[at]):.2g} (at most {worst})"
        )
