"""`AllToAll`: dispatch tokens to the ranks that own their experts, combine what the experts made.

Shape letters: T tokens of this rank, K top_k, H hidden_size, E num_experts, W ep_size,
R runtime_max_tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import TYPE_CHECKING

import torch

from moe_a2a import backends
from moe_a2a.backends.base import DispatchCall, Opening
from moe_a2a.checks import Rules
from moe_a2a.errors import GeometryError, MoeA2AError, PayloadError, PeerTimeout, StateError
from moe_a2a.group import Group
from moe_a2a.outputs import Outputs
from moe_a2a.received import Received
from moe_a2a.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import torch.distributed as dist
    from torch import Tensor

__all__ = ["AllToAll"]

_NOTHING: Mapping[str, Tensor] = {}


class AllToAll:
    """One expert-parallel exchange of one group. Collective: every rank of the group constructs it.

    Rounds are ``dispatch`` then ``combine``, in the same order on every rank. A call refused with a
    typed error before anything was sent leaves the object as it was. After a `PeerTimeout` every
    call raises it again until `reset`.

    Args:
        spec: the geometry, equal on every rank.
        group: a torch.distributed group of ``spec.ep_size`` ranks; None is the default group, or,
            where torch.distributed is not initialized, one rank by itself.
        backend: a name from `moe_a2a.backends`, or ``"auto"``: the first usable on every rank.
        device: where tensors live; None is the CPU (the current CUDA device with a CUDA backend).
        timeout: seconds that a wait for a peer may take; beats ``MOE_A2A_TIMEOUT``, default 30.
        max_blocks: most blocks of a CUDA kernel; the CPU backends have none.
        debug: compare more between ranks at each call.

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
        self._impl: backends.base.Backend | None = None
        self._failure: MoeA2AError | None = None
        self._closed = False
        self._dispatched = False
        self._process = os.getpid()
        self._outputs = Outputs(0, torch.device("cpu"))
        limit = 30.0
        problem: MoeA2AError | None = None
        try:
            limit = _seconds(timeout)
            self.device = _check_arguments(spec, backend, device, max_blocks, debug)
            spec.workspace()  # compiles the library, where a compiler is missing on one rank only
        except MoeA2AError as error:
            problem = error
        ranks = Group(group, limit)
        self.ep_rank, self.spec = ranks.rank, spec
        # What one rank alone can see is told to all, so that nobody waits for a rank that gave up.
        ranks.agree(problem)
        ranks.introduce({"spec": dataclasses.asdict(spec), "backend": backend, "debug": debug})
        _compare(ranks, spec)
        chosen = backends.choose(backend, self.device.type, spec, ranks)
        self.backend = chosen.name
        opening = Opening(spec, ranks, self.device, limit, debug, max_blocks)
        self._impl = chosen.open(opening)
        self._rules = Rules(spec, self.device)
        self._everyone = self._active = (1 << spec.ep_size) - 1
        self._round = (0, 0)  # T and R of the round under way
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._outputs = Outputs(spec.hidden_size, self.device)
        own = spec.experts_of(self.ep_rank)
        self.first_expert, self.num_local_experts = own.start, len(own)

    @property
    def phase(self) -> str:
        """``"idle"`` or ``"dispatched"``."""
        return "dispatched" if self._dispatched else "idle"

    @property
    def round_tokens(self) -> int:
        """T of the round under way (of the last one when idle)."""
        return self._round[0]

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
        impl = self._ready("dispatch", dispatched=False)
        rules = self._rules
        rows = rules.rows(runtime_max_tokens)
        deferred = defer is not False and rules.deferral(defer)
        rules.inputs(x, topk_ids, topk_weights, scales, rows, deferred)
        tokens = x.shape[0]
        if global_scale is not None:
            rules.global_scale(global_scale)
            self._apart("global_scale", global_scale)
        if extra is not None or self.spec.extra:
            extra = rules.extra(extra, tokens)
            for name, value in extra.items():
                self._apart(f"extra[{name!r}]", value)
        if scales is not None:
            self._apart("scales", scales)
        active = rules.active(active_ranks, self._active, self.ep_rank)
        self._apart("x", x)
        self._apart("topk_ids", topk_ids)
        self._apart("topk_weights", topk_weights)
        counts = torch.empty(self.spec.ep_size, dtype=torch.int32, device=self.device)
        call = DispatchCall(
            x, scales, topk_ids, topk_weights, counts, rows, deferred, global_scale, active,
            extra or _NOTHING,
        )  # fmt: skip
        self._active = active
        try:
            views = impl.dispatch(call)
        except BaseException as error:
            raise self._failed("dispatch", error) from None
        self._dispatched = True
        self._round = (tokens, rows)
        return Received(
            *views[:4], counts, views.extra, global_scale, self.spec, self.ep_rank, deferred
        )

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
        impl = self._ready("combine", dispatched=True)
        tokens, rows = self._round
        self._rules.expert_output(y, rows)
        self._apart("y", y)
        if out is None:
            out = self._outputs.take(tokens, y.dtype)
        else:
            self._rules.output(out, tokens, y.dtype)
            self._apart("out", out)
            if _overlap(out, y):
                raise PayloadError("out shares memory with y, which is read while out is written")
        try:
            impl.combine(y, out)
        except BaseException as error:
            raise self._failed("combine", error) from None
        self._dispatched = False
        return out

    def combine_buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """[W, R, H] of this round for the experts to write, kept from round to round.

        ``dtype`` defaults to the combine wire's (bf16 where that is quantized).

        Raises:
            StateError: no dispatch is open.
            PayloadError: a dtype that the combine wire does not take.
        """
        self._ready("combine_buffer", dispatched=True)
        accepted = self._rules.combine_dtypes
        if dtype is None:
            dtype = accepted[0]
        if dtype not in accepted:
            raise PayloadError(
                f"combine_buffer({dtype}): combine wire {self.spec.combine_wire!r} takes "
                f"{' or '.join(map(str, accepted))}"
            )
        spec = self.spec
        if dtype not in self._buffers:
            most = spec.ep_size * spec.max_tokens_per_rank * spec.hidden_size
            with torch.inference_mode(False):  # it outlives the mode that the caller is in
                self._buffers[dtype] = torch.empty(most, dtype=dtype, device=self.device)
        shape = (spec.ep_size, self._round[1], spec.hidden_size)
        # Detached: a write that records gradients stays with the tensor handed out here.
        return self._buffers[dtype][: shape[0] * shape[1] * shape[2]].view(shape).detach()

    def reset(self, active_ranks: Tensor | Sequence[bool] | None = None) -> None:
        """Starts anew with ``active_ranks`` (default: all). Collective over those ranks.

        Raises:
            PeerTimeout: ranks that did not call it; it may be called again.
        """
        self._check_process("reset")
        if self._impl is None:
            raise StateError("reset after close()")
        mask = self._everyone if active_ranks is None else self._rules.mask(active_ranks)
        if not mask >> self.ep_rank & 1:
            raise StateError(f"reset: active_ranks={mask:#b} leaves this rank ({self.ep_rank}) out")
        try:
            self._impl.reset(mask)
        except BaseException as error:
            raise self._failed("reset", error) from None
        self._failure = None
        self._dispatched = False
        self._active = mask

    def close(self) -> None:
        """Lets go of the window. Local, idempotent, waits for nobody."""
        impl, self._impl, self._closed = self._impl, None, True
        self._buffers, self._outputs = {}, Outputs(0, torch.device("cpu"))
        if impl is not None:
            impl.close()

    def __enter__(self) -> AllToAll:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_impl", None) is not None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.phase
        return f"AllToAll(rank {self.ep_rank} of {self.spec.ep_size}, {self.spec.wire}, {state})"

    def _ready(self, call: str, *, dispatched: bool) -> backends.base.Backend:
        self._check_process(call)
        if self._failure is not None:
            raise copy.copy(self._failure)
        if self._impl is None:
            raise StateError(f"{call} after close()")
        if self._dispatched is not dispatched:
            before = "combine" if self._dispatched else "dispatch"
            raise StateError(f"{call} in phase {self.phase!r}: {before} comes first")
        return self._impl

    def _check_process(self, call: str) -> None:
        if os.getpid() != self._process:
            raise StateError(
                f"{call} in process {os.getpid()}, forked from rank {self.ep_rank} "
                f"(process {self._process}): only the process that opened an exchange may use it"
            )

    def _failed(self, call: str, error: BaseException) -> BaseException:
        """Remembers why no further call can work until a reset."""
        if isinstance(error, (PeerTimeout, StateError)):
            self._failure = copy.copy(error)  # without the traceback, which holds on to the caller
        else:
            self._failure = StateError(
                f"{call} was broken off on this rank ({type(error).__name__}: {error}); peers may "
                "have its rows. Call reset() on all ranks to go on."
            )
        return error

    def _apart(self, name: str, value: Tensor) -> None:
        assert self._impl is not None
        first, end = self._impl.receive_memory
        if first <= value.data_ptr() < end:
            raise PayloadError(
                f"{name} lies in the receive views, which peers may write while it is in use; pass "
                "a copy (combine_buffer() is memory for the experts' output)"
            )


