"""``shm``: CPU ranks of one host over POSIX shared memory, with one-sided C++ kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe_a2a._build import cpu_compiler
from moe_a2a._ops import cpu_library
from moe_a2a.backends.base import DispatchCall, Opening, ReceiveViews, Views, ranks_in, signed
from moe_a2a.backends.failure import failure_of
from moe_a2a.backends.window import PeerWindow, Ticket, Window
from moe_a2a.errors import BuildError, MoeA2AError, StateError, WorkspaceError
from moe_a2a.lobby import Lobby
from moe_a2a.timeline import OperationTimes
from moe_a2a.workspace import geometry_numbers, shape_numbers

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from moe_a2a.group import Group
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

__all__ = ["Shm"]

_MAX_RANKS = 64  # bits of a mask
_PENDING = 1
_SLICE_NS = 50_000_000  # a kernel comes back this often, so that Ctrl-C is heard
_SPIN_NS = 100_000


class Shm:
    """One rank's end. See csrc/cpu for the kernels and docs/design.md for the protocol."""

    name: ClassVar[str] = "shm"
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)

    @staticmethod
    def unusable(spec: Spec | None, group: Group | None) -> str | None:
        if not sys.platform.startswith("linux"):
            return f"needs Linux (memfd, futex); this is {sys.platform}"
        try:
            cpu_compiler()
        except BuildError as error:
            return str(error)
        if spec is not None and spec.ep_size > _MAX_RANKS:
            return f"ep_size={spec.ep_size}: at most {_MAX_RANKS} ranks"
        if group is not None and group.local:
            return "the ranks are threads of one process; shm runs between processes"
        if group is not None and len({facts["host"] for facts in group.facts}) > 1:
            return "the ranks are on several hosts, or in several pid namespaces of one"
        for facts in group.facts if group is not None else ():
            if not os.access(f"/proc/{facts['pid']}/fd", os.R_OK | os.X_OK):
                return f"process {facts['pid']} of the group belongs to another user"
        return None

    @classmethod
    def open(cls, opening: Opening) -> Shm:
        return cls(opening)

    def __init__(self, opening: Opening) -> None:
        spec, group = opening.spec, opening.group
        self._spec, self._rank, self._timeout = spec, group.rank, opening.timeout
        self._timeline = opening.timeline
        self._library = cpu_library()
        self._control = spec.workspace().region("control").nbytes
        self._peers: dict[int, PeerWindow] = {}
        self._lobby_peers: dict[int, PeerWindow] = {}
        problem: MoeA2AError | None = None
        try:
            self._check_memory(group)
            # The lobby outlives the windows that rounds use: see reset().
            self._window = self._lobby_window = self._make_window()
        except MoeA2AError as error:
            problem = error
        try:
            group.agree(problem)
            self._connect(opening, group)
        except BaseException:
            if problem is None:
                self.close()
            raise

    def _connect(self, opening: Opening, group: Group) -> None:
        replies = group.exchange({"ticket": self._window.ticket})
        tickets = {rank: Ticket(*reply["ticket"]) for rank, reply in enumerate(replies)}
        problem: MoeA2AError | None = None
        try:
            self._peers = self._open_peers(tickets)
            self._lobby_peers = self._open_peers(tickets, self._control)
        except MoeA2AError as error:
            problem = error
        group.agree(problem)
        self._window.seal()  # everyone has mapped it
        lobby = [
            self._lobby_peers[r].address if r != self._rank else self._window.address
            for r in range(self._spec.ep_size)
        ]
        board = _Lines(self._rank, lobby)
        self._lobby = Lobby(self._rank, board, opening.timeout, "reset", [0] * self._spec.ep_size)
        self._endpoint: Any = self._library.endpoint_open(
            geometry_numbers(self._spec),
            shape_numbers(self._spec, opening.debug),
            self._rank,
            self._addresses(),
            int(opening.timeout * 1e9),
            _SPIN_NS,
            _cached_bytes(),
        )
        self._views = ReceiveViews(self._spec, self._window.tensor)

    def _check_memory(self, group: Group) -> None:
        wanted = self._spec.workspace().committed * self._spec.ep_size
        there = min(facts["memory"] for facts in group.facts)
        if wanted > there:
            raise WorkspaceError(
                f"{self._spec.ep_size} windows of {self._spec.workspace().committed:,} bytes are "
                f"wanted on this host, {wanted:,} in all; {there:,} bytes are available. Lower "
                "max_tokens_per_rank, or use a narrower wire (python -m moe_a2a plan)."
            )

    def _make_window(self) -> Window:
        table = self._spec.workspace()
        return Window(table.nbytes, table.committed)

    def _open_peers(
        self, tickets: dict[int, Ticket], nbytes: int | None = None
    ) -> dict[int, PeerWindow]:
        size = self._window.nbytes if nbytes is None else nbytes
        return {r: PeerWindow(ticket, size) for r, ticket in tickets.items() if r != self._rank}

    def _addresses(self) -> list[int]:
        """By rank; 0 for a rank that takes no part."""
        own, peers = self._window.address, self._peers
        return [
            own if rank == self._rank else peers[rank].address if rank in peers else 0
            for rank in range(self._spec.ep_size)
        ]

    @property
    def receive_memory(self) -> tuple[int, int]:
        return self._window.address, self._window.address + self._window.nbytes

    def dispatch(self, call: DispatchCall) -> Views:
        for index, name in enumerate(self._spec.extra):
            self._library.stage_extra(self._endpoint, index, call.extra[name])
        scale = 1.0 if call.global_scale is None else float(call.global_scale)
        status = self._library.dispatch(
            self._endpoint,
            call.x,
            call.scales,
            call.topk_ids,
            call.topk_weights,
            call.counts,
            call.rows,
            call.deferred,
            scale,
            signed(call.active),
            _SLICE_NS,
        )
        if status:
            self._finish(status)
        if self._timeline is not None:
            self._note_times()
        return self._views.of(call.rows, call.deferred)

    def combine(self, y: Tensor, out: Tensor, grouped: Grouped | None = None) -> None:
        if grouped is None:
            status = self._library.combine(self._endpoint, y, out, _SLICE_NS)
        else:
            status = self._library.combine_grouped(
                self._endpoint, y, grouped.positions, grouped.row_weights, out, _SLICE_NS
            )
        if status:
            self._finish(status)
        if self._timeline is not None:
            self._note_times()

    def _finish(self, status: int) -> None:
        while status == _PENDING:
            if self._endpoint is None:
                raise StateError("close() was called while this rank waited for its peers")
            status = self._library.resume(self._endpoint, _SLICE_NS)
        if status:
            if self._timeline is not None:
                self._note_times()
            raise self._failure()

    def _note_times(self) -> None:
        words = [int(word) for word in self._library.operation_times(self._endpoint)]
        assert self._timeline is not None
        self._timeline.add(OperationTimes.of(words))

    def collect_times(self) -> None:
        """They are noted as calls return."""

    def _failure(self) -> MoeA2AError:
        record = [int(word) for word in self._library.failure_record(self._endpoint)]
        return failure_of(record, backend=self.name, rank=self._rank, limit=self._timeout)

    def check(self) -> None:
        """Nothing is ever pending: a call returns when its round has ended."""

    def reset(self, ranks: int) -> None:
        """Moves ``ranks`` to fresh windows; a rank left out keeps the old ones and harms nobody."""
        epoch, generation, _ = (int(n) for n in self._library.position(self._endpoint))
        if self._window is self._lobby_window:
            self._window.retire(keep=self._control)
        else:
            self._window.close()
        self._peers = {}
        self._window = self._make_window()
        members = ranks_in(ranks)
        notes = self._lobby.meet(members, signed(ranks), epoch, generation, self._window.ticket)
        tickets = {rank: Ticket(*note.ticket) for rank, note in notes.items()}
        self._peers = self._open_peers(tickets)
        self._lobby.finish(members)
        self._window.seal()
        latest = max(note.epoch for note in notes.values())
        self._library.restart(
            self._endpoint,
            self._addresses(),
            (latest + 2) % 2**32 or 1,
            max(note.generation for note in notes.values()) + 1,
        )
        self._views = ReceiveViews(self._spec, self._window.tensor)

    def close(self) -> None:
        self._endpoint = None
        for window in {self._window, self._lobby_window}:
            window.close()
        self._peers, self._lobby_peers = {}, {}


def _cached_bytes() -> int:
    """What ranks may write in one operation before they write past the caches: half of the last
    one, since what they read passes through it too. (sysconf counts those of other cores.)"""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
        return int(text.strip().removesuffix("K")) * 1024 // 2
    except (OSError, ValueError):
        return 16 << 20


class _Lines:
    """A board: each rank's line in the control region of every peer's original window."""

    def __init__(self, rank: int, windows: list[int]) -> None:
        self._rank, self._windows = rank, windows
        self._library = cpu_library()

    def post(self, peers: list[int], words: list[int]) -> None:
        for peer in peers:
            self._library.post_meeting(self._windows[peer], len(self._windows), self._rank, words)

    def read(self, peers: list[int]) -> list[list[int]]:
        own, size = self._windows[self._rank], len(self._windows)
        return [[int(n) for n in self._library.read_meeting(own, size, p)] for p in peers]
