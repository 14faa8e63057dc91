"""The front door of ``torch.compile``: dispatch and combine as registered operators.

While Dynamo traces, `AllToAll` calls the functions here instead of its own methods. They leave one
operator in the graph, which finds the open object by its handle when the graph runs and calls the
method that eager code calls: phases, checks and errors are the same.

What the operator delivers are copies of the receive views, in memory that the graph allocates. The
views themselves can't be values of a graph. Peers write them again after combine, and nothing in a
functional graph can say so: a read that stands before combine in the program may be moved behind
it (Inductor's ``reorder_for_locality`` does that to any pure operation whose only user comes
later), the memory of a dead value is reused for the next one, and a view declared as mutated is
written back after the fact wherever the compiler worked on a clone (``aot_eager`` always does),
over rows of the next round.

Shape letters: T tokens of this rank, K top_k, H hidden_size, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch

from moe_a2a import registry
from moe_a2a.errors import PayloadError, StateError
from moe_a2a.formats import FORMATS
from moe_a2a.grouped import Choices, Grouped, blank, listed, result_dtype
from moe_a2a.received import Received

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from moe_a2a.alltoall import AllToAll
    from moe_a2a.spec import Spec

__all__ = ["combine", "combine_buffer", "combine_grouped", "dispatch", "order_of", "register"]

_DISPATCH = """dispatch(
    SymInt handle, Tensor(a!) order, Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? scales,
    Tensor? global_scale, SymInt? rows, str[] extra_names, Tensor[] extra, Tensor? active_tensor,
    bool[]? active_flags, bool defer, str recording, Tensor(b!) counts, Tensor(c!)[] received
) -> ()"""
_COMBINE = """combine(
    SymInt handle, Tensor(a!) order, Tensor y, str recording, Tensor(b!) out
) -> ()"""
_COMBINE_GROUPED = """combine_grouped(
    SymInt handle, Tensor(a!) order, Tensor rows, Tensor[] grouped, str recording, Tensor(b!) out
) -> ()"""
# A function of its arguments alone: a compiler may move it, within the copies of its round.
_GROUP = """group(
    Tensor topk_ids, Tensor topk_weights, Tensor counts, SymInt first, SymInt experts, SymInt align
) -> (Tensor, Tensor, Tensor, Tensor)"""


_lock = Lock()  # ranks may be threads of one process
_libraries: list[Any] = []  # the operators go when their library does
_orders: dict[torch.device, Tensor] = {}


def order_of(device: torch.device) -> Tensor:
    """What every operator on ``device`` claims to write, so that they run in the program's order.

    One for all objects: ranks that ran rounds of two objects in different orders would wait for
    each other. Nothing reads or writes its one byte.
    """
    with _lock, torch.inference_mode(False):  # it outlives the mode that the caller is in
        if device not in _orders:
            order = torch.zeros(1, dtype=torch.uint8, device=device)
            # What torch._dynamo.mark_static_address() does, without importing Dynamo: a mutated
            # input at no fixed address would keep a graph out of CUDA graphs.
            order._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
            _orders[device] = order
        return _orders[device]


def register() -> None:
    """Registers all operators; once is enough."""
    with _lock:
        if _libraries:
            return
        library: Any = torch.library.Library("moe_a2a", "DEF")  # type: ignore[no-untyped-call]
        operators = (
            (_DISPATCH, _run_dispatch, _nothing),
            (_COMBINE, _run_combine, _nothing),
            (_COMBINE_GROUPED, _run_combine_grouped, _nothing),
            (_GROUP, _run_group, _blank_group),
        )
        for schema, body, fake in operators:
            name = library.define(schema.replace("\n", " "), tags=torch.Tag.pt2_compliant_tag)
            library.impl(name, body, "CompositeExplicitAutograd")
            library._register_fake(name, fake)
        _libraries.append(library)


def _nothing(*arguments: object) -> None:
    """Fake kernel of those that return nothing: what they fill is there already."""


def _blank_group(
    ids: Tensor, weights: Tensor, counts: Tensor, first: int, experts: int, align: int
) -> tuple[Tensor, ...]:
    return blank(Choices(ids, weights, counts, first, experts), align)


# ---- what Dynamo traces ----------------------------------------------------------------------


def dispatch(
    a2a: AllToAll,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scales: Tensor | None,
    global_scale: Tensor | None,
    runtime_max_tokens: int | None,
    extra: Mapping[str, Tensor] | None,
    active_ranks: Tensor | Sequence[bool] | None,
    defer: bool,
) -> Received:
    """`AllToAll.dispatch` in a graph."""
    spec, device = a2a.spec, a2a.device
    rows = spec.max_tokens_per_rank if runtime_max_tokens is None else runtime_max_tokens
    deferred = defer and spec.quantized
    counts = torch.empty(spec.ep_size, dtype=torch.int32, device=device)
    # The operator refuses an R below 0; an allocation must not fail before it does.
    widths = _widths(spec, deferred)
    kept = rows
    if rows <= 0:  # a branch, so that no size in the graph is a max()
        kept = 0
    # Flat: with several dimensions Inductor may take the strides of an empty tensor, or symbolic
    # ones, for others than its own, and have the operator fill copies.
    flat = [
        torch.empty(spec.ep_size * kept * width, dtype=dtype, device=device)
        for width, dtype in widths
    ]
    names = [] if extra is None else list(extra)
    values = [] if extra is None else list(extra.values())
    is_tensor = isinstance(active_ranks, torch.Tensor)
    torch.ops.moe_a2a.dispatch(
        a2a.handle,
        a2a.order,
        x.detach(),
        topk_ids,
        topk_weights.detach(),
        _detached(scales),
        _detached(global_scale),
        runtime_max_tokens,
        names,
        values,
        active_ranks if is_tensor else None,
        None if is_tensor or active_ranks is None else list(active_ranks),
        defer,
        _recording(x=x, topk_weights=topk_weights, scales=scales),
        counts,
        flat,
    )
    a2a.round = (x.shape[0], rows)  # for a combine traced after this one
    shaped = [
        memory.view(spec.ep_size, kept, width)
        for memory, (width, _) in zip(flat, widths, strict=True)
    ]
    return _received(a2a, shaped, counts, global_scale, deferred)


def _received(
    a2a: AllToAll,
    shaped: list[Tensor],
    counts: Tensor,
    global_scale: Tensor | None,
    deferred: bool,
) -> Received:
    spec, rest = a2a.spec, shaped[3:]
    return Received(
        x=shaped[0],
        scales=rest.pop(0) if spec.quantized and not deferred else None,
        topk_ids=shaped[1],
        topk_weights=shaped[2],
        counts=counts,
        extra=dict(zip(spec.extra, rest, strict=True)),
        global_scale=global_scale,
        spec=spec,
        ep_rank=a2a.ep_rank,
        deferred=deferred,
    )


def combine(a2a: AllToAll, y: Tensor, out: Tensor | None) -> Tensor:
    """`AllToAll.combine` in a graph."""
    if out is None:
        out = torch.empty(a2a.round[0], a2a.spec.hidden_size, dtype=y.dtype, device=a2a.device)
    recording = _recording(y=y, out=out)
    torch.ops.moe_a2a.combine(a2a.handle, a2a.order, y.detach(), recording, out)
    return out


def combine_grouped(a2a: AllToAll, rows: Tensor, grouped: Grouped, out: Tensor | None) -> Tensor:
    """`AllToAll.combine_grouped` in a graph."""
    if out is None:
        dtype = result_dtype(a2a.spec, rows)
        out = torch.empty(a2a.round[0], a2a.spec.hidden_size, dtype=dtype, device=a2a.device)
    parts = [grouped.row_index, grouped.expert_offsets, grouped.row_weights, grouped.positions]
    recording = _recording(rows=rows, out=out)
    torch.ops.moe_a2a.combine_grouped(a2a.handle, a2a.order, rows.detach(), parts, recording, out)
    return out


def combine_buffer(a2a: AllToAll, dtype: torch.dtype) -> Tensor:
    """`AllToAll.combine_buffer` in a graph, whose memory is the compiler's business."""
    spec = a2a.spec
    return torch.empty(spec.ep_size, a2a.round[1], spec.hidden_size, dtype=dtype, device=a2a.device)