def _seconds(timeout: float | None) -> float:
    name, given = "timeout", timeout
    if given is None:
        name, text = "MOE_A2A_TIMEOUT", os.environ.get("MOE_A2A_TIMEOUT") or "30"
        try:
            given = float(text)
        except ValueError:
            raise GeometryError(f"{name}={text!r}: must be a number of seconds") from None
    if isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1e9:
        return float(given)
    raise GeometryError(f"{name}={given!r}: must be a positive number of seconds")


def _check_arguments(
    spec: Spec, backend: object, device: object, max_blocks: object, debug: object
) -> torch.device:
    if not isinstance(spec, Spec):
        raise GeometryError(f"spec={spec!r}: must be a Spec")
    if not isinstance(backend, str):
        raise GeometryError(f"backend={backend!r}: must be a name, or 'auto'")
    if not isinstance(debug, bool):
        raise GeometryError(f"debug={debug!r}: must be True or False")
    is_int = isinstance(max_blocks, int) and not isinstance(max_blocks, bool)
    if max_blocks is not None and not (is_int and max_blocks >= 1):  # type: ignore[operator]
        raise GeometryError(f"max_blocks={max_blocks!r}: must be an integer >= 1, or None")
    try:
        found = torch.device("cpu" if device is None else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise GeometryError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    return torch.device("cpu") if found.type == "cpu" else found  # tensors never say "cpu:0"


def _compare(group: Group, spec: Spec) -> None:
    """Raises `GeometryError` on every rank alike if the ranks do not agree."""
    for rank, facts in enumerate(group.facts):
        for name in ("spec", "backend", "debug"):
            mine, theirs = group.facts[0][name], facts[name]
            if name == "spec":
                changed = [key for key in mine if mine[key] != theirs.get(key)]
                mine = {key: mine[key] for key in changed}
                theirs = {key: theirs.get(key) for key in changed}
            if mine != theirs:
                raise GeometryError(
                    f"the ranks disagree on {name}: rank 0 has {mine}, rank {rank} has {theirs}"
                )
    if group.size != spec.ep_size:
        raise GeometryError(
            f"ep_size={spec.ep_size}, and the group has {group.size} ranks: they must be equal"
            + ("" if group.store else " (is torch.distributed initialized?)")
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    return _span(a)[0] < _span(b)[1] and _span(b)[0] < _span(a)[1]


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    first = t.data_ptr()
    return first, first + (last + 1) * t.element_size() if t.numel() else first
