"""How the ranks of a group find each other: small messages through the group's own key-value store.

The store works before any window or connection exists, on every torch.distributed backend, with
waits that are bounded and can name who is missing. Messages are JSON; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch.distributed as dist

from moe_a2a.errors import GeometryError, MoeA2AError, PeerTimeout, StateError
from moe_a2a.lobby import Lobby, StoreBoard
from moe_a2a.memory import memory_available
from moe_a2a.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Group", "LocalRank", "host_identity"]


class _Store(Protocol):
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...
    def delete_key(self, key: str) -> bool: ...


class LocalRank(NamedTuple):
    """A group whose ranks are threads of one process (`moe_a2a.testing.run_local`).

    Attributes:
        rank: of this thread.
        size: threads of the group.
        store: theirs together, in this process; any that several threads may call at once.
    """

    rank: int
    size: int
    store: Any


def host_identity() -> str:
    """Equal for two processes that can reach each other through /proc: same boot, same pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


class Group:
    """The ranks that open one `AllToAll` together.

    Args:
        process_group: a torch.distributed group, or None for the default group; where
            torch.distributed is not initialized None is one rank by itself. Or a `LocalRank`.
        timeout: seconds that any one exchange may take.

    Attributes:
        process_group: the torch.distributed group, None where there is none.
        local: the ranks are threads of one process, so that an address of one is one of all.
    """

    def __init__(self, process_group: dist.ProcessGroup | LocalRank | None, timeout: float) -> None:
        self.timeout = timeout
        self.rank, self.size = 0, 1
        self.process_group: dist.ProcessGroup | None = None
        self.local = isinstance(process_group, LocalRank)
        self._store: _Store | None = None
        self._step = 0
        self._name = ""
        self.facts: list[dict[str, Any]] = []
        if isinstance(process_group, LocalRank):
            self.rank, self.size = process_group.rank, process_group.size
            self._store = process_group.store if self.size > 1 else None
        else:
            self._find(process_group)
        if self._store is not None:
            with self.store_errors():
                self._name = self._meet(self._store)

    def _find(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is None and not (dist.is_available() and dist.is_initialized()):
            return
        if process_group is None:
            process_group = dist.distributed_c10d._get_default_group()
        if not isinstance(process_group, dist.ProcessGroup):
            raise GeometryError(
                f"group={shown(process_group)}: must be a group that this process is in, or None"
            )
        self.process_group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.size > 1:
            from torch.distributed.distributed_c10d import _get_process_group_store

            self._store = _get_process_group_store(process_group)

    def _meet(self, store: _Store) -> str:
        """Waits until every rank opens; returns a name that only this opening has.

        What a rank knows of earlier openings is in the store too: a failed one, which some ranks
        took part in and others did not, must not keep them from meeting the next time.
        """
        key = f"moe_a2a/used/{self.rank}"
        used = json.loads(store.get(key)) if store.check([key]) else [0] * self.size
        attempt = store.add(f"moe_a2a/attempts/{self.rank}", 1)
        board = StoreBoard(store, "moe_a2a/open", self.rank)
        lobby = Lobby(self.rank, board, self.timeout, "open", used)
        lobby.meet(list(range(self.size)), self.size, attempt=attempt)
        store.set(key, json.dumps(lobby.used))
        # Groups of threads each have a store of their own, and may open in the same process.
        place = id(store) if self.local else 0
        return f"moe_a2a/{hashlib.sha256(repr((lobby.used, place)).encode()).hexdigest()[:24]}"

    @property
    def store(self) -> Any:
        """The group's store, None for one rank; keys under `name` are this object's own."""
        return self._store

    @property
    def name(self) -> str:
        """Of this opening alone, the same on every rank."""
        return self._name

    @property
    def step(self) -> int:
        """How many exchanges there have been: the same on every rank between two of them."""
        return self._step

    def introduce(self, facts: dict[str, Any]) -> None:
        """Fills in ``facts``, by rank: what each says of itself, its host and free memory added."""
        own = {"host": host_identity(), "pid": os.getpid(), "memory": memory_available()}
        self.facts = self.exchange({**own, **facts})

    def exchange(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """All-gather of one JSON object per rank, in rank order.

        Raises:
            PeerTimeout: ``ranks`` did not come within the timeout.
        """
        if self._store is None:
            return [json.loads(json.dumps(message))]
        self._step += 1
        keys = [self._key(self._step, rank) for rank in range(self.size)]
        with self.store_errors():
            self._store.set(keys[self.rank], json.dumps(message))
            self._await({key: [rank] for rank, key in enumerate(keys)})
            messages = [json.loads(self._store.get(key)) for key in keys]
            # Everyone has posted this step, so everyone has read the one before.
            if self._step > 1:
                self._store.delete_key(self._key(self._step - 1, self.rank))
        return messages

    def wait_for(self, owners: Mapping[str, Sequence[int]], unless: str) -> None:
        """Until all of some keys are in the store.

        Args:
            owners: by key, the ranks it may come from.
            unless: a key whose value, once there, is why they will not come.

        Raises:
            PeerTimeout: ``ranks`` are the owners of what did not come within the timeout.
            StateError: ``unless`` came.
        """
        with self.store_errors():
            self._await(owners, unless)

    @contextmanager
    def store_errors(self) -> Iterator[None]:
        """Turns those of the store into `PeerTimeout`."""
        start = time.monotonic()
        try:
            yield
        except MoeA2AError:
            raise
        except RuntimeError as error:  # torch's DistError family: the host of the store has ended
            raise self._timeout(
                [rank for rank in range(self.size) if rank != self.rank],
                start,
                f"the group's store is gone ({error}): the process that hosts it has ended",
            ) from error

    def agree(self, problem: MoeA2AError | None) -> None:
        """Raises on every rank if any has a problem: its own there, one of its class elsewhere."""
        text = None if problem is None else str(problem)
        kind = type(problem).__name__
        replies = self.exchange({"problem": text, "kind": kind})
        if problem is not None:
            raise problem
        for rank, reply in enumerate(replies):
            if reply["problem"] is not None:
                raise _error_class(reply["kind"])(f"rank {rank}: {reply['problem']}")

    def _key(self, step: int, rank: int) -> str:
        return f"{self._name}/{step}/{rank}"

    def _await(self, owners: Mapping[str, Sequence[int]], unless: str | None = None) -> None:
        assert self._store is not None
        start, pause = time.monotonic(), 0.0005
        while not self._store.check(list(owners)):
            if unless is not None and self._store.check([unless]):
                raise StateError(self._store.get(unless).decode())
            if time.monotonic() - start > self.timeout:
                late = [ranks for key, ranks in owners.items() if not self._store.check([key])]
                missing = sorted({rank for ranks in late for rank in ranks})
                raise self._timeout(missing, start, "they did not go on opening")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def _timeout(self, missing: Sequence[int], start: float, why: str) -> PeerTimeout:
        waited = time.monotonic() - start
        return PeerTimeout(
            f"opening on rank {self.rank} of {self.size}: waited {waited:.1f} s (limit "
            f"{self.timeout:g} s) for ranks {', '.join(map(str, missing))}: {why}",
            ranks=missing,
            phase="open",
            round=0,
            waited=waited,
        )


def _error_class(kind: str) -> type[MoeA2AError]:
    """A class whose constructor takes a text alone."""
    from moe_a2a import errors

    simple = {"GeometryError", "WorkspaceError", "BuildError", "StateError"}
    found: type[MoeA2AError] = getattr(errors, kind) if kind in simple else errors.StateError
    return found