def _widths(spec: Spec, deferred: bool) -> list[tuple[int, torch.dtype]]:
    """Of x, topk_ids, topk_weights, scales where there are any, extras."""
    form = FORMATS[spec.wire]
    row = (spec.payload_width, form.payload_dtype)
    if deferred:
        row = (spec.hidden_size, torch.bfloat16)
    widths = [row, (spec.top_k, torch.int32), (spec.top_k, torch.float32)]
    if form.scale_dtype is not None and not deferred:
        widths.append((spec.scale_width, form.scale_dtype))
    return widths + [(nbytes, torch.uint8) for nbytes in spec.extra.values()]


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _recording(**tensors: Tensor | None) -> str:
    """Name of the first that a gradient would be wanted for; inside the operator nobody knows."""
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                return name
    return ""


# ---- what the graph runs ---------------------------------------------------------------------


def _found(handle: int) -> AllToAll:
    a2a = registry.find(handle)
    if a2a is None:
        raise StateError("the AllToAll of this compiled graph is gone")
    return cast("AllToAll", a2a)


def _run_dispatch(
    handle: int,
    order: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    scales: Tensor | None,
    global_scale: Tensor | None,
    rows: int | None,
    extra_names: list[str],
    extra: list[Tensor],
    active_tensor: Tensor | None,
    active_flags: list[bool] | None,
    defer: bool,
    recording: str,
    counts: Tensor,
    received: list[Tensor],
) -> None:
    a2a = _found(handle)
    _refuse_gradient(recording)
    there = a2a.dispatch(
        x,
        topk_ids,
        topk_weights,
        scales=scales,
        global_scale=global_scale,
        runtime_max_tokens=rows,
        extra=dict(zip(extra_names, extra, strict=True)) if extra_names else None,
        active_ranks=active_flags if active_tensor is None else active_tensor,
        defer=defer,
    )
    a2a.forget_counts()  # what the graph hands out are copies
    counts.copy_(there.counts)
    views = [there.x, there.topk_ids, there.topk_weights]
    views += [] if there.scales is None else [there.scales]
    views += there.extra.values()
    shaped = [memory.view(view.shape) for memory, view in zip(received, views, strict=True)]
    _copy(views, shaped, there)


