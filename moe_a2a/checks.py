"""Arguments of dispatch and combine against the rules of a `Spec`, before anything is sent.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size,
R runtime_max_tokens. The checks themselves are a few comparisons, since they stand in front of
every call; the sentences are put together only when one fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_a2a.errors import CapacityError, PayloadError, StateError
from moe_a2a.formats import FORMATS
from moe_a2a.grouped import check as check_grouped
from moe_a2a.grouped import result_dtype
from moe_a2a.wording import describe, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

    _Facts = tuple[object, ...]

__all__ = ["Rules"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)
# No layout: a tensor without strides has no address either, and raises a RuntimeError. The class,
# since those that only stand for a tensor (FakeTensor) may give 0 for an address.
_facts = attrgetter("dtype", "shape", "device", "requires_grad", "__class__")
_NO_TENSOR = (AttributeError, RuntimeError)


def _widths(accepted: Mapping[torch.dtype, int]) -> str:
    return " or ".join(f"{str(dtype)[6:]} [T, {width}]" for dtype, width in accepted.items())


class Rules:
    """The rules of one `AllToAll`.

    What a round's tensors are (dtype, shape, device, no gradient) is mostly what those of
    the round before were, and then passed: `inputs`, `expert_output` and `output` look at their
    rules one by one only where it is not. Strides and addresses are looked at in every call.

    Attributes:
        device: where tensors live.
        receive_memory: first and past-the-end address of what peers write; a reset may change it.
    """

    def __init__(self, spec: Spec, device: torch.device, receive_memory: tuple[int, int]) -> None:
        self.spec, self.device, self.receive_memory = spec, device, receive_memory
        self.capacity, self.has_extra = spec.max_tokens_per_rank, len(spec.extra) > 0
        self._seen_inputs: tuple[bool, int, _Facts, _Facts, _Facts] | None = None
        self._seen_y: tuple[int, _Facts, int] | None = None
        self._seen_out: tuple[int, _Facts, int] | None = None
        form, hidden = FORMATS[spec.wire], spec.hidden_size
        self._quantized = spec.quantized
        if spec.quantized:
            self._plain = dict.fromkeys(_FLOATS, hidden)
            self._scaled = {form.payload_dtype: spec.payload_width}
        else:
            self._plain, self._scaled = {form.payload_dtype: hidden}, {}
        self._deferred = {torch.bfloat16: hidden}
        combine = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        wire = spec.combine_wire
        self.combine_dtypes = (combine[wire],) if wire in combine else _FLOATS
        self._combine_shape = (spec.ep_size, hidden)

    def rows(self, value: object) -> int:
        """R: ``runtime_max_tokens``, or the capacity where it is None."""
        capacity = self.spec.max_tokens_per_rank
        if value is None:
            return capacity
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= capacity:
            raise CapacityError(
                f"runtime_max_tokens={shown(value)}: must be an integer in 0..{capacity} "
                "(max_tokens_per_rank), the same on every rank"
            )
        return value

    def active(self, value: object, current: int, rank: int) -> int:
        """Mask of active ranks; None keeps the current one."""
        if value is None:
            return current
        mask = self.mask(value)
        if mask & ~current:
            raise StateError(
                f"active_ranks={mask:#b} brings ranks back that were inactive ({current:#b} are "
                "active): a round can only leave ranks out; reset(active_ranks) takes them in again"
            )
        if not mask >> rank & 1:
            raise StateError(
                f"active_ranks={mask:#b} leaves this rank ({rank}) out: it makes no call"
            )
        return mask

    def mask(self, value: object) -> int:
        """bool [W] (tensor or sequence) -> mask."""
        size = self.spec.ep_size
        flags: Sequence[object] | None = None
        if isinstance(value, Tensor):
            if _dense(value) and value.dtype == torch.bool and value.shape == (size,):
                flags = value.tolist() if _readable(value) else None
        elif isinstance(value, (list, tuple)) and len(value) == size:
            flags = value
        if flags is None or not all(isinstance(flag, bool) for flag in flags):
            raise PayloadError(f"active_ranks is {describe(value)}: expected bool [{size}]")
        return sum(1 << rank for rank, flag in enumerate(flags) if flag)

    def inputs(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        scales: Tensor | None,
        rows: int,
        deferred: bool,
    ) -> None:
        """Rows, choices and scales of one dispatch."""
        seen = self._seen_inputs
        if seen is not None and scales is None:
            was_deferred, tokens, facts_x, facts_ids, facts_weights = seen
            first, end = self.receive_memory
            try:
                if (
                    was_deferred is deferred
                    and tokens <= rows
                    and _facts(x) == facts_x
                    and _facts(topk_ids) == facts_ids
                    and _facts(topk_weights) == facts_weights
                    and x.is_contiguous()
                    and topk_ids.is_contiguous()
                    and topk_weights.is_contiguous()
                    and not first <= x.data_ptr() < end
                    and not first <= topk_ids.data_ptr() < end
                    and not first <= topk_weights.data_ptr() < end
                ):
                    return
            except _NO_TENSOR:  # which one, and what it is instead, is found below
                pass
        self._rows_and_choices(x, topk_ids, topk_weights, scales, rows, deferred)
        if scales is None and not (x.requires_grad or topk_weights.requires_grad):
            self._seen_inputs = (
                deferred, x.shape[0], _facts(x), _facts(topk_ids), _facts(topk_weights)
            )  # fmt: skip

    def _rows_and_choices(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        scales: Tensor | None,
        rows: int,
        deferred: bool,
    ) -> None:
        accepted = self._deferred if deferred else self._plain if scales is None else self._scaled
        if not _dense(x) or x.dim() != 2 or accepted.get(x.dtype) != x.shape[1]:
            raise self._wrong_x(x, scales, deferred)
        tokens = x.shape[0]
        if tokens > rows:
            raise CapacityError(
                f"{tokens} tokens in x, more than runtime_max_tokens={rows} "
                f"(max_tokens_per_rank={self.spec.max_tokens_per_rank})"
            )
        self._placed("x", x)
        shape = (tokens, self.spec.top_k)
        self._shaped("topk_ids", topk_ids, _IDS, shape)
        self._shaped("topk_weights", topk_weights, (torch.float32,), shape)
        if scales is not None:
            if deferred:
                raise PayloadError("scales were given with defer=True: deferred rows have none")
            dtype = FORMATS[self.spec.wire].scale_dtype
            assert dtype is not None
            self._shaped("scales", scales, (dtype,), (tokens, self.spec.scale_width))

    def deferral(self, defer: object) -> bool:
        """Whether bf16 travels in place of the wire."""
        if not isinstance(defer, bool):
            raise PayloadError(f"defer is {describe(defer)}: expected True or False")
        if not self._quantized:
            return False
        if not self.spec.allow_defer:
            raise PayloadError(
                f"defer=True on wire {self.spec.wire!r}: rows of bf16 do not fit a workspace that "
                "was sized for the wire; open with Spec(..., allow_defer=True)"
            )
        return True

    def global_scale(self, value: Tensor) -> None:
        if self.spec.wire != "nvfp4":
            raise PayloadError(f"global_scale goes with wire 'nvfp4', not {self.spec.wire!r}")
        if not _dense(value) or value.dtype != torch.float32 or value.numel() != 1:
            raise PayloadError(f"global_scale is {describe(value)}: expected a float32 scalar")
        if value.device != self.device:
            raise PayloadError(f"global_scale is on {value.device}: expected {self.device}")
        self._apart("global_scale", value)
        if value.device.type == "cpu" and not 0 < value.item() < float("inf"):
            raise PayloadError(f"global_scale is {value.item()}: expected a positive number")

    def extra(self, given: Mapping[str, Tensor] | None, tokens: int) -> Mapping[str, Tensor]:
        given = {} if given is None else given
        if not isinstance(given, Mapping) or set(given) != set(self.spec.extra):
            names = list(given) if isinstance(given, Mapping) else given
            raise PayloadError(
                f"extra has {shown(names)}: the Spec has {sorted(self.spec.extra)}; each must "
                "come with every dispatch"
            )
        for name, nbytes in self.spec.extra.items():
            self._shaped(f"extra[{name!r}]", given[name], (torch.uint8,), (tokens, nbytes))
        return given

    def expert_output(self, y: Tensor, rows: int) -> None:
        """``y`` of a combine."""
        seen = self._seen_y
        if seen is not None:
            first, end = self.receive_memory
            try:
                if (
                    seen[0] == rows
                    and _facts(y) == seen[1]
                    and y.is_contiguous()
                    and not first <= y.data_ptr() < end
                ):
                    return
            except _NO_TENSOR:
                pass
        size, hidden = self._combine_shape
        fits = _dense(y) and y.shape == (size, rows, hidden)
        if not fits or y.dtype not in self.combine_dtypes:
            dtypes = " or ".join(str(dtype)[6:] for dtype in self.combine_dtypes)
            raise PayloadError(
                f"y is {describe(y)}: expected {dtypes} [W={size}, R={rows}, H={hidden}] "
                f"(combine wire {self.spec.combine_wire!r})"
            )
        self._placed("y", y)
        self._seen_y = None if y.requires_grad else (rows, _facts(y), y.nbytes)

    def output(self, out: Tensor, tokens: int, y: Tensor) -> None:
        """``out`` of a combine whose ``y`` has passed."""
        seen, seen_y = self._seen_out, self._seen_y
        if seen is not None and seen_y is not None:
            first, end = self.receive_memory
            try:
                if (
                    seen[0] == tokens
                    and _facts(out) == seen[1]
                    and out.dtype is y.dtype
                    and out.is_contiguous()
                    and y.is_contiguous()
                ):
                    at, at_y = out.data_ptr(), y.data_ptr()
                    apart = at + seen[2] <= at_y or at_y + seen_y[2] <= at
                    if apart and not first <= at < end:
                        return
            except _NO_TENSOR:
                pass
        self._fresh(out, tokens, y.dtype, {"y": y})
        if not out.requires_grad:
            self._seen_out = (tokens, _facts(out), out.nbytes)

    def grouped_output(
        self, rows: Tensor, grouped: Grouped, most: int, round: object
    ) -> torch.dtype:
        """``rows`` and ``grouped`` of a combine_grouped with R = ``most``; the dtype of ``out``."""
        size, hidden = self._combine_shape
        check_grouped(grouped, size * most, self.spec.top_k, self.device, round)
        for name in ("positions", "row_weights"):
            self._apart(f"grouped.{name}", getattr(grouped, name))
        self._shaped("rows", rows, _FLOATS, (grouped.row_weights.shape[0], hidden))
        return result_dtype(self.spec, rows)

    def grouped_sums(
        self, out: Tensor, tokens: int, dtype: torch.dtype, rows: Tensor, grouped: Grouped
    ) -> None:
        """``out`` of a combine_grouped whose other arguments have passed."""
        read = {"grouped.positions": grouped.positions, "grouped.row_weights": grouped.row_weights}
        self._fresh(out, tokens, dtype, {"rows": rows, **read})

    def layer_output(self, out: Tensor, tokens: int, buffers: Iterable[Tensor]) -> None:
        """``out`` of a whole layer, before its dispatch; ``buffers``: what its experts write."""
        self._shaped("out", out, self.combine_dtypes[:1], (tokens, self.spec.hidden_size))
        self._fresh(out, tokens, out.dtype, {})
        self.beside_experts("out", out, buffers)

    def beside_experts(self, name: str, value: Tensor, buffers: Iterable[Tensor]) -> None:
        """Neither in the receive views nor in ``buffers``."""
        self._apart(name, value)
        if any(_overlap(value, buffer) for buffer in buffers):
            raise PayloadError(
                f"{name} lies in memory that combine_buffer() handed out, which the experts write"
            )

    def _fresh(
        self, out: Tensor, tokens: int, dtype: torch.dtype, read: Mapping[str, Tensor]
    ) -> None:
        self._shaped("out", out, (dtype,), (tokens, self.spec.hidden_size))
        if tokens > 1 and out.stride(0) < self.spec.hidden_size:
            raise PayloadError(f"out is {describe(out)}: its rows overlap")
        for name, tensor in read.items():
            if _overlap(out, tensor):
                raise PayloadError(
                    f"out shares memory with {name}, which is read while out is written"
                )

    def _shaped(
        self, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
    ) -> None:
        if not _dense(value) or value.dtype not in dtypes or value.shape != shape:
            wanted = " or ".join(str(dtype)[6:] for dtype in dtypes)
            raise PayloadError(f"{name} is {describe(value)}: expected {wanted} {list(shape)}")
        self._placed(name, value)

    def _placed(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise PayloadError(f"{name} is {describe(value)}: expected it on {self.device}")
        if value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel():
            raise PayloadError(
                f"{name} is {describe(value)}: its last dimension must be contiguous (rows may be "
                f"strided); pass {name}.contiguous()"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise PayloadError(
                f"{name} requires grad, and no gradient flows through the exchange: call it under "
                f"torch.no_grad(), or pass {name}.detach()"
            )

        self._apart(name, value)

    def _apart(self, name: str, value: Tensor) -> None:
        if not _readable(value):
            raise PayloadError(f"{name} is {describe(value)}: expected a tensor with memory")
        if value.is_neg():
            raise PayloadError(
                f"{name} is a view whose sign is yet to be flipped (of a conjugate): expected its "
                f"memory to hold its values; pass {name}.resolve_neg()"
            )
        first, end = self.receive_memory
        if first <= value.data_ptr() < end:
            raise PayloadError(
                f"{name} lies in the receive views, which peers may write while it is in use; pass "
                "a copy (combine_buffer() is memory for the experts' output)"
            )

    def _wrong_x(self, x: object, scales: Tensor | None, deferred: bool) -> PayloadError:
        wire = f"wire {self.spec.wire!r}"
        if scales is not None and not self._scaled:
            return PayloadError(f"scales were given: {wire} has none")
        if deferred:
            return PayloadError(f"x is {describe(x)}: expected {_widths(self._deferred)} to defer")
        if scales is not None:
            expected = f"{_widths(self._scaled)}, the storage of {wire}, since scales were given"
        elif self._quantized:
            scaled = _widths(self._scaled)
            expected = f"{_widths(self._plain)} to be quantized to {wire}, or {scaled} with scales="
        else:
            expected = f"{_widths(self._plain)} ({wire})"
        return PayloadError(f"x is {describe(x)}: expected {expected}")


def _dense(value: object) -> bool:
    """A tensor with a shape and strides. Nested ones raise when they are asked for theirs."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided


def _readable(value: Tensor) -> bool:
    """Whether there are numbers behind it: not so in meta, fake and functorch tensors."""
    try:
        if value.numel() == 0:
            return value.untyped_storage().device == value.device
        return value.data_ptr() != 0
    except RuntimeError:
        return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    return _span(a)[0] < _span(b)[1] and _span(b)[0] < _span(a)[1]


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    first = t.data_ptr()
    return first, first + (last + 1) * t.element_size() if t.numel() else first
