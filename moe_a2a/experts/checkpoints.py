"""Weights as published checkpoints lay them out, put in this library's order.

E local experts, H hidden_size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts.activation import GPT_OSS, Activation, deepseek_v4
from moe_a2a.experts.arguments import FLOATS, check_shape, dense
from moe_a2a.experts.matrix import ExpertMatrix
from moe_a2a.experts.weights import ExpertWeights
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["e8m0_bytes", "from_deepseek_v4", "from_gpt_oss"]

_BLOCK, _BLOCK_BYTES = 32, 16  # 32 codes of four bits
_MANTISSA_BITS, _MANTISSA = 23, 0x7FFFFF
_TWO_TO_MINUS_127 = 0x00400000


def from_gpt_oss(
    tensors: Mapping[str, Tensor],
    experts: range | None = None,
    *,
    activation: Activation = GPT_OSS,
) -> ExpertWeights:
    """The experts of one layer of GPT-OSS: MXFP4, with biases, gate and up rows taking turns.

    Args:
        tensors: by the last part of the checkpoint's names, all experts of the model in each:
            ``gate_up_proj_blocks`` uint8 [experts, 2I, H/32, 16] with gate in the even rows,
            ``gate_up_proj_scales`` uint8 [experts, 2I, H/32], ``gate_up_proj_bias`` [experts, 2I],
            ``down_proj_blocks`` uint8 [experts, H, I/32, 16], ``down_proj_scales``
            [experts, H, I/32], ``down_proj_bias`` [experts, H].
        experts: those of this rank, ``spec.experts_of(rank)``; None is all.

    Raises:
        GeometryError: ``experts`` is no range.
        PayloadError: no mapping, a tensor that is missing or has another dtype or shape, or fewer
            experts than asked for.
    """
    if experts is not None and not isinstance(experts, range):
        raise GeometryError(
            f"experts={shown(experts)}: must be a range, spec.experts_of(rank), or None for all"
        )
    taken = {name: _of_rank(name, tensors, experts) for name in _GPT_OSS}
    for proj in ("gate_up_proj", "down_proj"):
        blocks, scales = taken[f"{proj}_blocks"], taken[f"{proj}_scales"]
        check_shape(f"{proj}_blocks", blocks, (torch.uint8,), ("E", "N", "K/32", _BLOCK_BYTES))
        check_shape(f"{proj}_scales", scales, (torch.uint8,), tuple(blocks.shape[:3]))
        bias = taken[f"{proj}_bias"]
        check_shape(f"{proj}_bias", bias, FLOATS, tuple(blocks.shape[:2]))
    return ExpertWeights(
        w13=ExpertMatrix(
            _gate_then_up(taken["gate_up_proj_blocks"].flatten(2)),
            "mxfp4",
            _gate_then_up(taken["gate_up_proj_scales"]),
        ),
        w2=ExpertMatrix(taken["down_proj_blocks"].flatten(2), "mxfp4", taken["down_proj_scales"]),
        activation=activation,
        b13=_gate_then_up(taken["gate_up_proj_bias"]),
        b2=taken["down_proj_bias"],
    )


_GPT_OSS = tuple(
    f"{proj}_{part}"
    for proj in ("gate_up_proj", "down_proj")
    for part in ("blocks", "scales", "bias")
)


def from_deepseek_v4(
    experts: Iterable[Mapping[str, Tensor]],
    *,
    limit: float,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
) -> ExpertWeights:
    """The experts of one layer of DeepSeek-V4: MXFP4, a matrix each for gate (w1) and up (w3).

    Args:
        experts: one mapping for each local expert, ascending, by the last parts of the
            checkpoint's names: ``w1.weight`` and ``w3.weight`` [I, H/2], ``w2.weight`` [H, I/2]
            (uint8, int8 or float4_e2m1fn_x2), ``w1.scale``, ``w3.scale`` [I, H/32], ``w2.scale``
            [H, I/32] (E8M0 bytes as uint8 or float8_e8m0fnu, or fp32 powers of two).
        limit: of the activation, ``swiglu_limit`` in the config.
        hidden_size: H, a multiple of 32. A rank without experts needs both sizes, its weights are
            empty and on the CPU; elsewhere None takes them from the tensors.
        intermediate_size: I, the same.

    Raises:
        PayloadError: no list of mappings, none in it and a size missing, a tensor that is missing
            or of another dtype, shape or device, or an fp32 scale that is no power of two.
        GeometryError: a limit that is not positive, or a size that is none or not the tensors'.
    """
    activation = deepseek_v4(limit)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, size in sizes.items():
        is_int = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and (not is_int or size < 1 or size % _BLOCK):
            raise GeometryError(f"{name}={shown(size)}: must be a positive multiple of {_BLOCK}")
    held = _listed(experts)
    if not held:
        if hidden_size is None or intermediate_size is None:
            raise PayloadError("experts is empty: hidden_size and intermediate_size are needed")
        return _no_experts(hidden_size, intermediate_size, activation)
    weights = _deepseek_v4(held, activation)
    for name, size in sizes.items():
        if size not in (None, getattr(weights, name)):
            raise GeometryError(f"{name}={size}: the tensors have {getattr(weights, name)}")
    return weights


def _listed(experts: object) -> list[Mapping[str, Tensor]]:
    unordered = isinstance(experts, (Mapping, torch.Tensor, str, bytes))
    if unordered or not isinstance(experts, Iterable):
        raise PayloadError(
            f"experts is {describe(experts)}: expected a list of mappings, in the order of the "
            "rank's experts"
        )
    held = list(experts)
    for at, one in enumerate(held):
        if not isinstance(one, Mapping):
            raise PayloadError(
                f"expert {at} is {describe(one)}: expected a mapping from names to tensors"
            )
    return held


def _no_experts(hidden: int, inner: int, activation: Activation) -> ExpertWeights:
    def empty(rows: int, columns: int) -> ExpertMatrix:
        payload, scales = (
            torch.empty(0, rows, columns // n, dtype=torch.uint8) for n in (2, _BLOCK)
        )
        return ExpertMatrix(payload, "mxfp4", scales)

    return ExpertWeights(empty(2 * inner, hidden), empty(hidden, inner), activation)


def _deepseek_v4(experts: list[Mapping[str, Tensor]], activation: Activation) -> ExpertWeights:
    def stacked(part: str, *names: str) -> Tensor:
        rows = [_whole(one, at, names, part) for at, one in enumerate(experts)]
        for at, row in enumerate(rows):
            if (row.shape, row.device) != (rows[0].shape, rows[0].device):
                raise PayloadError(
                    f"{'+'.join(names)}.{part} of expert {at} is {list(row.shape)} on {row.device}:"
                    f" expected {list(rows[0].shape)} on {rows[0].device}, as expert 0"
                )
        return torch.stack(rows)

    return ExpertWeights(
        w13=ExpertMatrix(stacked("weight", "w1", "w3"), "mxfp4", stacked("scale", "w1", "w3")),
        w2=ExpertMatrix(stacked("weight", "w2"), "mxfp4", stacked("scale", "w2")),
        activation=activation,
    )


def e8m0_bytes(scales: Tensor) -> Tensor:
    """fp32 powers of two, 2^-127 to 2^127, any shape -> E8M0 bytes, uint8; exact.

    Raises:
        PayloadError: another dtype, a tensor on meta, or a value that E8M0 doesn't have: zero,
            negative, NaN, infinite, or between two powers of two.
    """
    return _exponents("scales", scales)


def _exponents(name: str, scales: Tensor) -> Tensor:
    scales = dense(name, scales)
    if scales.dtype != torch.float32 or scales.is_meta:
        raise PayloadError(
            f"{name} is {describe(scales)}: expected float32, with numbers to look at"
        )
    bits = scales.contiguous().view(torch.int32)
    exponent = bits >> _MANTISSA_BITS
    normal = (bits & _MANTISSA == 0) & (exponent >= 1) & (exponent <= 254)
    wrong = ~(normal | (bits == _TWO_TO_MINUS_127))
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        value = scales[tuple(at)].item()
        raise PayloadError(
            f"{name}{at} is {value!r}: E8M0 holds powers of two from 2^-127 to 2^127, and rounding "
            "would change the weights"
        )
    return exponent.to(torch.uint8)  # 2^-127 is a subnormal: exponent 0, and byte 0


def _gate_then_up(rows: Tensor) -> Tensor:
    """[E, 2I, ...] of rows that take turns -> the I of gate, then the I of up."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


