"""Block scales in the order that tensor cores read them: tiles of 128 or 8 rows by 4 columns.

M rows (tokens), C scales per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.formats.arguments import check_tensor
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["swizzle", "unswizzle"]

_TILE_COLUMNS = 4


@dataclass(frozen=True)
class _Layout:
    """A tile is `lanes` x `groups` rows; its memory runs over lanes, then groups, then columns."""

    groups: int
    lanes: int

    @property
    def rows(self) -> int:
        return self.groups * self.lanes


_LAYOUTS: Mapping[str, _Layout] = {
    "128x4": _Layout(groups=4, lanes=32),
    "8x4": _Layout(groups=1, lanes=8),
}


def swizzle(scales: torch.Tensor, layout: str = "128x4") -> torch.Tensor:
    """Linear scales to swizzled ones, padded with zero bytes to whole tiles.

    Args:
        scales: any 1-byte dtype, `[..., M, C]`; each matrix of a batch is swizzled by itself.
        layout: "128x4" or "8x4".

    Returns:
        A contiguous tensor of the same dtype, `[..., M padded to 128 or 8, C padded to 4]`. Only
        its memory order means something: element (m, c) of `scales` isn't found at [m, c].

    Raises:
        GeometryError: unknown layout.
        PayloadError: wider elements, or fewer than two dimensions.
    """
    tile = _tile(scales, layout)
    m, c = scales.shape[-2:]
    row_tiles, column_tiles = -(-m // tile.rows), -(-c // _TILE_COLUMNS)
    padding = (0, column_tiles * _TILE_COLUMNS - c, 0, row_tiles * tile.rows - m)
    padded = torch.nn.functional.pad(scales.view(torch.uint8), padding)
    tiles = padded.reshape(
        *scales.shape[:-2], row_tiles, tile.groups, tile.lanes, column_tiles, _TILE_COLUMNS
    )
    # From (row tile, group, lane, column tile, column) to memory order.
    return tiles.transpose(-4, -2).reshape(padded.shape).contiguous().view(scales.dtype)


def unswizzle(
    scales: torch.Tensor,
    layout: str = "128x4",
    *,
    rows: int | None = None,
    cols: int | None = None,
) -> torch.Tensor:
    """What `swizzle` undoes: swizzled scales to linear ones.

    Args:
        scales: any 1-byte dtype, `[..., M, C]` of whole tiles, as `swizzle` returns it.
        layout: "128x4" or "8x4".
        rows: rows to keep, all where None.
        cols: columns to keep, all where None.

    Returns:
        A contiguous tensor of the same dtype, `[..., rows, cols]`.

    Raises:
        GeometryError: unknown layout.
        PayloadError: wider elements, a shape that is not whole tiles, or more rows or columns
            wanted than there are.
    """
    tile = _tile(scales, layout)
    m, c = scales.shape[-2:]
    if m % tile.rows or c % _TILE_COLUMNS:
        raise PayloadError(
            f"swizzled scales must be whole tiles, rows a multiple of {tile.rows} and columns of "
            f"{_TILE_COLUMNS}; got {tuple(scales.shape)}: pass the tensor that swizzle returned"
        )
    keep_rows = _kept("rows", rows, m)
    keep_columns = _kept("cols", cols, c)
    row_tiles, column_tiles = m // tile.rows, c // _TILE_COLUMNS
    tiles = scales.view(torch.uint8).reshape(
        *scales.shape[:-2], row_tiles, column_tiles, tile.lanes, tile.groups, _TILE_COLUMNS
    )
    linear = tiles.transpose(-4, -2).reshape(scales.shape)
    return linear[..., :keep_rows, :keep_columns].contiguous().view(scales.dtype)


def _tile(scales: torch.Tensor, layout: str) -> _Layout:
    check_tensor("scales", scales)
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise GeometryError(f"layout={shown(layout)} is unknown: use one of {', '.join(_LAYOUTS)}")
    if scales.ndim < 2 or scales.dtype.itemsize != 1:
        raise PayloadError(
            "scales must have 1-byte elements and the shape [..., rows, columns]; got "
            f"{scales.dtype} {tuple(scales.shape)}"
        )
    return _LAYOUTS[layout]


def _kept(name: str, wanted: int | None, there: int) -> int:
    if wanted is None:
        return there
    is_int = isinstance(wanted, int) and not isinstance(wanted, bool)
    if not (is_int and 0 <= wanted <= there):
        raise PayloadError(
            f"{name}={shown(wanted)} must lie in 0..{there}, which is what the scales hold"
        )
    return wanted
