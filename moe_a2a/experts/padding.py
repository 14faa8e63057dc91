"""Weights with zeros around them, for kernels that want whole tiles.

E local experts, H hidden_size, I intermediate size; a matrix is N rows of K columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from moe_a2a.errors import GeometryError
from moe_a2a.experts.matrix import ExpertMatrix, weight_format
from moe_a2a.experts.weights import ExpertWeights
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["padded"]


def padded(weights: ExpertWeights, multiple: int = 128) -> ExpertWeights:
    """``weights`` with H and I rounded up to ``multiple``; the same object where they fit already.

    Gate and up are padded each by itself. A padded gate is 0, so is what the activation makes of
    it, and the columns of w2 that meet it are 0 as well: outputs are as before, in their first
    ``weights.hidden_size`` columns. Codes and scales of the padding are zero bytes.

    Args:
        multiple: a positive multiple of the blocks of both matrices.

    Raises:
        GeometryError: no ExpertWeights, or another ``multiple``.
    """
    if not isinstance(weights, ExpertWeights):
        raise GeometryError(f"weights={shown(weights)}: must be ExpertWeights")
    blocks = [weight_format(matrix.format).block for matrix in (weights.w13, weights.w2)]
    is_int = isinstance(multiple, int) and not isinstance(multiple, bool)
    if not is_int or multiple < 1 or any(multiple % block for block in blocks):
        raise GeometryError(
            f"multiple={shown(multiple)}: must be a positive multiple of {max(blocks)}"
        )
    hidden = _up(weights.w13.columns, multiple)
    inner = _up(weights.intermediate_size, multiple)
    if (hidden, inner) == (weights.w13.columns, weights.intermediate_size):
        return weights
    return replace(
        weights,
        w13=_matrix(weights.w13, 2, inner, hidden),
        w2=_matrix(weights.w2, 1, hidden, inner),
        b13=_bias(weights.b13, 2, inner),
        b2=_bias(weights.b2, 1, hidden),
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _matrix(matrix: ExpertMatrix, parts: int, rows: int, columns: int) -> ExpertMatrix:
    form = weight_format(matrix.format)
    payload = _grown(matrix.payload, parts, rows, form.payload_width(columns, form.block))
    scales = matrix.scales
    if scales is not None:
        scales = _grown(scales, parts, rows, form.scale_width(columns, form.block))
    return ExpertMatrix(payload, matrix.format, scales, matrix.decode_scale)


def _bias(bias: Tensor | None, parts: int, rows: int) -> Tensor | None:
    return None if bias is None else _grown(bias.unsqueeze(-1), parts, rows, 1).squeeze(-1)


def _grown(tensor: Tensor, parts: int, rows: int, width: int) -> Tensor:
    """[E, parts * n, m] -> [E, parts * rows, width], zeros behind each part and each row."""
    experts, had, columns = tensor.shape
    # The zero byte is zero in every storage dtype; not all of those can be padded as they are.
    stored = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    split = stored.reshape(experts, parts, had // parts, columns)
    grown = pad(split, (0, width - columns, 0, rows - had // parts))
    return grown.reshape(experts, parts * rows, width).view(tensor.dtype)
