"""Rows as blocks of columns, and the largest magnitude of a block.

H hidden_size, N blocks per row, B columns per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["amax", "split"]


def split(x: torch.Tensor, columns: int) -> torch.Tensor:
    """`[..., H]` -> `[..., N, B]` with B = `columns`, which divides H."""
    # Both sizes are spelled out: with no rows at all, -1 could not be inferred.
    return x.reshape(*x.shape[:-1], x.shape[-1] // columns, columns)


def amax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest |x| of each block: fp32 `[..., N, B]` -> fp32 `[..., N]`.

    NaN elements are ignored; a block of nothing but NaN has amax 0.
    """
    magnitude = blocks.abs()
    return magnitude.masked_fill_(magnitude.isnan(), 0.0).amax(-1)
