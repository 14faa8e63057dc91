"""`AllToAll`: dispatch tokens to the ranks that own their experts, combine what the experts made.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size,
R runtime_max_tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_dynamo_compiling

from moe_a2a import backends, compiled, opening, registry
from moe_a2a.backends.base import DispatchCall, Opening
from moe_a2a.checks import Rules
from moe_a2a.errors import MoeA2AError, PayloadError
from moe_a2a.group import Group
from moe_a2a.lifecycle import Lifecycle
from moe_a2a.outputs import Outputs
from moe_a2a.received import delivered
from moe_a2a.timeline import Timeline, trace_directory
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch.distributed as dist
    from torch import Tensor

    from moe_a2a.grouped import Grouped
    from moe_a2a.received import Received
    from moe_a2a.spec import Spec

__all__ = ["AllToAll"]

_NOTHING: Mapping[str, Tensor] = {}
_new_tuple = tuple.__new__  # a third of what a NamedTuple's own constructor costs


class AllToAll(Lifecycle):
    """One expert-parallel exchange of one group. Collective: every rank of the group constructs it.

    Rounds are ``dispatch`` then ``combine`` (or ``combine_grouped``), in the same order on every
    rank. A call refused with a typed error before anything was sent leaves the object as it was.
    After a `PeerTimeout` every call raises it again until `reset`.

    Args:
        spec: the geometry, equal on every rank.
        group: a torch.distributed group of ``spec.ep_size`` ranks; None is the default group, or,
            where torch.distributed is not initialized, one rank by itself.
        backend: a name from `moe_a2a.backends`, or ``"auto"``: the first usable on every rank.
        device: where tensors live. None is the current CUDA device with a CUDA backend, and with
            ``"auto"`` where the group has NCCL; else the CPU.
        timeout: seconds that a wait for a peer may take; beats ``MOE_A2A_TIMEOUT``, default 30.
        max_blocks: most blocks of a CUDA kernel; the CPU backends have none.
        debug: compare more between ranks at each call, poison what is not to be read any more, and
            note what operations take (`wait_times`, `save_trace`). Also ``MOE_A2A_TRACE=1``, which
            writes a trace on `close`. Slower; on every rank or on none.

    Raises:
        GeometryError: a wrong argument, or ranks that do not agree.
        BackendUnavailable: ``reasons`` says why, per backend.
        WorkspaceError: the window does not fit into memory.
        PeerTimeout: ranks that did not come.
    """

    def __init__(
        self,
        spec: Spec,
        group: dist.ProcessGroup | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        timeout: float | None = None,
        max_blocks: int | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__()
        limit, traces = 30.0, None
        problem: MoeA2AError | None = None
        try:
            limit = opening.seconds(timeout)
            opening.check_arguments(spec, backend, max_blocks, debug)
            self.device = opening.place(device, backend, group)
            traces = trace_directory()
            spec.workspace()  # compiles the library, where a compiler is missing on one rank only
        except MoeA2AError as error:
            problem = error
        ranks = Group(group, limit)
        self.ep_rank, self.spec = ranks.rank, spec
        # What one rank alone can see is told to all, so that nobody waits for a rank that gave up.
        ranks.agree(problem)
        debug = debug or traces is not None
        ranks.introduce({"spec": dataclasses.asdict(spec), "backend": backend, "debug": debug})
        opening.compare(ranks, spec)
        chosen = backends.choose(backend, self.device.type, spec, ranks)
        self.backend = chosen.name
        self._timeline = Timeline(ranks.rank, spec.ep_size, traces) if debug else None
        how = Opening(spec, ranks, self.device, limit, self._timeline, max_blocks)
        self._impl = chosen.open(how)
        self._rules = Rules(spec, self.device, self._impl.receive_memory)
        self._blocked = False
        self._everyone = self._active = (1 << spec.ep_size) - 1
        self.round = (0, 0)  # T and R of the round under way
        self._counts = torch.empty(spec.ep_size, dtype=torch.int32, device=self.device)
        self._counted: Tensor | None = None  # of the round under way, if that is known
        self._outputs = Outputs(spec.hidden_size, self.device)
        own = spec.experts_of(self.ep_rank)
        self.first_expert, self.num_local_experts = own.start, len(own)
        # For compiled graphs.
        compiled.register()
        self.handle, self.order = registry.enroll(self), compiled.order_of(self.device)

    @property
    def round_tokens(self) -> int:
        """T of the round under way (of the last one when idle)."""
        return self.round[0]

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        scales: Tensor | None = None,
        global_scale: Tensor | None = None,
        runtime_max_tokens: int | None = None,
        extra: Mapping[str, Tensor] | None = None,
        active_ranks: Tensor | Sequence[bool] | None = None,
        defer: bool = False,
    ) -> Received:
        """Sends each token once to every distinct rank that owns one of its experts.

        Args:
            x: [T, H] bf16/fp16/fp32, quantized on the way if the wire says so; or rows in the
                wire's storage dtype together with ``scales``. Rows may be strided.
            topk_ids: int32 or int64 [T, K]; -1 and every id outside [0, E) routes nowhere.
            topk_weights: float32 [T, K].
            scales: [T, n] of rows that the caller has quantized.
            global_scale: float32 scalar, the encode scale of nvfp4; default 1.
            runtime_max_tokens: R, this round's largest T over the ranks, the same number on each;
                default ``max_tokens_per_rank``.
            extra: name -> uint8 [T, n], one for each name in ``spec.extra``.
            active_ranks: bool [W], the same on every active rank. Nobody waits for the others, and
                choices of their experts arrive as the invalid id. Default: as in the round before.
            defer: bf16 travels instead of the wire (needs ``Spec(allow_defer=True)``).

        Raises:
            PayloadError: dtype, shape, strides, device or memory of an argument.
            CapacityError: T > R, or R outside 0..max_tokens_per_rank.
            StateError: not idle, or the ranks made different calls.
            PeerTimeout: ranks that did not arrive.
        """
        if is_dynamo_compiling():
            return compiled.dispatch(
                self, x, topk_ids, topk_weights, scales, global_scale, runtime_max_tokens, extra,
                active_ranks, defer,
            )  # fmt: skip
        if self._blocked or self._dispatched:
            raise self._refusal("dispatch", dispatched=False)
        rules, impl = self._rules, self._impl
        rows = rules.capacity if runtime_max_tokens is None else rules.rows(runtime_max_tokens)
        deferred = defer is not False and rules.deferral(defer)
        rules.inputs(x, topk_ids, topk_weights, scales, rows, deferred)
        tokens = x.shape[0]
        if global_scale is not None:
            rules.global_scale(global_scale)
        if extra is not None or rules.has_extra:
            extra = rules.extra(extra, tokens)
        active = self._active
        if active_ranks is not None:
            active = rules.active(active_ranks, active, self.ep_rank)
        counts = torch.empty_like(self._counts)
        call = _new_tuple(
            DispatchCall,
            (
                x, scales, topk_ids, topk_weights, counts, rows, deferred, global_scale, active,
                extra or _NOTHING,
            ),
        )  # fmt: skip
        try:
            views = impl.dispatch(call)  # type: ignore[union-attr]
        except BaseException as error:
            raise self._failed("dispatch", error) from None
        self._active = active
        self._dispatched = True
        self.round = (tokens, rows)
        self._counted = counts
        return delivered(views, counts, global_scale, self.spec, self.ep_rank, deferred)

    def combine(self, y: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns every row to the rank it came from and sums there, in fp32 and in rank order.

        Unweighted: the experts have applied the router weights. A token that went nowhere gives 0.

        Args:
            y: [W, R, H] in the combine wire's dtype (bf16, fp16 or fp32 where that is quantized),
                anywhere but in the receive views; rows at or past ``counts`` are never read.
            out: [T, H] of y's dtype; default a new tensor.

        Returns:
            ``out``, rounded once from fp32.

        Raises:
            PayloadError, StateError, PeerTimeout: as `dispatch`.
        """
        if is_dynamo_compiling():
            return compiled.combine(self, y, out)
        self.need_dispatched("combine")
        tokens, rows = self.round
        self._rules.expert_output(y, rows)
        if out is None:
            out = self._outputs.take(tokens, y.dtype)
        else:
            self._rules.output(out, tokens, y)
        return self._sum_back(y, out, None)

    def combine_grouped(
        self, rows: Tensor, grouped: Grouped, *, out: Tensor | None = None
    ) -> Tensor:
        """`combine` of what experts made of rows that ``recv.group()`` listed, in that order.

        On its way back each received row becomes the fp32 sum, from +0.0 and by ascending place,
        of ``row_weights[place] * rows[place]`` over the places of its choices, product and add
        unfused. It is rounded once to the combine wire's dtype, or quantized as it is. The bits
        are those of `combine` on such sums, in fp32 where the combine wire is quantized.

        Args:
            rows: [N, H] bf16, fp16 or fp32, where N counts the places. Gaps are never read.
            grouped: of this round's dispatch. A choice whose place is past the list (see
                `Grouped`) makes its row NaN.
            out: [T, H] in the combine wire's dtype, or in that of ``rows`` where it is quantized;
                default a new tensor.

        Returns:
            ``out``, rounded once from fp32.

        Raises:
            PayloadError, StateError, PeerTimeout: as `dispatch`.
        """
        if is_dynamo_compiling():
            return compiled.combine_grouped(self, rows, grouped, out)
        self.need_dispatched("combine_grouped")
        tokens, most = self.round
        dtype = self._rules.grouped_output(rows, grouped, most, self._counted)
        if out is None:
            out = self._outputs.take(tokens, dtype)
        else:
            self._rules.grouped_sums(out, tokens, dtype, rows, grouped)
        return self._sum_back(rows, out, grouped)

    def _sum_back(self, y: Tensor, out: Tensor, grouped: Grouped | None) -> Tensor:
        try:
            self._impl.combine(y, out, grouped)  # type: ignore[union-attr]
        except BaseException as error:
            raise self._failed("combine", error) from None
        self._dispatched = False
        return out

    def forget_counts(self) -> None:
        """`combine_grouped` can't tell this round's lists from another's by their counts."""
        self._counted = None

    def check_layer(self, tokens: int, out: Tensor | None, shared: Tensor | None) -> None:
        """Raises `PayloadError` for memory of a layer [T, H] that its experts or peers write, and
        for an ``out`` that combine would refuse; before dispatch, when peers wait for nothing."""
        if out is not None:
            self._rules.layer_output(out, tokens, self._buffers.values())
        if shared is not None:
            self._rules.beside_experts("shared", shared, self._buffers.values())

    def combine_buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """[W, R, H] of this round for the experts to write, kept from round to round.

        ``dtype`` defaults to the combine wire's (bf16 where that is quantized).

        Raises:
            StateError: no dispatch is open.
            PayloadError: a dtype that the combine wire does not take.
        """
        compiling = is_dynamo_compiling()
        if not compiling:
            self.need_dispatched("combine_buffer")
        accepted = self._rules.combine_dtypes
        if dtype is None:
            dtype = accepted[0]
        if not isinstance(dtype, torch.dtype) or dtype not in accepted:
            raise PayloadError(
                f"combine_buffer({shown(dtype)}): combine wire {self.spec.combine_wire!r} takes "
                f"{' or '.join(map(str, accepted))}"
            )
        if compiling:
            return compiled.combine_buffer(self, dtype)
        spec = self.spec
        if dtype not in self._buffers:
            most = spec.ep_size * spec.max_tokens_per_rank * spec.hidden_size
            with torch.inference_mode(False):  # it outlives the mode that the caller is in
                self._buffers[dtype] = torch.empty(most, dtype=dtype, device=self.device)
        shape = (spec.ep_size, self.round[1], spec.hidden_size)
        # Detached: a write that records gradients stays with the tensor handed out here.
        return self._buffers[dtype][: shape[0] * shape[1] * shape[2]].view(shape).detach()
