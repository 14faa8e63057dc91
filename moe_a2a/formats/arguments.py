"""What callers may pass to `quantize` and `dequantize`, checked before any arithmetic.

H hidden_size, P payload elements per row, S scales per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from moe_a2a.formats.base import WireFormat

__all__ = ["check_dequantize", "check_quantize", "check_tensor"]

_PADDING_UNIT = 32
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT_NAMES = "torch.bfloat16, torch.float16 or torch.float32"


def check_tensor(name: str, value: object) -> None:
    """Raises PayloadError unless it is a dense tensor."""
    # Nested tensors say that they are strided, and raise when they are asked for their shape.
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout is not torch.strided:
        raise PayloadError(f"{name} must be a dense tensor; got {describe(value)}")


def check_quantize(
    x: torch.Tensor,
    wire: WireFormat,
    *,
    global_scale: torch.Tensor | None,
    alignment: int,
    rule: str,
    ue8m0: bool,
) -> None:
    """Raises the GeometryError or PayloadError that `quantize` documents."""
    check_tensor("x", x)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise GeometryError(f"alignment={shown(alignment)}: expected an integer")
    if not isinstance(ue8m0, bool):
        raise GeometryError(f"ue8m0={shown(ue8m0)}: expected True or False")
    if not isinstance(rule, str) or rule not in wire.rules:
        raise GeometryError(
            f"rule={shown(rule)} with wire {wire.name}: it knows {', '.join(wire.rules)}"
            + ("" if len(wire.rules) > 1 else "; only mxfp4 has a choice of rules")
        )
    if ue8m0 and not wire.takes_ue8m0:
        raise GeometryError(f"ue8m0=True with wire {wire.name}: only fp8_block128 has that variant")
    if not 1 <= alignment < 2**31 or alignment % _PADDING_UNIT:
        raise GeometryError(
            f"alignment={shown(alignment)} must be a positive multiple of {_PADDING_UNIT} "
            "below 2^31"
        )
    if x.dtype not in _FLOATS:
        raise PayloadError(f"x must be {_FLOAT_NAMES}; got {x.dtype}")
    if x.ndim == 0:
        raise PayloadError("x must have the shape [..., hidden_size]; got a scalar")
    hidden_size = x.shape[-1]
    if hidden_size < 1 or (hidden_size % wire.block and not wire.pads_columns):
        raise GeometryError(
            f"hidden_size={hidden_size} (the last dimension of x) must be a positive multiple of "
            f"{wire.block} for wire {wire.name}: pad the rows or use another wire"
        )
    _check_global_scale(global_scale, wire, x.device)


def check_dequantize(
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    wire: WireFormat,
    *,
    hidden_size: int | None,
    global_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> int:
    """Raises the PayloadError that `dequantize` documents; returns the columns wanted."""
    check_tensor("payload", payload)
    if scales is not None:
        check_tensor("scales", scales)
    if hidden_size is not None and (
        isinstance(hidden_size, bool) or not isinstance(hidden_size, int)
    ):
        raise PayloadError(f"hidden_size={shown(hidden_size)}: expected an integer")
    if dtype not in _FLOATS:
        raise PayloadError(f"dtype must be {_FLOAT_NAMES}; got {dtype}")
    if payload.dtype != wire.payload_dtype or payload.ndim == 0:
        raise PayloadError(
            f"payload of wire {wire.name} must be {wire.payload_dtype} [..., row]; got "
            f"{payload.dtype} {tuple(payload.shape)}"
        )
    columns = payload.shape[-1] * wire.columns_per_element
    if columns < 1 or columns % wire.block:
        raise PayloadError(
            f"payload of wire {wire.name} holds {columns} columns per row (shape "
            f"{tuple(payload.shape)}); it must be a positive multiple of {wire.block}"
        )
    if hidden_size is None:
        hidden_size = columns
    elif not (1 <= hidden_size <= columns if wire.pads_columns else hidden_size == columns):
        bound = f"1..{columns}" if wire.pads_columns else f"{columns}"
        raise PayloadError(
            f"hidden_size={shown(hidden_size)} does not fit a payload {tuple(payload.shape)} of "
            f"wire {wire.name}: expected {bound}"
        )
    _check_scales(scales, payload, columns, wire)
    _check_global_scale(global_scale, wire, payload.device)
    return hidden_size


def _check_scales(
    scales: torch.Tensor | None, payload: torch.Tensor, columns: int, wire: WireFormat
) -> None:
    if wire.scale_dtype is None:
        if scales is not None:
            raise PayloadError(f"wire {wire.name} has no scales: pass None")
        return
    shape = (*payload.shape[:-1], wire.scale_width(columns, _PADDING_UNIT))
    expected = f"{wire.scale_dtype} {shape} on {payload.device}"
    if scales is None:
        raise PayloadError(f"wire {wire.name} needs scales, {expected}; got None")
    if (scales.dtype, scales.shape, scales.device) != (wire.scale_dtype, shape, payload.device):
        raise PayloadError(
            f"scales of wire {wire.name} must be {expected}; got {scales.dtype} "
            f"{tuple(scales.shape)} on {scales.device}"
        )


def _check_global_scale(
    global_scale: torch.Tensor | None, wire: WireFormat, device: torch.device
) -> None:
    if global_scale is None:
        return
    if not wire.takes_global_scale:
        raise PayloadError(f"global_scale with wire {wire.name}: only nvfp4 takes one, pass None")
    expected = f"a torch.float32 tensor of one element on {device}"
    if not isinstance(global_scale, torch.Tensor) or global_scale.is_nested:
        raise PayloadError(f"global_scale must be {expected}; got {describe(global_scale)}")
    check_tensor("global_scale", global_scale)
    # On the rows' own device: torch turns division by a CPU scalar into a product on a GPU.
    found = (global_scale.dtype, global_scale.numel(), global_scale.device)
    if found != (torch.float32, 1, device):
        raise PayloadError(
            f"global_scale must be {expected}; got {global_scale.dtype} "
            f"{tuple(global_scale.shape)} on {global_scale.device}"
        )
