"""From what a kernel or a transport recorded about a failed wait to the error that says it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_a2a.backends.base import ranks_in
from moe_a2a.errors import MoeA2AError, PeerTimeout, StateError
from moe_a2a.formats import FORMATS

__all__ = ["RoundFacts", "failure_of", "mismatch", "peer_timeout"]

_PHASES = {1: "dispatch", 2: "combine"}
_DEFERRED = 0x100
_MISMATCH, _EXCLUDED = 2, 3  # kinds of failure in csrc


@dataclass(frozen=True)
class RoundFacts:
    """What a rank says of its operation (csrc/epoch.h)."""

    phase: int
    rows: int
    format: int
    global_scale_bits: int
    active: int

    def __str__(self) -> str:
        wire = list(FORMATS)[self.format & ~_DEFERRED]
        form = f"{wire}, deferred (bf16 travels)" if self.format & _DEFERRED else wire
        return (
            f"{_PHASES.get(self.phase, 'idle')}, runtime_max_tokens={self.rows}, wire {form}, "
            f"active ranks {self.active:#b}, global scale bits {self.global_scale_bits:#010x}"
        )


def mismatch(rank: int, mine: RoundFacts, peer: int, theirs: RoundFacts, round: int) -> StateError:
    """The ranks of one round called it with different arguments."""
    return StateError(
        f"round {round}: the ranks disagree. Rank {rank} calls {mine}; rank {peer} calls {theirs}. "
        "runtime_max_tokens, defer, active_ranks and the order of calls must be the same on every "
        "rank. Call reset() on all ranks to go on."
    )


def peer_timeout(
    *,
    backend: str,
    rank: int,
    missing: list[int],
    phase: int,
    round: int,
    waited: float,
    limit: float,
    operations_ago: list[int],
) -> PeerTimeout:
    """``operations_ago[r]``: how many operations ago rank r was last seen, -1 for never."""
    now = 2 * round + (phase == 2)
    seen = []
    for peer in missing:
        if peer == rank:
            continue
        if operations_ago[peer] < 0:
            seen.append(f"rank {peer} was not seen since it opened or was reset")
        else:
            at, combine = divmod(now - operations_ago[peer], 2)
            seen.append(f"rank {peer} was last seen at round {at} {_PHASES[1 + combine]}")
    if missing == [rank]:
        who = f"its peers had given up on this rank (rank {rank}), which came too late"
    else:
        who = f"ranks {', '.join(map(str, missing))} are missing"
    text = (
        f"{_PHASES[phase]} of round {round} on rank {rank} ({backend}): {who} after {waited:.2f} s "
        f"(limit {limit:g} s). All ranks must call the same sequence: this rank is at round "
        f"{round} {_PHASES[phase]}"
        + "".join(f", {item}" for item in seen)
        + ". Go on with reset() on all "
        "ranks, or reset(active_ranks=...) on those that are left."
    )
    return PeerTimeout(text, ranks=missing, phase=_PHASES[phase], round=round, waited=waited)


def failure_of(record: list[int], *, backend: str, rank: int, limit: float) -> MoeA2AError:
    """The error behind a kernel's record (``failure_record`` of both bindings)."""
    kind, phase, round, waited, missing, _, peer = record[:7]
    if kind == _MISMATCH:
        mine, theirs = (RoundFacts(*record[at : at + 5]) for at in (7, 12))
        return mismatch(rank, mine, peer, theirs, round)
    if kind == _EXCLUDED:
        return StateError(
            f"round {round} on rank {rank}: a reset() of the other ranks has left this one out. "
            "Only a reset() over all ranks takes it in again."
        )
    return peer_timeout(
        backend=backend,
        rank=rank,
        missing=ranks_in(missing % 2**64),
        phase=phase,
        round=round,
        waited=waited / 1e9,
        limit=limit,
        operations_ago=record[17:],
    )
