"""An exchange between its opening and its close: what a failure does to it, and how it goes on.

`AllToAll` adds what moves rows.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import torch

from moe_a2a import opening, registry
from moe_a2a.backends.base import REFUSED
from moe_a2a.errors import MoeA2AError, PayloadError, PeerTimeout, StateError
from moe_a2a.outputs import Outputs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from moe_a2a.backends.base import Backend
    from moe_a2a.checks import Rules
    from moe_a2a.spec import Spec
    from moe_a2a.timeline import Timeline, WaitTimes

__all__ = ["Lifecycle"]


class Lifecycle:
    """Phases, failures, `reset` and `close` of one rank's end of an exchange."""

    spec: Spec
    ep_rank: int
    _rules: Rules
    _everyone: int  # mask of all ranks
    _active: int  # of those that take part

    def __init__(self) -> None:
        self._impl: Backend | None = None
        self._failure: MoeA2AError | None = None
        self._closed = False
        self._timeline: Timeline | None = None
        self._dispatched = False
        self._blocked = True  # _refusal() knows why; one flag is all that a good call looks at
        self._process = os.getpid()
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._outputs = Outputs(0, torch.device("cpu"))

    @property
    def phase(self) -> str:
        """``"idle"`` or ``"dispatched"``."""
        return "dispatched" if self._dispatched else "idle"

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
        self._rules.receive_memory = self._impl.receive_memory
        self._failure = None
        self._blocked = self._dispatched = False
        self._active = mask

    def check(self) -> None:
        """Raises what a kernel has recorded meanwhile; on CUDA it waits for the current stream.

        Kernels run behind the calls that launched them: without it a failure comes out of the next
        dispatch or combine. On the CPU nothing is ever pending.

        Raises:
            PeerTimeout: ranks that did not arrive, in this call or an earlier one.
            StateError: the ranks made different calls; or after `close`.
        """
        impl = self._usable("check")
        try:
            impl.check()
        except MoeA2AError as error:
            raise self._failed("check", error) from None

    def wait_times(self) -> WaitTimes:
        """How long this rank waited for each peer so far; prints as a table. Needs ``debug=True``.

        On CUDA of the operations that have ended: `check` first, to have all.

        Raises:
            StateError: without ``debug=True``, or after `close`.
        """
        return self._times("wait_times").wait_times()

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the phases of this rank's last operations for Perfetto (ui.perfetto.dev) to load.

        ``python -m moe_a2a merge-traces`` makes one of several. Otherwise as `wait_times`.
        """
        self._times("save_trace").save(path)

    def _times(self, call: str) -> Timeline:
        self._check_process(call)
        if self._timeline is None or self._impl is None:
            needs = "needs AllToAll(..., debug=True), on every rank"
            raise StateError(f"{call} {needs if self._timeline is None else 'after close()'}")
        self._impl.collect_times()
        return self._timeline

    def close(self) -> None:
        """Lets go of the window. Local, idempotent, waits for nobody.

        Rounds that are queued on a GPU (of the last call's stream, and of the current one) still
        end as they would have. CUDA graphs can't be replayed any more.
        """
        impl, self._impl, self._closed, self._blocked = self._impl, None, True, True
        self._buffers, self._outputs = {}, Outputs(0, torch.device("cpu"))
        if impl is not None:
            opening.close(impl, self._timeline)

    def __enter__(self) -> Self:
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

    def _usable(self, call: str) -> Backend:
        self._check_process(call)
        if self._failure is not None:
            raise copy.copy(self._failure)
        if self._impl is None:
            raise StateError(f"{call} after close()")
        return self._impl

    def need_dispatched(self, call: str) -> None:
        """Raises why ``call`` can't be made now, unless a dispatch is open."""
        if self._blocked or not self._dispatched:
            raise self._refusal(call, dispatched=True)

    def _refusal(self, call: str, *, dispatched: bool) -> MoeA2AError:
        """Why ``call``, which needs ``dispatched``, can't be made now."""
        try:
            self._usable(call)
        except MoeA2AError as error:
            return error
        before = "combine" if self._dispatched else "dispatch"
        return StateError(f"{call} in phase {self.phase!r}: {before} comes first")

    def forked(self) -> None:
        """In a forked child: every call is refused there, and nothing is its to close."""
        self._blocked = True
        registry.leave(self._impl)
        self._impl = None

    def _check_process(self, call: str) -> None:
        if os.getpid() != self._process:
            raise StateError(
                f"{call} in process {os.getpid()}, forked from rank {self.ep_rank} "
                f"(process {self._process}): only the process that opened an exchange may use it"
            )

    def _failed(self, call: str, error: BaseException) -> BaseException:
        """Remembers why no further call can work until a reset."""
        if isinstance(error, ValueError) and str(error).startswith(REFUSED):
            return PayloadError(f"{call}: {error}")  # by the binding, which had sent nothing yet
        self._blocked = True
        if isinstance(error, (PeerTimeout, StateError)):
            self._failure = copy.copy(error)  # without the traceback, which holds on to the caller
        else:
            self._failure = StateError(
                f"{call} was broken off on this rank ({type(error).__name__}: {error}); peers may "
                "have its rows. Call reset() on all ranks to go on."
            )
        return error