def _copy(views: list[Tensor], received: list[Tensor], there: Received) -> None:
    """Views into ``received``, ids and weights of padding rows included."""
    if there.x.device.type != "cpu" or there.spec.scrub == "all":
        for view, target in zip(views, received, strict=True):
            target.copy_(view)
        return
    # The host knows the counts: most of the memory may be padding, which is anything.
    for index, (view, target) in enumerate(zip(views, received, strict=True)):
        if index in (1, 2):
            target.copy_(view)
            continue
        for source, rows in enumerate(there.counts.tolist()):
            target[source, :rows] = view[source, :rows]


def _run_combine(handle: int, order: Tensor, y: Tensor, recording: str, out: Tensor) -> None:
    a2a = _found(handle)
    _refuse_gradient(recording)
    a2a.combine(y, out=out)


def _run_combine_grouped(
    handle: int, order: Tensor, rows: Tensor, grouped: list[Tensor], recording: str, out: Tensor
) -> None:
    a2a = _found(handle)
    _refuse_gradient(recording)
    a2a.combine_grouped(rows, Grouped(*grouped), out=out)


def _run_group(
    ids: Tensor, weights: Tensor, counts: Tensor, first: int, experts: int, align: int
) -> tuple[Tensor, ...]:
    return listed(Choices(ids, weights, counts, first, experts), align)


def _refuse_gradient(recording: str) -> None:
    if recording:
        raise PayloadError(
            f"{recording} requires grad, and no gradient flows through the exchange: call it under "
            f"torch.no_grad(), or pass {recording}.detach()"
        )
