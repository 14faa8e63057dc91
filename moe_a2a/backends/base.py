"""What a backend is: eight functions behind `AllToAll`, which has checked every argument by then.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_a2a.group import Group
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec
    from moe_a2a.timeline import Timeline

__all__ = [
    "REFUSED",
    "Backend",
    "DispatchCall",
    "Opening",
    "ReceiveViews",
    "Views",
    "ranks_in",
    "signed",
]

REFUSED = "moe_a2a binding:"  # how a ValueError begins by which a binding refuses its arguments


@dataclass(frozen=True)
class Opening:
    """What a backend opens with."""

    spec: Spec
    group: Group
    device: torch.device
    timeout: float
    timeline: Timeline | None  # to note in what operations take; with debug=True only
    max_blocks: int | None

    @property
    def debug(self) -> bool:
        return self.timeline is not None


class DispatchCall(NamedTuple):
    """One dispatch. Rows may be strided, their elements are contiguous.

    ``x`` is in the wire's storage dtype with ``scales``, or bf16/fp16/fp32 to be quantized, or what
    travels as it is (unquantized wires, deferred rows). ``active`` is a mask of ranks.
    """

    x: Tensor
    scales: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    counts: Tensor  # int32 [W], to be filled in
    rows: int  # R
    deferred: bool
    global_scale: Tensor | None
    active: int
    extra: Mapping[str, Tensor]


class Views(NamedTuple):
    """The receive regions of one round."""

    x: Tensor  # [W, R, row]
    scales: Tensor | None  # [W, R, n]
    topk_ids: Tensor  # int32 [W, R, K]
    topk_weights: Tensor  # float32 [W, R, K]
    extra: dict[str, Tensor]  # uint8 [W, R, n]


class Backend(Protocol):
    """One way to move rows. ``reset`` takes a mask of ranks; ``close`` never waits for a peer."""

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]

    @staticmethod
    def unusable(spec: Spec | None, group: Group | None) -> str | None:
        """Why not, in a sentence; None where it works. With None, None: on this machine at all."""

    @classmethod
    def open(cls, opening: Opening) -> Backend: ...

    def dispatch(self, call: DispatchCall) -> Views: ...

    def combine(self, y: Tensor, out: Tensor, grouped: Grouped | None = None) -> None:
        """``y`` [W, R, H]; with ``grouped`` [N, H], whose weighted sums are the rows instead."""

    def check(self) -> None:
        """Waits for the kernels of the current stream, and raises what they have recorded."""

    def collect_times(self) -> None:
        """Notes in the timeline what is not there yet. Waits for no peer."""

    def reset(self, ranks: int) -> None: ...

    def close(self) -> None: ...

    @property
    def receive_memory(self) -> tuple[int, int]:
        """First and past-the-end address of memory that peers write."""
        ...


class ReceiveViews:
    """Typed views of the receive regions that begin at ``base``; cached by (R, deferred)."""

    _MOST = 64  # entries kept: callers that vary R freely must not fill the memory with views

    def __init__(self, spec: Spec, base: Tensor) -> None:
        self._spec = spec
        self._base = base
        self._offset = {region.name: region.offset for region in spec.workspace()}
        self._cache: dict[tuple[int, bool], Views] = {}

    def of(self, rows: int, deferred: bool) -> Views:
        views = self._cache.get((rows, deferred))
        if views is None:
            if len(self._cache) >= self._MOST:
                self._cache.clear()
            with torch.inference_mode(False):  # they outlive the mode that the caller is in
                views = self._cache[rows, deferred] = self._make(rows, deferred)
        return views

    def poison(self) -> None:
        """NaN where a format has one, and ids that no expert has: who reads on, notices."""
        for region in self._spec.workspace():
            if region.name not in ("control", "combine", "dispatch_inbox"):
                memory = self._base[region.offset : region.offset + region.nbytes]
                memory.fill_(0x7F if region.name == "topk_ids" else 0xFF)

    def _make(self, rows: int, deferred: bool) -> Views:
        spec, form = self._spec, FORMATS[self._spec.wire]
        if deferred:
            x = self._view("payload", rows, spec.hidden_size, torch.bfloat16)
        else:
            x = self._view("payload", rows, spec.payload_width, form.payload_dtype)
        scales = None
        if form.scale_dtype is not None and not deferred:
            scales = self._view("scales", rows, spec.scale_width, form.scale_dtype)
        return Views(
            x,
            scales,
            self._view("topk_ids", rows, spec.top_k, torch.int32),
            self._view("topk_weights", rows, spec.top_k, torch.float32),
            {
                name: self._view(f"extra:{name}", rows, nbytes, torch.uint8)
                for name, nbytes in spec.extra.items()
            },
        )

    def _view(self, region: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        shape = (self._spec.ep_size, rows, width)
        first = self._offset[region]
        nbytes = self._spec.ep_size * rows * width * dtype.itemsize
        return self._base[first : first + nbytes].view(dtype).view(shape)


def ranks_in(mask: int) -> list[int]:
    """``0b1011`` -> ``[0, 1, 3]``."""
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]


def signed(mask: int) -> int:
    """The first 64 ranks of a mask as an int64 (only `collective` has more, and compares those)."""
    mask &= 2**64 - 1
    return mask - 2**64 if mask >> 63 else mask
