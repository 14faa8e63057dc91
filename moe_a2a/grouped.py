"""Received rows listed by local expert, for experts that want the rows of each side by side.

Shape letters: K top_k, H hidden_size, W ep_size, R runtime_max_tokens, E experts of this rank,
N places of the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from moe_a2a._ops import cpu_library, cuda_library
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = [
    "Choices",
    "Grouped",
    "blank",
    "check",
    "gather",
    "group",
    "listed",
    "result_dtype",
    "weighted_sums",
]

_PLACES = 2**31 - 1  # they are numbered by int32
_SEGMENT = 128  # choices that a warp counts, at least
_SEGMENTS = 256  # warps that count, at most
_ONE_BLOCK = 1024  # choices that one block lists sooner than three kernels (8 us, they 9 to 14)
_ONE_BLOCK_EXPERTS = 361  # whose counts fit the shared memory of one block


@dataclass(frozen=True, eq=False)
class Grouped:
    """Where each local expert's rows are. Local copies: they outlive the round's receive views.

    Expert e has places ``expert_offsets[e]`` to ``expert_offsets[e + 1]``; its rows come first, by
    source rank, then slot, then choice, and the places left until the next multiple of ``align``
    are gaps. A row that names an expert twice has two places there.

    Only rows that name an expert twice can need more places than there are, and only where K > E.
    On the CPU that is a `PayloadError`. On CUDA, where nobody waits to find out, offsets stay at or
    below the last multiple of ``align`` in the list, choices past it have position -2 and stand
    nowhere, and `AllToAll.combine_grouped` makes their rows NaN.

    Attributes:
        row_index: int32 [N], rows of ``recv.x.view(W * R, -1)``; -1 in gaps and past the last
            expert. N is W * R * min(K, E) + E * (align - 1).
        expert_offsets: int32 [E + 1], multiples of ``align``.
        row_weights: float32 [N], the router weight of each place; 0 where there is no row.
        positions: int32 [W * R, K], the place of each choice of each row, -1 where its expert is
            not here. Ascending places are ascending experts, then choices: in that order
            `AllToAll.combine_grouped` sums.
        round: ``recv.counts``, by which its round is known; None is not compared.
    """

    row_index: Tensor
    expert_offsets: Tensor
    row_weights: Tensor
    positions: Tensor
    round: object = None


class Choices(NamedTuple):
    """What is to be listed: all choices of a round, and whose experts."""

    topk_ids: Tensor  # int32 [W, R, K]
    topk_weights: Tensor  # float32 [W, R, K]
    counts: Tensor  # int32 [W]
    first: int
    experts: int


def group(recv: Received, align: int) -> Grouped:
    """`Received.group`."""
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        raise GeometryError(f"align={shown(align)}: must be an integer >= 1")
    own = recv.spec.experts_of(recv.ep_rank)
    places = _places(recv.topk_ids, len(own), align)
    if places > _PLACES or align > _PLACES:
        raise GeometryError(
            f"align={shown(align)}: the rows of {len(own)} experts would take {places:,} places; "
            f"at most {_PLACES:,}"
        )
    choices = Choices(recv.topk_ids, recv.topk_weights, recv.counts, own.start, len(own))
    if is_dynamo_compiling():
        index, offsets, weights, positions = torch.ops.moe_a2a.group(*choices, align)
        return Grouped(index, offsets, weights, positions)
    return Grouped(*listed(choices, align), round=recv.counts)


def _places(topk_ids: Tensor, experts: int, align: int) -> int:
    sources, rows, top_k = topk_ids.shape
    return sources * rows * min(top_k, experts) + experts * (align - 1)


def blank(choices: Choices, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `Grouped`, in its order, to be filled in."""
    ids = choices.topk_ids
    sources, rows, top_k = ids.shape
    places = _places(ids, choices.experts, align)
    return (
        ids.new_empty(places),
        ids.new_empty(choices.experts + 1),
        choices.topk_weights.new_empty(places),
        ids.new_empty(sources * rows, top_k),
    )


