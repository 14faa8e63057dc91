"""One matrix for each local expert, plain or quantized, as it stays in memory.

E local experts, N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.experts.arguments import FLOATS, check_shape, decode_scales, dense, device_there
from moe_a2a.experts.mxfp6 import MXFP6_E2M3, MXFP6_E3M2
from moe_a2a.formats import FORMATS, blocks
from moe_a2a.formats.bf16 import BF16
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_a2a.formats import WireFormat

__all__ = ["WEIGHT_FORMATS", "ExpertMatrix", "weight_format"]

WEIGHT_FORMATS: Mapping[str, WireFormat] = MappingProxyType(
    {
        "bf16": BF16,
        "fp32": replace(BF16, name="fp32", payload_dtype=torch.float32),
        **{name: FORMATS[name] for name in ("fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4")},
        "mxfp6_e3m2": MXFP6_E3M2,
        "mxfp6_e2m3": MXFP6_E2M3,
    }
)
_UNIT = 32  # a matrix of mxfp8 is not padded: every format's K is a multiple of its block
_NVFP4_LARGEST = 448.0 * 6.0
_ENCODE_LEAST, _ENCODE_MOST = 2.0**-119, 2.0**118  # formats/nvfp4.py: its factors are finite there
# Other names that checkpoints have for the same bytes.
_TWO_CODES = (torch.int8, torch.float4_e2m1fn_x2)


def weight_format(name: str) -> WireFormat:
    """The format behind a name of `WEIGHT_FORMATS`.

    Raises:
        GeometryError: unknown name.
    """
    if not isinstance(name, str) or name not in WEIGHT_FORMATS:
        raise GeometryError(f"format={shown(name)}: use one of {', '.join(WEIGHT_FORMATS)}")
    return WEIGHT_FORMATS[name]


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """One matrix [N, K] for each local expert.

    Args:
        payload: [E, N, width of K columns] in the format's storage dtype: torch.bfloat16, float32,
            float8_e4m3fn, or uint8 with K/2 bytes for nvfp4 and mxfp4 and 3K/4 for mxfp6 (int8 and
            float4_e2m1fn_x2 are taken for the same bytes).
        format: a key of `WEIGHT_FORMATS`.
        scales: [E, N, n] as `moe_a2a.formats.quantize` gives them for rows of K columns: fp32 with
            n = 1 (fp8) or K/128 (fp8_block128), uint8 with n = K/16 (nvfp4; float8_e4m3fn is taken
            for the same bytes) or K/32 (others; float8_e8m0fnu too). None for bf16 and fp32.
        decode_scale: fp32 [E], finite and positive, nvfp4 only: what the values are multiplied
            with, 1 where None. Checkpoints store this form; it is 1 over the encode scale.

    Raises:
        GeometryError: unknown format, or a K that its blocks don't divide.
        PayloadError: a tensor of another dtype, shape or device, or one that is missing or
            superfluous.
    """

    payload: Tensor
    format: str = "bf16"
    scales: Tensor | None = None
    decode_scale: Tensor | None = None

    def __post_init__(self) -> None:
        form = weight_format(self.format)
        payload = dense("payload", self.payload)
        if form.columns_per_element == 2 and payload.dtype in _TWO_CODES:
            payload = payload.view(torch.uint8)
        check_shape("payload", payload, (form.payload_dtype,), ("E", "N", "row"))
        object.__setattr__(self, "payload", payload)
        columns = self.columns
        if columns < 1 or columns % form.block or self._width(columns) != payload.shape[2]:
            raise GeometryError(
                f"payload is {describe(payload)}, {columns} columns per row: format {form.name} "
                f"needs a positive multiple of {form.block}"
            )
        self._check_scales(form)
        self._check_decode_scale(form)

    def _check_scales(self, form: WireFormat) -> None:
        if form.scale_dtype is None:
            if self.scales is not None:
                raise PayloadError(f"scales were given: format {form.name} has none")
            return
        shape = (*self.payload.shape[:2], form.scale_width(self.columns, _UNIT))
        if self.scales is None:
            raise PayloadError(
                f"scales=None: format {form.name} needs {str(form.scale_dtype)[6:]} {list(shape)}"
            )
        scales = dense("scales", self.scales)
        named = torch.float8_e4m3fn if form.takes_global_scale else torch.float8_e8m0fnu
        if form.scale_dtype is torch.uint8 and scales.dtype is named:
            scales = scales.view(torch.uint8)
        check_shape("scales", scales, (form.scale_dtype,), shape)
        self._check_place("scales", scales)
        object.__setattr__(self, "scales", scales)

    def _check_decode_scale(self, form: WireFormat) -> None:
        if self.decode_scale is None:
            return
        if not form.takes_global_scale:
            raise PayloadError(f"decode_scale was given: format {form.name} has none, nvfp4 does")
        scale = decode_scales("decode_scale", self.decode_scale, self.num_experts)
        self._check_place("decode_scale", scale)
        object.__setattr__(self, "decode_scale", scale)

    def _check_place(self, name: str, value: Tensor) -> None:
        if value.device != self.payload.device:
            raise PayloadError(f"{name} is on {value.device}: expected {self.payload.device}")

    def _width(self, columns: int) -> int:
        return weight_format(self.format).payload_width(columns, _UNIT)

    @classmethod
    def quantize(cls, w: Tensor, format: str, *, rule: str = "ceil") -> ExpertMatrix:
        """``w`` [E, N, K] bf16, fp16 or fp32 in ``format``; each expert has its own decode scale.

        With nvfp4 that scale is the expert's amax / (448 * 6), NaN ignored, between 2^-118 and
        2^119: with an infinite weight all finite ones of its expert become zeros.

        Args:
            rule: of the shared exponent (mxfp4 and mxfp6): "ceil", "even" or "floor".

        Raises:
            GeometryError: unknown format or rule, or a K that doesn't fit.
            PayloadError: a ``w`` of another dtype or shape.
        """
        form, w = weight_format(format), dense("w", w)
        check_shape("w", w, FLOATS, ("E", "N", "K"))
        if w.shape[2] < 1 or w.shape[2] % form.block:
            raise GeometryError(
                f"w is {describe(w)}: format {format} needs K a positive multiple of {form.block}"
            )
        if rule not in form.rules:
            raise GeometryError(f"rule={shown(rule)}: {format} knows {', '.join(form.rules)}")
        if not form.takes_global_scale:
            payload, scales = form.quantize(
                w.contiguous(), global_scale=None, alignment=_UNIT, rule=rule, ue8m0=False
            )
            return cls(payload, format, scales)
        encode = _encode_scales(w)
        sizes = [form.payload_width(w.shape[2], _UNIT), form.scale_width(w.shape[2], _UNIT)]
        payload, scales = (w.new_empty((*w.shape[:2], n), dtype=torch.uint8) for n in sizes)
        for e in range(len(w)):
            codes, sf = form.quantize(
                w[e].contiguous(), global_scale=encode[e], alignment=_UNIT, rule=rule, ue8m0=False
            )
            assert sf is not None
            payload[e], scales[e] = codes, sf
        return cls(payload, format, scales, torch.ones_like(encode) / encode)

    @property
    def num_experts(self) -> int:
        return self.payload.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.payload.shape[1]

    @property
    def columns(self) -> int:
        """K."""
        # Widths are proportional to columns: a block says by how much.
        block = weight_format(self.format).block * 4
        return self.payload.shape[2] * block // self._width(block)

    @property
    def device(self) -> torch.device:
        return self.payload.device

    def dequantize(self, experts: slice = slice(None)) -> Tensor:
        """fp32 [len(experts), N, K] of the experts in a slice of 0..E-1, each by its own scale.

        With nvfp4 a value is (code * block scale) * decode scale: the first product is exact.
        """
        form = weight_format(self.format)
        scales = None if self.scales is None else self.scales[experts]
        values = form.dequantize(
            self.payload[experts], scales, hidden_size=self.columns, global_scale=None
        )
        if self.decode_scale is None:
            return values
        return values * self.decode_scale[experts, None, None]

    def to(self, device: torch.device | str) -> ExpertMatrix:
        """The same on another device.

        Raises:
            GeometryError: no device, or none that this machine has.
        """
        device = device_there(device)
        moved = [
            part if part is None else part.to(device) for part in (self.scales, self.decode_scale)
        ]
        return ExpertMatrix(self.payload.to(device), self.format, *moved)


def _encode_scales(w: Tensor) -> Tensor:
    """fp32 [E] of nvfp4: 448 * 6 over the largest weight of each expert, 1 where all are zeros."""
    if not w.shape[1]:  # nothing is the largest of nothing
        return torch.ones(len(w), dtype=torch.float32, device=w.device)
    amax = blocks.amax(w.to(torch.float32)).amax(1)
    largest = torch.full_like(amax, _NVFP4_LARGEST)
    encode = largest / amax.where(amax > 0, largest)
    return encode.clamp(_ENCODE_LEAST, _ENCODE_MOST)