def _entry(tensors: Mapping[str, Tensor], name: str, whose: str = "") -> Tensor:
    if name not in tensors:
        there = sorted(tensors, key=str)
        raise PayloadError(f"{name}{whose} is missing; there are {shown(there)}")
    return dense(f"{name}{whose}", tensors[name])


def _of_rank(name: str, tensors: Mapping[str, Tensor], experts: range | None) -> Tensor:
    if not isinstance(tensors, Mapping):
        raise PayloadError(
            f"tensors is {describe(tensors)}: expected a mapping from names to tensors"
        )
    found = _entry(tensors, name)
    if experts is None:
        return found
    if found.ndim < 1 or not 0 <= experts.start <= experts.stop <= len(found) or experts.step != 1:
        raise PayloadError(f"{name} is {list(found.shape)}: experts {experts} were asked for")
    return found[experts.start : experts.stop]


def _whole(expert: Mapping[str, Tensor], at: int, names: tuple[str, ...], part: str) -> Tensor:
    """The rows of one expert's matrices, one below the other, as bytes."""
    whose = f" of expert {at}"
    found = [_entry(expert, f"{name}.{part}", whose) for name in names]
    rows = []
    for name, tensor in zip(names, found, strict=True):
        fp4 = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
        dtypes = fp4 if part == "weight" else (torch.uint8, torch.float8_e8m0fnu, torch.float32)
        check_shape(f"{name}.{part}{whose}", tensor, dtypes, ("N", "n"))
        if tensor.dtype == torch.float32:
            tensor = _exponents(f"{name}.{part}{whose}", tensor)
        rows.append(tensor.view(torch.uint8))
    if len({(row.shape, row.device) for row in rows}) > 1:
        places = " and ".join(f"{list(row.shape)} on {row.device}" for row in rows)
        raise PayloadError(f"{' and '.join(names)} {part}{whose} are {places}: expected the same")
    return torch.cat(rows)
