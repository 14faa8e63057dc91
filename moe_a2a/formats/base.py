"""What a wire format is: how wide a row is, and how rows get there and back.

H hidden_size, P payload elements per row, S scales per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["WireFormat"]


@dataclass(frozen=True)
class WireFormat(ABC):
    """One wire format.

    The methods take arguments that the public `quantize` and `dequantize` have checked, and leave
    alone those that their format has no use for. All of them run on the tensors' own device
    without a host synchronization.

    Attributes:
        name: the wire's name in `Spec` and in the table.
        block: H must be a multiple of it.
        payload_dtype: storage dtype of the payload.
        scale_dtype: storage dtype of the scales, None where there are none.
        columns_per_element: columns in one payload element.
        pads_columns: the row is padded to `alignment`, so that H may end inside a block.
        rules: the shared-exponent rules that the format knows, its default first.
        takes_global_scale: `global_scale` means something here.
        takes_ue8m0: `ue8m0` means something here.
    """

    name: str
    block: int
    payload_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    columns_per_element: int = 1
    pads_columns: bool = False
    rules: tuple[str, ...] = ("ceil",)
    takes_global_scale: bool = False
    takes_ue8m0: bool = False

    def payload_width(self, hidden_size: int, alignment: int) -> int:
        """Payload elements of a row of `hidden_size` columns."""
        return hidden_size // self.columns_per_element

    @abstractmethod
    def scale_width(self, hidden_size: int, alignment: int) -> int:
        """Scales of a row of `hidden_size` columns; 0 without scales."""

    def row_bytes(self, hidden_size: int, alignment: int) -> tuple[int, int]:
        """(payload bytes, scale bytes) of a row of `hidden_size` columns."""
        payload = self.payload_width(hidden_size, alignment) * self.payload_dtype.itemsize
        if self.scale_dtype is None:
            return payload, 0
        return payload, self.scale_width(hidden_size, alignment) * self.scale_dtype.itemsize

    @abstractmethod
    def quantize(
        self,
        x: torch.Tensor,
        *,
        global_scale: torch.Tensor | None,
        alignment: int,
        rule: str,
        ue8m0: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Contiguous rows `[..., H]` -> payload `[..., P]` and scales `[..., S]` or None."""

    @abstractmethod
    def dequantize(
        self,
        payload: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        hidden_size: int,
        global_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """Payload `[..., P]` with its scales `[..., S]` -> fp32 `[..., hidden_size]`."""