def listed(
    choices: Choices, align: int, library: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `Grouped`; ``library``: of kernels that take the way of CUDA's."""
    found = blank(choices, align)
    index, offsets, weights, positions = found
    ids, router, counts, first, experts = choices
    own = (ids, router, counts, first, align, offsets, index, weights, positions)
    if ids.device.type == "cpu" and library is None:
        if not cpu_library().group(*own):
            raise PayloadError(
                f"group(align={align}): rows that name an expert twice take more than the "
                f"{index.shape[0]:,} places that {ids.shape[0] * ids.shape[1]:,} rows of "
                f"{experts} local experts have"
            )
        return found
    segments = max(min(-(-ids.numel() // _SEGMENT), _SEGMENTS), 1)
    if ids.numel() <= _ONE_BLOCK and experts <= _ONE_BLOCK_EXPERTS:
        segments = 0
    scratch = ids.new_empty((segments + 1) * experts if segments else 0)
    if library is not None:
        library.group(*own, scratch, segments, 0)
        return found
    device = ids.device.index
    with torch.cuda.device(device):
        stream = torch._C._cuda_getCurrentRawStream(device)
        cuda_library().group(*own, scratch, segments, stream)
    return found


def gather(recv: Received, grouped: Grouped) -> tuple[Tensor, Tensor | None]:
    """`Received.gather`."""
    sources, rows, top_k = recv.topk_ids.shape
    check(grouped, sources * rows, top_k, recv.x.device, recv.counts)
    scales = None if recv.scales is None else _taken(recv.scales, grouped.row_index)
    return _taken(recv.x, grouped.row_index), scales


def check(grouped: Grouped, rows: int, top_k: int, device: torch.device, round: object) -> None:
    """Raises `PayloadError` unless it is of the round, of so many rows, W * R."""
    if not isinstance(grouped, Grouped):
        raise PayloadError(f"grouped is {describe(grouped)}: expected what recv.group() returns")
    if grouped.round is not None and round is not None and grouped.round is not round:
        raise PayloadError("grouped is of another round: expected this one's recv.group()")
    index, weights, positions = grouped.row_index, grouped.row_weights, grouped.positions
    places = index.shape[:1] if isinstance(index, torch.Tensor) else ()
    expected = (
        ("row_index", index, torch.int32, places),
        ("row_weights", weights, torch.float32, places),
        ("positions", positions, torch.int32, (rows, top_k)),
    )
    for name, tensor, dtype, shape in expected:
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != dtype
            or tensor.shape != shape
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            raise PayloadError(
                f"grouped.{name} is {describe(tensor)}: expected {str(dtype)[6:]} {list(shape)} on "
                f"{device}, of this round's recv.group()"
            )


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """[W, R, n] -> [N, n], zeros where ``index`` has no row. Bytes: not all dtypes are indexed."""
    if not rows.shape[1]:  # nothing that index_select could take in a gap
        return rows.new_zeros(index.shape[0], rows.shape[2])
    flat = rows.flatten(0, 1).view(torch.uint8)
    taken = flat.index_select(0, index.clamp(min=0))
    return taken.masked_fill_((index < 0).unsqueeze(-1), 0).view(rows.dtype)


def result_dtype(spec: Spec, rows: Tensor) -> torch.dtype:
    """Of what `AllToAll.combine_grouped` returns: of what travels, unless that is quantized."""
    plain = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return plain.get(spec.combine_wire, rows.dtype)


def weighted_sums(rows: Tensor, grouped: Grouped, first: int, count: int) -> Tensor:
    """float32 [count, H]: what `AllToAll.combine_grouped` makes of ``count`` received rows, from
    the flat row ``first`` on, in plain torch."""
    places = grouped.positions[first : first + count].sort(1).values
    places = places.where(places < rows.shape[0], -2)  # as what has no place at all
    total = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    for choice in places.unbind(1):  # ascending
        at = (choice >= 0).nonzero().squeeze(1)
        place = choice[at]
        weight = grouped.row_weights[place].unsqueeze(-1)
        total[at] = total[at] + rows[place].float() * weight
    total[(places < -1).any(1)] = torch.nan
    return total
