"""``collective``: the exchange on torch.distributed point-to-point messages (gloo).

The portable path, and the oracle of the one-sided backends: it quantizes with `moe_a2a.formats`
and routes with torch operations, so that it shares no code with their kernels.
"""

from __future__ import annotations

import json
import time
from dataclasses import astuple
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from moe_a2a import formats
from moe_a2a.backends.base import DispatchCall, Opening, ReceiveViews, Views, ranks_in, signed
from moe_a2a.backends.failure import RoundFacts, mismatch, peer_timeout
from moe_a2a.backends.float_mode import subnormals_kept
from moe_a2a.errors import PeerTimeout, WorkspaceError
from moe_a2a.grouped import weighted_sums
from moe_a2a.interruptible import interruptible
from moe_a2a.lobby import Lobby, StoreBoard
from moe_a2a.timeline import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.group import Group
    from moe_a2a.grouped import Grouped
    from moe_a2a.spec import Spec

__all__ = ["Collective"]

_DISPATCH, _COMBINE = 1, 2
_GRACE = 0.5  # seconds to wait for what the other survivors have to say
_DEFERRED = 0x100
_PLAIN = ("bf16", "fp16", "fp32")  # combine wires that do not quantize


class Collective:
    """One rank's end: two messages per peer in dispatch (header, rows), one in combine."""

    name: ClassVar[str] = "collective"
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)

    @staticmethod
    def unusable(spec: Spec | None, group: Group | None) -> str | None:
        if not (dist.is_available() and dist.is_gloo_available()):
            return "this build of torch has no torch.distributed with gloo"
        if group is not None and group.local:
            return "the ranks are threads of one process; collective runs between processes"
        return None

    @classmethod
    def open(cls, opening: Opening) -> Collective:
        return cls(opening)

    def __init__(self, opening: Opening) -> None:
        spec, group = opening.spec, opening.group
        self._spec, self._group, self._debug = spec, group, opening.debug
        self._rank, self._timeout = group.rank, opening.timeout
        self._timeline = opening.timeline
        self._memory = self._receive_regions(group)
        self._views = ReceiveViews(spec, self._memory)
        owners = [rank for rank in range(spec.ep_size) for _ in spec.experts_of(rank)]
        self._owner = torch.tensor(owners)
        self._operation, self._generation, self._round = 1, 1, 0
        self._seen = [-1] * spec.ep_size  # operation at which a peer's header last came
        self._lobby = Lobby(
            self._rank,
            StoreBoard(group.store, group.name, self._rank),
            opening.timeout,
            "reset",
            [0] * spec.ep_size,
        )
        self._connect(list(range(spec.ep_size)), "open")
        # Nobody closes its ends of the connections before everyone has them all.
        group.agree(None)

    def _receive_regions(self, group: Group) -> Tensor:
        """Raises `WorkspaceError` on every rank if any host lacks the memory."""
        wanted = self._spec.workspace().region("combine").offset
        host = group.facts[self._rank]["host"]
        neighbours = sum(facts["host"] == host for facts in group.facts)
        there = min(facts["memory"] for facts in group.facts if facts["host"] == host)
        memory, problem = torch.empty(0, dtype=torch.uint8), None
        if wanted * neighbours > there:
            problem = WorkspaceError(
                f"{neighbours} times {wanted:,} bytes of receive memory are wanted on this host; "
                f"{there:,} bytes are available. Lower max_tokens_per_rank, or use a narrower wire "
                "(python -m moe_a2a plan)."
            )
        else:
            with torch.inference_mode(False):  # it outlives the mode that the caller is in
                memory = torch.empty(wanted, dtype=torch.uint8)
        group.agree(problem)
        return memory

    def _connect(self, members: list[int], phase: str) -> None:
        """Connections of our own: no call of the user's on the same group can come in between."""
        self._members = members
        self._peers: Any = None
        if len(members) == 1:
            return
        prefix = f"{self._group.name}/gloo/{self._generation}"
        store = PrefixStore(prefix, self._group.store)
        limit = timedelta(seconds=self._timeout)
        here, size = members.index(self._rank), len(members)
        start = time.monotonic()
        try:
            self._peers = interruptible(
                lambda: dist.ProcessGroupGloo(store, here, size, limit), self._timeout
            )
        except RuntimeError as error:
            missing = sorted(self._ask_around(set(members) - {self._rank}))
            waited = time.monotonic() - start
            raise PeerTimeout(
                f"{phase} on rank {self._rank} ({self.name}): no connection to all of ranks "
                f"{', '.join(map(str, missing))} after {waited:.2f} s (limit {self._timeout:g} s): "
                f"{error}",
                ranks=missing,
                phase=phase,
                round=0,
                waited=waited,
            ) from error

    @property
    def receive_memory(self) -> tuple[int, int]:
        first = self._memory.data_ptr()
        return first, first + self._memory.numel()

    # ---- dispatch --------------------------------------------------------------------------

    @subnormals_kept()
    def dispatch(self, call: DispatchCall) -> Views:
        spec, self._round = self._spec, self._round + 1
        self._watch = Stopwatch(self._timeline, _DISPATCH, self._round, self._others(call.active))
        views = self._views.of(call.rows, call.deferred)
        self._goes = self._destinations(call)
        packed = self._pack(call, views)
        counts = self._goes.sum(0).tolist()
        self._counts = self._agree_on_round(call, counts)
        sends = {peer: packed[self._goes[:, peer]] for peer in ranks_in(call.active)}
        receives = {
            peer: torch.empty(self._counts[peer], packed.shape[1], dtype=torch.uint8)
            for peer in ranks_in(call.active)
        }
        self._move(_DISPATCH, sends, receives)
        for source in range(spec.ep_size):
            count = self._counts[source]
            if count:
                self._unpack(receives[source], views, source, count)
            self._scrub(views, source, count)
        call.counts.copy_(torch.tensor(self._counts, dtype=torch.int32))
        self._sent = counts
        self._watch.stop()
        return views

    def _destinations(self, call: DispatchCall) -> Tensor:
        """bool [T, W]: the distinct active ranks that own an expert of the token."""
        ids = call.topk_ids.long()
        real = (ids >= 0) & (ids < self._spec.num_experts)
        owner = self._owner[ids.clamp(0, self._spec.num_experts - 1)]
        active = torch.zeros(self._spec.ep_size, dtype=torch.bool)
        active[ranks_in(call.active)] = True
        self._active = call.active
        self._reachable = real & active[owner]
        goes = torch.zeros(ids.shape[0], self._spec.ep_size + 1, dtype=torch.bool)
        goes.scatter_(1, owner.masked_fill(~self._reachable, self._spec.ep_size), True)
        return goes[:, :-1]

    def _pack(self, call: DispatchCall, views: Views) -> Tensor:
        """uint8 [T, row]: everything of a token in one run of bytes."""
        spec, scales = self._spec, call.scales
        x = call.x
        if scales is None and views.scales is not None:
            x, scales = formats.quantize(
                x, spec.wire, alignment=spec.alignment, global_scale=call.global_scale
            )
        invalid = spec.invalid_expert_id
        ids = torch.where(self._reachable, call.topk_ids, invalid).to(torch.int32)
        weights = torch.where(self._reachable, call.topk_weights, 0.0)
        pieces = [x, *([] if scales is None else [scales]), ids, weights]
        pieces += [call.extra[name] for name in spec.extra]
        return torch.cat([_as_bytes(piece) for piece in pieces], dim=1)

    def _unpack(self, packed: Tensor, views: Views, source: int, count: int) -> None:
        at = 0
        targets = [views.x, *([] if views.scales is None else [views.scales])]
        for view in [*targets, views.topk_ids, views.topk_weights, *views.extra.values()]:
            target = _as_bytes(view[source])
            target[:count] = packed[:, at : at + target.shape[1]]
            at += target.shape[1]

    def _scrub(self, views: Views, source: int, count: int) -> None:
        views.topk_ids[source, count:] = self._spec.invalid_expert_id
        views.topk_weights[source, count:] = 0.0
        if self._spec.scrub == "all":
            _as_bytes(views.x[source])[count:] = 0
            if views.scales is not None:
                _as_bytes(views.scales[source])[count:] = 0

    def _agree_on_round(self, call: DispatchCall, counts: list[int]) -> list[int]:
        """Exchanges headers; returns how many rows come from each rank."""
        self._operation += 1
        mine, active = self._facts(call), ranks_in(call.active)
        sends = {p: torch.tensor([self._operation, *astuple(mine), counts[p]]) for p in active}
        receives = {p: torch.empty_like(sends[p]) for p in active}
        self._move(_DISPATCH, sends, receives)
        arrived = [0] * self._spec.ep_size
        for peer in active:
            self._seen[peer], *words, arrived[peer] = receives[peer].tolist()
            theirs = RoundFacts(*words)
            if theirs != mine:
                raise mismatch(self._rank, mine, peer, theirs, self._round)
        return arrived

    def _facts(self, call: DispatchCall) -> RoundFacts:
        """The global scale is compared in debug mode only."""
        bits = 0
        if self._debug:
            scale = torch.ones(1) if call.global_scale is None else call.global_scale
            bits = int(scale.reshape(1).view(torch.int32).item()) & 0xFFFFFFFF
        form = list(formats.FORMATS).index(self._spec.wire) | (_DEFERRED if call.deferred else 0)
        return RoundFacts(_DISPATCH, call.rows, form, bits, signed(call.active))

    # ---- combine ---------------------------------------------------------------------------

    @subnormals_kept()
    def combine(self, y: Tensor, out: Tensor, grouped: Grouped | None = None) -> None:
        self._operation += 1
        active = ranks_in(self._active)
        self._watch = Stopwatch(self._timeline, _COMBINE, self._round, self._others(self._active))
        if self._timeline is not None:
            self._views.poison()
        sends = {peer: self._encode(self._rows(peer, y, grouped, out.dtype)) for peer in active}
        receives = {
            peer: torch.empty(self._sent[peer], sends[peer].shape[1], dtype=torch.uint8)
            for peer in active
        }
        # One byte where there are no rows: like the other backends combine waits for every active
        # rank, also for one that shares no token, so that all find a missing one in the same call.
        byte = torch.zeros(1, dtype=torch.uint8)
        self._move(
            _COMBINE,
            {peer: rows if rows.numel() else byte for peer, rows in sends.items()},
            {peer: rows if rows.numel() else byte.clone() for peer, rows in receives.items()},
        )
        total = torch.zeros(out.shape, dtype=torch.float32)
        for peer in active:
            index = self._goes[:, peer].nonzero().squeeze(1)
            total[index] = total[index] + self._decode(receives[peer], out.dtype)
            self._seen[peer] = self._operation
        out.copy_(total.to(out.dtype))
        self._watch.stop()

    def _rows(self, peer: int, y: Tensor, grouped: Grouped | None, out: torch.dtype) -> Tensor:
        count = self._counts[peer]
        if grouped is None:
            return y[peer, :count]
        first = peer * (grouped.positions.shape[0] // self._spec.ep_size)
        sums = weighted_sums(y, grouped, first, count)
        return sums.to(out) if self._spec.combine_wire in _PLAIN else sums

    def _encode(self, rows: Tensor) -> Tensor:
        if self._spec.combine_wire in _PLAIN:
            return _as_bytes(rows)
        payload, scales = formats.quantize(rows, self._spec.combine_wire)
        assert scales is not None
        return torch.cat([_as_bytes(payload), _as_bytes(scales)], dim=1)

    def _decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        wire, hidden = self._spec.combine_wire, self._spec.hidden_size
        if wire in _PLAIN:
            return packed.view(dtype).float()
        form = formats.FORMATS[wire]
        assert form.scale_dtype is not None
        payload = packed[:, :hidden].contiguous().view(form.payload_dtype)
        scales = packed[:, hidden:].contiguous().view(form.scale_dtype)
        return formats.dequantize(payload, scales, wire, hidden_size=hidden)

    # ---- messages, and what becomes of missing ones ------------------------------------------

    def _move(self, phase: int, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """Sends and receives one message per rank; own ones are copied, empty ones left out."""
        start = time.monotonic()
        receives[self._rank].copy_(sends[self._rank])
        missing: set[int] = set()
        works: list[tuple[int, dist.Work]] = []
        for peer in (rank for rank in sends if rank != self._rank):
            at = self._members.index(peer)
            try:
                if sends[peer].numel():
                    works.append((peer, self._peers.send([sends[peer].contiguous()], at, phase)))
                if receives[peer].numel():
                    works.append((peer, self._peers.recv([receives[peer]], at, phase)))
            except RuntimeError:  # the connection is known to be gone
                missing.add(peer)
        for peer, work in works:
            left = max(self._timeout - (time.monotonic() - start), 0.001)
            try:
                with self._watch.waits(peer):
                    interruptible(partial(work.wait, timedelta(seconds=left)), left + _GRACE)
            except RuntimeError:
                missing.add(peer)
        if missing:
            self._watch.stop()
            raise self._missing(phase, missing, time.monotonic() - start)

    def _missing(self, phase: int, missing: set[int], waited: float) -> Exception:
        ranks = self._ask_around(missing)
        return peer_timeout(
            backend=self.name,
            rank=self._rank,
            missing=sorted(ranks),
            phase=phase,
            round=self._round,
            waited=waited,
            limit=self._timeout,
            operations_ago=[self._operation - at if at >= 0 else -1 for at in self._seen],
        )

    def _ask_around(self, mine: set[int]) -> set[int]:
        """The union of what the survivors miss, less every rank that is alive enough to say so; or
        what those report that have concluded without this rank. (As csrc/cpu/wait.cc.)"""
        store, others = self._group.store, set(self._members) - {self._rank}
        if store is None:
            return mine
        board = f"{self._group.name}/missing/{self._generation}"
        said: dict[int, tuple[int, set[int]]] = {}  # by rank: in which operation, whom it missed
        reported: set[int] = set()
        deadline = time.monotonic() + _GRACE

        def listen() -> None:
            for peer in others - said.keys():
                if store.check([f"{board}/{peer}"]):
                    operation, missing = json.loads(store.get(f"{board}/{peer}"))
                    said[peer] = operation, set(missing)

        try:
            listen()
            # What those do not send that have given up on this rank is no reason to miss them.
            lost = mine - {peer for peer, (_, missing) in said.items() if self._rank in missing}
            store.set(f"{board}/{self._rank}", json.dumps([self._operation, sorted(lost)]))
            while time.monotonic() < deadline and others - said.keys():
                listen()
                time.sleep(0.01)
            by_now = {p: missing for p, (at, missing) in said.items() if at <= self._operation}
            accusers = [peer for peer, missing in by_now.items() if self._rank in missing]
            for peer in accusers:
                if store.check([f"{board}/{peer}/end"]):
                    reported |= set(json.loads(store.get(f"{board}/{peer}/end")))
            if self._rank not in reported:
                reported = lost.union(*by_now.values()) - said.keys() - {self._rank}
            reported = reported or ({self._rank} if accusers else set().union(*by_now.values()))
            store.set(f"{board}/{self._rank}/end", json.dumps(sorted(reported)))
        except RuntimeError:  # the store went with the process that held it
            pass
        return reported or mine

    def _others(self, active: int) -> list[int]:
        return [rank for rank in ranks_in(active) if rank != self._rank]

    def check(self) -> None:
        """Nothing is ever pending: a call returns when its round has ended."""

    def collect_times(self) -> None:
        """They are noted as calls return."""

    def reset(self, ranks: int) -> None:
        members = ranks_in(ranks)
        self._peers = None
        notes = self._lobby.meet(
            members, signed(ranks), self._operation, self._generation, (0, 0, 0)
        )
        self._operation = max(note.epoch for note in notes.values()) // 2 * 2 + 3
        self._generation = max(note.generation for note in notes.values()) + 1
        self._seen = [-1] * self._spec.ep_size
        self._connect(members, "reset")
        self._lobby.finish(members)

    def close(self) -> None:
        self._peers = None


def _as_bytes(rows: Tensor) -> Tensor:
    """uint8 [T, row bytes] of a 2-D tensor: a view where its rows are adjacent."""
    # Torch calls [T, 1] and [0, n] contiguous whatever their last stride is; view() does not.
    return rows.contiguous().as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)
