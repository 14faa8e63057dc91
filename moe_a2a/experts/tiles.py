"""How the grouped GEMM is cut into programs, by how many rows an expert can be expected to have."""

from __future__ import annotations

from dataclasses import dataclass

from moe_a2a.errors import GeometryError

__all__ = ["Tile", "Tiles", "tiles_for"]

_BLOCKS_M = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Tile:
    """Of one matrix product.

    Attributes:
        block_m: grouped rows of a program, a power of two from 16 to 256.
        block_n: rows of the matrix (of gate, and as many of up), 64, 128 or 256, at least 16 per
            warp; 128 is taken where 256 doesn't divide them.
        warps: 4 or 8.
        stages: chunks of 128 columns that are under way at once.
        group_m: tiles of rows that take turns before the next rows of the matrix.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    group_m: int = 1

    def __post_init__(self) -> None:
        good = self.block_m in _BLOCKS_M and self.block_n in (64, 128, 256) and self.warps in (4, 8)
        if not good or 16 * self.warps > self.block_n or min(self.stages, self.group_m) < 1:
            raise GeometryError(
                f"{self}: block_m must be one of {', '.join(map(str, _BLOCKS_M))}, block_n 64, "
                "128 or 256 and at least 16 * warps, warps 4 or 8, stages and group_m positive"
            )


@dataclass(frozen=True)
class Tiles:
    """Of both products of an expert; ``gate_up`` has two accumulators."""

    gate_up: Tile
    down: Tile

    @property
    def align(self) -> int:
        """What an expert's rows start at a multiple of, so that no tile has two experts."""
        return max(self.gate_up.block_m, self.down.block_m)


# Up to so many rows per expert; the best of `benchmarks/grouped_gemm.py --sweep` on an H200, hidden
# 7168, inner 2048, of those that spill no registers to speak of.
_TABLE = (
    (1, Tiles(Tile(16, 64, 4, 4), Tile(16, 64, 4, 4))),
    (3, Tiles(Tile(16, 64, 4, 4), Tile(16, 128, 4, 4))),
    (8, Tiles(Tile(16, 128, 4, 4), Tile(16, 128, 4, 4))),
    (24, Tiles(Tile(32, 128, 4, 3), Tile(32, 128, 4, 4))),
    (100, Tiles(Tile(128, 128, 8, 4, 8), Tile(128, 256, 8, 3, 8))),
    (400, Tiles(Tile(128, 128, 8, 4, 8), Tile(256, 128, 8, 3, 8))),
    (None, Tiles(Tile(128, 128, 8, 3, 8), Tile(256, 128, 8, 3, 8))),
)


def tiles_for(rows_per_expert: float) -> Tiles:
    """For an expected number of rows of each expert, which no host needs to know exactly."""
    for most, tiles in _TABLE:
        if most is None or rows_per_expert <= most:
            return tiles
    raise AssertionError("the last line has no limit")
