"""The geometry of an exchange, and the rules that it must keep.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size,
R runtime_max_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_a2a.errors import GeometryError
from moe_a2a.formats import FORMATS
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from moe_a2a.workspace import Workspace

__all__ = ["COMBINE_WIRES", "Spec"]

COMBINE_WIRES = ("bf16", "fp16", "fp32", "fp8_block128", "mxfp8")
_MAX_TOP_K = 32
_MAX_EXTRAS = 16
_MAX_EXPERTS = 1 << 20  # every rank keeps a table of their owners
_MAX_BYTES = 1 << 48  # of a region; the layout counts in 64 bits


def _count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GeometryError(f"{name}={shown(value)}: must be an integer >= {least}")
    if value > _MAX_BYTES:  # Python's integers have no end, what they are written to has
        raise GeometryError(f"{name}={shown(value)}: at most {_MAX_BYTES}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise GeometryError(f"{name}={shown(value)}: must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class Spec:
    """What every rank of an exchange must agree on. Immutable, hashable, picklable.

    Args:
        ep_size: W, number of ranks.
        num_experts: E, over all ranks; each rank owns a contiguous run of them. May be below W.
        top_k: K, choices per token; <= num_experts and <= 32.
        hidden_size: H; a multiple of 16 and of the blocks of both wires.
        max_tokens_per_rank: capacity; it sizes the workspace.
        wire: format of dispatched rows: bf16 fp16 fp8 fp8_block128 mxfp8 nvfp4 mxfp4.
        combine_wire: format of returned rows: bf16 fp16 fp32 fp8_block128 mxfp8.
        invalid_expert_id: what a choice that routes nowhere, and every padding row, arrives as;
            an int32, negative or >= num_experts.
        scrub: ``"ids"`` gives padding rows the invalid id and weight 0; ``"all"`` also zeroes
            their payload and scales.
        alignment: multiple of 32 that an mxfp8 row is padded to, in columns.
        allow_defer: size rows so that bf16 may travel in place of a quantized wire.
        extra: name -> bytes per token of further payloads that ride along (at most 16).
        num_eplb_experts: experts that a load balancer tracks; compared between ranks, moves no
            data by itself (statistics ride along as an ``extra``).

    Raises:
        GeometryError: names the argument, its value and the rule.
    """

    ep_size: int
    num_experts: int
    top_k: int
    hidden_size: int
    max_tokens_per_rank: int
    wire: str = "bf16"
    combine_wire: str = "bf16"
    invalid_expert_id: int = -1
    scrub: str = "ids"
    alignment: int = 32
    allow_defer: bool = False
    extra: Mapping[str, int] = field(default_factory=dict)
    num_eplb_experts: int = 0

    def __post_init__(self) -> None:
        for name in ("ep_size", "num_experts", "top_k", "hidden_size", "max_tokens_per_rank"):
            _count(name, getattr(self, name))
        _count("num_eplb_experts", self.num_eplb_experts, 0)
        _one_of("wire", self.wire, tuple(FORMATS))
        _one_of("combine_wire", self.combine_wire, COMBINE_WIRES)
        _one_of("scrub", self.scrub, ("ids", "all"))
        self._check_choices()
        self._check_hidden_size()
        self._check_extra()
        self._check_size()
        if not isinstance(self.allow_defer, bool):
            raise GeometryError(f"allow_defer={shown(self.allow_defer)}: must be True or False")

    def _check_choices(self) -> None:
        if self.top_k > min(self.num_experts, _MAX_TOP_K):
            raise GeometryError(
                f"top_k={self.top_k}: must be <= num_experts ({self.num_experts}) and "
                f"<= {_MAX_TOP_K}"
            )
        invalid = self.invalid_expert_id
        is_int = isinstance(invalid, int) and not isinstance(invalid, bool)
        if not is_int or 0 <= invalid < self.num_experts or not -(2**31) <= invalid < 2**31:
            raise GeometryError(
                f"invalid_expert_id={shown(invalid)}: must be an int32 outside "
                f"0..{self.num_experts - 1}, the ids of the experts"
            )

    def _check_hidden_size(self) -> None:
        _count("alignment", self.alignment)
        if self.alignment % 32:
            raise GeometryError(f"alignment={self.alignment}: must be a multiple of 32")
        blocks = {"every wire": 16, f"wire={self.wire!r}": FORMATS[self.wire].block}
        if self.combine_wire in FORMATS:
            blocks[f"combine_wire={self.combine_wire!r}"] = FORMATS[self.combine_wire].block
        for needed_by, block in blocks.items():
            if self.hidden_size % block:
                raise GeometryError(
                    f"hidden_size={self.hidden_size}: {needed_by} needs a multiple of {block}"
                )

    def _check_extra(self) -> None:
        if not isinstance(self.extra, Mapping):
            raise GeometryError(f"extra={shown(self.extra)}: must map names to bytes per token")
        if len(self.extra) > _MAX_EXTRAS:
            raise GeometryError(f"extra has {len(self.extra)} entries: at most {_MAX_EXTRAS}")
        for name, nbytes in self.extra.items():
            if not isinstance(name, str) or not name:
                raise GeometryError(f"extra[{shown(name)}]: names are non-empty strings")
            _count(f"extra[{shown(name)}]", nbytes)
        # A copy that nobody else holds, in an order that does not depend on how it was written.
        object.__setattr__(self, "extra", dict(sorted(self.extra.items())))

    def _check_size(self) -> None:
        if self.num_experts > _MAX_EXPERTS:
            raise GeometryError(f"num_experts={self.num_experts}: at most {_MAX_EXPERTS}")
        if self.max_tokens_per_rank >= 2**31:
            raise GeometryError(
                f"max_tokens_per_rank={self.max_tokens_per_rank}: counts are int32, so < 2**31"
            )
        row = 8 * self.hidden_size + self.payload_width + sum(self.extra.values())
        if self.ep_size * self.max_tokens_per_rank * row > _MAX_BYTES:
            raise GeometryError(
                f"ep_size={self.ep_size} x max_tokens_per_rank={self.max_tokens_per_rank} rows of "
                f"hidden_size={self.hidden_size} need more than {_MAX_BYTES:,} bytes"
            )

    def __hash__(self) -> int:
        own = (self.ep_size, self.num_experts, self.top_k, self.hidden_size, self.wire)
        return hash((own, self.max_tokens_per_rank, self.combine_wire, tuple(self.extra.items())))

    @property
    def quantized(self) -> bool:
        """Whether the wire has scales."""
        return FORMATS[self.wire].scale_dtype is not None

    @property
    def payload_width(self) -> int:
        """Elements of the wire's storage dtype per row."""
        return FORMATS[self.wire].payload_width(self.hidden_size, self.alignment)

    @property
    def scale_width(self) -> int:
        """Elements of the wire's scale dtype per row, 0 without scales."""
        return FORMATS[self.wire].scale_width(self.hidden_size, self.alignment)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """(payload bytes, scale bytes) of one token on the wire."""
        form = FORMATS[self.wire]
        scale_item = form.scale_dtype.itemsize if form.scale_dtype is not None else 0
        return self.payload_width * form.payload_dtype.itemsize, self.scale_width * scale_item

    @property
    def payload_capacity(self) -> int:
        """Bytes reserved per row: the wire's, or a deferred bf16 row's where that is larger."""
        payload = self.row_bytes[0]
        return max(payload, 2 * self.hidden_size) if self.allow_defer else payload

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of one row in the combine inbox; quantized rows carry their scales behind them."""
        if self.combine_wire == "fp32":
            return 4 * self.hidden_size
        form = FORMATS[self.combine_wire]
        if form.scale_dtype is None:
            return 2 * self.hidden_size
        scales = form.scale_width(self.hidden_size, 32) * form.scale_dtype.itemsize
        return -(-(self.hidden_size + scales) // 16) * 16

    def experts_of(self, rank: int) -> range:
        """Ids of the experts that ``rank`` owns."""
        base, more = divmod(self.num_experts, self.ep_size)
        first = rank * base + min(rank, more)
        return range(first, first + base + (rank < more))

    def workspace(self) -> Workspace:
        """Table of the regions of one rank's window; prints as one.

        Raises:
            BuildError: the layout is asked from a header that needs a C++ compiler once.
        """
        from moe_a2a.workspace import Workspace

        return Workspace.of(self)

    def workspace_bytes(self) -> int:
        """Exact bytes of one rank's window."""
        return self.workspace().nbytes
