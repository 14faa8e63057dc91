"""``nvlink``: CUDA ranks of one NVLink domain, with one-sided kernels that store to their peers.

Calls launch one kernel each on the caller's current stream and return; nothing here waits for the
device but `check`, `reset` and the constructor.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from moe_a2a._build import cuda_compiler
from moe_a2a._ops import cuda_library
from moe_a2a.backends import departing
from moe_a2a.backends.base import DispatchCall, Opening, ReceiveViews, Views, ranks_in, signed
from moe_a2a.backends.failure import failure_of
from moe_a2a.backends.symmetric import SymmetricWindow, open_window
from moe_a2a.errors import BuildError, GeometryError, MoeA2AError
from moe_a2a.lobby import Lobby, StoreBoard
from moe_a2a.timeline import OperationTimes
from moe_a2a.workspace import geometry_numbers, shape_numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from moe_a2a.group import Group
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

__all__ = ["Nvlink"]

_MAX_RANKS = 64  # bits of a mask
_MAX_EXPERTS = 2**15 - 1  # owners are found by a product of 32 bits
_STATUS_BYTES = 1024
_NOTES = 1024  # operations that kernels can note before they are collected


class Nvlink:
    """One rank's end. See csrc/cuda for the kernels and docs/design.md for the protocol."""

    name: ClassVar[str] = "nvlink"
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)
    # Packets of dispatch as 128-byte lines, which NVLink delivers whole, and headers without a
    # fence; else nothing but what the memory model promises: packets of 16 bytes, and the fence.
    # Rows of a combine rest on no lines either way. Equal on all ranks.
    lines: ClassVar[bool] = True

    @staticmethod
    def unusable(spec: Spec | None, group: Group | None) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device here"
        if torch.cuda.get_device_capability() < (8, 9):
            return "needs compute capability 8.9 (conversions to FP8)"
        try:
            cuda_compiler()
        except BuildError as error:
            return str(error)
        if spec is not None and spec.ep_size > _MAX_RANKS:
            return f"ep_size={spec.ep_size}: at most {_MAX_RANKS} ranks"
        if spec is not None and spec.num_experts > _MAX_EXPERTS:
            return f"num_experts={spec.num_experts}: at most {_MAX_EXPERTS:,}"
        if group is not None and len({facts["host"] for facts in group.facts}) > 1:
            return "the ranks are on several hosts, or in several pid namespaces of one"
        return None

    @classmethod
    def open(cls, opening: Opening) -> Nvlink:
        departing.sweep()
        with torch.cuda.device(opening.device):
            return cls(opening)

    def __init__(self, opening: Opening) -> None:
        spec, group = opening.spec, opening.group
        self._spec, self._rank, self._timeout = spec, group.rank, opening.timeout
        self._local, self._device = group.local, opening.device
        self._index = opening.device.index or 0
        self._last = 0  # stream
        self._debug = opening.debug
        problem: MoeA2AError | None = None
        try:
            self._library = self._load()
        except MoeA2AError as error:
            problem = error
        group.agree(problem)
        facts = group.exchange(self._facts())
        devices = [reply["device"] for reply in facts]
        if any(reply["lines"] != self.lines for reply in facts):
            raise GeometryError("the ranks disagree on the form of low-latency packets")
        self._window = self._open_window(spec.workspace_bytes(), group)
        geometry = geometry_numbers(spec)
        self._memory = torch.zeros(
            self._library.local_bytes(geometry), dtype=torch.uint8, device=opening.device
        )
        # Written by the device, read by the host at the next call, without waiting for anything.
        self._status = self._host_memory(_STATUS_BYTES)
        sharers = devices.count(devices[self._rank])
        self._timeline, self._noted, self._clock, self._calls = opening.timeline, 0, 0, 0
        notes = self._library.notebook_bytes() if opening.debug else 0
        self._notes = torch.zeros(notes, dtype=torch.uint8, device=opening.device)
        self._endpoint: Any = self._library.endpoint_open(
            geometry,
            shape_numbers(spec, opening.debug),
            self._rank,
            self._window.addresses,
            self._memory.data_ptr(),
            self._status.data_ptr(),
            [
                self._index,
                sharers,
                opening.max_blocks or 0,
                int(self.lines),
                self._notes.data_ptr() if opening.debug else 0,
            ],
            int(opening.timeout * 1e9),
        )
        # A look-up in the library costs a third of a call.
        self._dispatch, self._combine = self._library.dispatch, self._library.combine
        self._views = ReceiveViews(spec, self._window.tensor)
        self._extras = tuple(enumerate(spec.extra))
        self._lobby = Lobby(
            self._rank,
            StoreBoard(group.store, group.name, self._rank),
            opening.timeout,
            "reset",
            [0] * spec.ep_size,
        )
        self._library.restart(self._endpoint, 1, 1, 1, self._stream())
        if opening.debug:
            self._clock = self._clock_difference()
        # Nobody stores to a window before its owner has cleared it.
        group.agree(None)

    # What is CUDA's; tests run the kernels on the CPU (tests/simt).

    def _load(self) -> Any:
        return cuda_library()

    def _open_window(self, nbytes: int, group: Group) -> SymmetricWindow:
        return open_window(nbytes, self._device, group)

    def _host_memory(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8).pin_memory()

    def _facts(self) -> dict[str, object]:
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        return {"device": uuid, "lines": self.lines}

    def _stream(self) -> int:
        self._last = stream = int(torch._C._cuda_getCurrentRawStream(self._index))
        return stream

    @property
    def receive_memory(self) -> tuple[int, int]:
        first = self._window.tensor.data_ptr()
        return first, first + self._window.tensor.numel()

    def dispatch(self, call: DispatchCall) -> Views:
        for index, name in self._extras:
            self._library.stage_extra(self._endpoint, index, call.extra[name])
        failed = self._dispatch(
            self._endpoint,
            call.x,
            call.scales,
            call.topk_ids,
            call.topk_weights,
            call.counts,
            call.rows,
            call.deferred,
            call.global_scale,
            self._scale_bits(call.global_scale) if self._debug else 0,
            signed(call.active),
            self._stream(),
        )
        if failed:
            raise self._failure()
        if self._debug:
            self._collect_now_and_then()
        return self._views.of(call.rows, call.deferred)

    def _scale_bits(self, scale: Tensor | None) -> int:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return 0
        value = torch.ones(()) if scale is None else scale.detach().cpu()
        return int(value.view(torch.int32).item()) & 0xFFFFFFFF

    def combine(self, y: Tensor, out: Tensor, grouped: Grouped | None = None) -> None:
        if grouped is None:
            failed = self._combine(self._endpoint, y, out, self._stream())
        else:
            failed = self._library.combine_grouped(
                self._endpoint, y, grouped.positions, grouped.row_weights, out, self._stream()
            )
        if failed:
            raise self._failure()

    def check(self) -> None:
        self._wait_for_stream()
        if self._library.failure_kind(self._endpoint):
            raise self._failure()

    def collect_times(self) -> None:
        """What kernels have noted since, of the last operations that they have room for."""
        if self._timeline is None:
            return
        ended = int(self._library.count_notes(self._endpoint))
        first = max(self._noted, ended - _NOTES // 2)  # the others may be overwritten meanwhile
        self._timeline.lose(first - self._noted)
        for n in range(first, ended):
            words = [int(word) for word in self._library.read_note(self._endpoint, n)]
            words[2:6] = [word + self._clock for word in words[2:6]]
            self._timeline.add(OperationTimes.of(words))
        self._noted = ended

    def _collect_now_and_then(self) -> None:
        """Often enough for eager calls to lose nothing; replays of graphs are not seen here."""
        self._calls += 1
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._calls % (_NOTES // 8) == 0 and not capturing:
            self.collect_times()

    def _clock_difference(self) -> int:
        """Nanoseconds by which the host's monotonic clock is ahead of the device's."""
        found = []
        for _ in range(5):
            before = time.monotonic_ns()
            there = int(self._library.read_clock(self._endpoint, self._stream()))
            after = time.monotonic_ns()
            found.append((after - before, (before + after) // 2 - there))
        return min(found)[1]

    def _failure(self) -> MoeA2AError:
        record = [int(word) for word in self._library.failure_record(self._endpoint)]
        return failure_of(record, backend=self.name, rank=self._rank, limit=self._timeout)

    def reset(self, ranks: int) -> None:
        """Clears this rank's own memory between two meetings, so at a time when no rank sends.

        Ranks left out must have ended: what one of them may still store is not kept away.
        """
        self._drain()
        epoch, generation, round = (int(n) for n in self._library.position(self._endpoint))
        members = ranks_in(ranks)
        notes = self._lobby.meet(members, signed(ranks), epoch, generation)
        latest = max(note.epoch for note in notes.values())
        generation = max(note.generation for note in notes.values()) + 1
        everyone = (1 << self._spec.ep_size) - 1
        self._library.restart(
            self._endpoint, (latest + 2) % 2**32 or 1, generation, round, self._stream()
        )
        if everyone & ~ranks:
            self._library.exclude(
                self._endpoint, signed(everyone & ~ranks), generation, self._stream()
            )
        self._lobby.finish(members)

    def _wait_for_stream(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def _drain(self) -> None:
        if self._local:  # the streams of other threads are not this rank's to wait for
            self._wait_for_stream()
        else:
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        abandon = partial(self._library.abandon, endpoint)
        if sys.is_finalizing():  # nobody will look at what rounds bring now
            abandon()
            return
        done = self._ended()
        if not done():
            memory = (endpoint, self._window, self._memory, self._status, self._notes)
            departing.hold(memory, done, abandon)

    def _ended(self) -> Callable[[], bool]:
        """Whether the last eager round is over, and what the current stream has now, graphs say."""
        raws = {self._last, int(torch._C._cuda_getCurrentRawStream(self._index))}
        events: list[Any] | None = None

        def done() -> bool:
            nonlocal events
            if torch.cuda.is_current_stream_capturing():  # which questions would end
                return False
            try:
                if events is None:
                    streams = [self._stream_of(raw) for raw in raws]
                    events = [stream.record_event() for stream in streams if not stream.query()]
                return all(event.query() for event in events)
            except RuntimeError:  # the device has failed: nothing runs there
                return True

        return done

    def _stream_of(self, raw: int) -> Any:
        if raw == 0:  # for which ExternalStream would take a stream of torch's pool
            return torch.cuda.default_stream(self._device)
        return torch.cuda.ExternalStream(raw, self._device)  # type: ignore[no-untyped-call]
