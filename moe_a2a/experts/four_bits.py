"""Four-bit weights as the Triton kernels read them: as many bytes, in another order.

E local experts, N rows, K columns, C = K/128 chunks of columns; N and K are multiples of 128.

A word of 32 bits holds eight codes. With the columns of a chunk written as
``k = 32*i + 16*s + 8*h + 2*t + c`` (s, h, c of one bit, i and t of two), word ``4*t + i`` of a row
has the codes of that i and t, c choosing its half. That is what the thread t of a quarter of a warp
feeds to a tensor core, so a load of 16 bytes is followed by arithmetic only: nothing is exchanged
between threads. Inside a half the bits of the four codes (s, h) are spread so that three of them
need one shift and one mask to become the sign, the exponent and the mantissa of a bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError, PayloadError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.experts.matrix import ExpertMatrix

__all__ = ["CHUNK", "FORMATS", "Arranged", "arrange"]

CHUNK = 128
FORMATS = ("mxfp4", "nvfp4")
# Where sign, two exponent bits and mantissa bit of the code (s, h) go in its half of the word.
# bf16 has them at 15, 8, 7, 6: the first needs no shift, then 3 and 6 to the left; the last takes
# what is free.
_BITS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 10, 11))
# Up to this E8M0 byte, 2^(e-127) and the 2^126 that normalizes a code are one bf16 factor.
_ONE_FACTOR = 128


@dataclass(frozen=True, eq=False)
class Arranged:
    """One matrix for each local expert.

    Attributes:
        words: int32 [E, C, N, 16].
        scales: int32 [E, C, s, N]: the four bytes of i = 0..3; s is 1 for mxfp4, whose blocks cover
            both s, and 2 for nvfp4.
        format: "mxfp4" or "nvfp4".
        decode_scale: fp32 [E], nvfp4 only: 2^9 times what the values are multiplied with, as the
            kernel's bf16 values are 2^-9 of them.
        wide: some mxfp4 scale is too large for the short way of decoding.
    """

    words: Tensor
    scales: Tensor
    format: str
    decode_scale: Tensor | None
    wide: bool

    @property
    def num_experts(self) -> int:
        return self.words.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.words.shape[2]

    @property
    def columns(self) -> int:
        """K."""
        return self.words.shape[1] * CHUNK


def arrange(matrix: ExpertMatrix) -> Arranged:
    """``matrix`` in that order, a copy; one expert at a time takes four more bytes per byte.

    Raises:
        GeometryError: another format, or sizes that are not multiples of 128
            (`moe_a2a.experts.padded` makes them so).
        PayloadError: on the meta device.
    """
    if matrix.format not in FORMATS or matrix.rows % CHUNK or matrix.columns % CHUNK:
        raise GeometryError(
            f"a matrix of {matrix.format} with {matrix.rows} rows and {matrix.columns} columns: "
            f"expected {' or '.join(FORMATS)} and multiples of {CHUNK}"
        )
    if matrix.payload.is_meta:
        raise PayloadError("the weights are on meta: expected a device that holds them")
    experts, rows, chunks = matrix.num_experts, matrix.rows, matrix.columns // CHUNK
    words = torch.empty(
        (experts, chunks, rows, 16), dtype=torch.int32, device=matrix.payload.device
    )
    spread = _spread().to(matrix.payload.device)
    for expert in range(experts):
        # A byte is the two codes of one (i, s, h, t).
        codes = matrix.payload[expert].reshape(rows, chunks, 4, 4, 4).to(torch.int32)
        parts = [spread[p].index_select(0, codes[:, :, :, p].reshape(-1)) for p in range(4)]
        word = (parts[0] | parts[1] | parts[2] | parts[3]).view(rows, chunks, 4, 4)
        words[expert] = word.permute(1, 0, 3, 2).reshape(chunks, rows, 16)
    assert matrix.scales is not None
    kinds = matrix.scales.shape[2] // (chunks * 4)
    parted = matrix.scales.reshape(experts, rows, chunks, 4, kinds)  # ..., i, s
    planes = parted.permute(0, 2, 4, 1, 3).reshape(-1).view(torch.int32)
    scales = planes.view(experts, chunks, kinds, rows)
    decode = None
    if matrix.format == "nvfp4":
        ones = torch.ones(experts, dtype=torch.float32, device=words.device)
        decode = (ones if matrix.decode_scale is None else matrix.decode_scale) * 2.0**9
    wide = matrix.format == "mxfp4" and bool((matrix.scales > _ONE_FACTOR).any())
    return Arranged(words, scales, matrix.format, decode, wide)


def _spread() -> Tensor:
    """int32 [4, 256]: the bits of a byte of two codes, put where (s, h) has them."""
    table = torch.zeros((4, 256), dtype=torch.int64)
    byte = torch.arange(256)
    for pair, places in enumerate(_BITS):
        for source, place in zip((3, 2, 1, 0), places, strict=True):
            table[pair] |= (byte >> source & 1) << place
            table[pair] |= (byte >> 4 + source & 1) << 16 + place
    return torch.where(table >= 2**31, table - 2**32, table).to(torch.int32)
