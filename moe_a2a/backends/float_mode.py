"""What a caller may have set for floating point, undone while a backend computes with torch."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["subnormals_kept"]

_SMALLEST_NORMAL = sys.float_info.min


@contextmanager
def subnormals_kept() -> Iterator[None]:
    """Undoes a caller's torch.set_flush_denormal(True) meanwhile: the formats need subnormals."""
    flushed = _SMALLEST_NORMAL / 2 == 0  # torch can set the mode, but not tell it
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
