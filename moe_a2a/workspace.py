"""The regions of one rank's window. The offsets come from ``csrc/layout.h`` and nowhere else."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from moe_a2a._ops import cpu_library
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from moe_a2a.spec import Spec

__all__ = ["Region", "Workspace", "geometry_numbers", "shape_numbers"]

_WIRES = (*FORMATS, "fp32")  # order of csrc/args.h


class Region(NamedTuple):
    """A run of bytes in the window; ``extra`` payloads are named ``extra:NAME``."""

    name: str
    offset: int
    nbytes: int


class Workspace(tuple[Region, ...]):
    """All regions, in the order of their offsets."""

    __slots__ = ()

    @staticmethod
    def of(spec: Spec) -> Workspace:
        return _workspace(spec)

    @property
    def nbytes(self) -> int:
        return self[-1].offset + self[-1].nbytes

    @property
    def committed(self) -> int:
        """Bytes in front of the low-latency inbox: all that a CPU backend touches."""
        return self.region("dispatch_inbox").offset

    def region(self, name: str) -> Region:
        return next(region for region in self if region.name == name)

    def __str__(self) -> str:
        rows = [("region", "offset", "bytes")]
        rows += [(name, f"{offset:,}", f"{nbytes:,}") for name, offset, nbytes in self]
        rows.append(("total", "", f"{self.nbytes:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {offset:>{widths[1]}}  {nbytes:>{widths[2]}}"
            for name, offset, nbytes in rows
        )


def geometry_numbers(spec: Spec) -> list[int]:
    """The ``Geometry`` of layout.h, in the order that the binding takes it."""
    own = [spec.ep_size, spec.num_experts, spec.top_k, spec.max_tokens_per_rank]
    own += [spec.payload_capacity, spec.row_bytes[1], spec.combine_row_bytes]
    return own + list(spec.extra.values())


def shape_numbers(spec: Spec, debug: bool) -> list[int]:
    """The ``Shape`` of args.h, in the order that the binding takes it."""
    padded = spec.payload_width if spec.wire == "mxfp8" else spec.hidden_size
    wires = [_WIRES.index(spec.wire), _WIRES.index(spec.combine_wire)]
    own = [spec.hidden_size, padded, *wires, *spec.row_bytes]
    return [*own, spec.invalid_expert_id, int(spec.scrub == "all"), int(debug)]


@lru_cache(maxsize=64)
def _workspace(spec: Spec) -> Workspace:
    extras = iter(spec.extra)
    return Workspace(
        Region(f"extra:{next(extras)}" if name == "extra" else str(name), offset, nbytes)
        for name, offset, nbytes in cpu_library().workspace_regions(geometry_numbers(spec))
    )
