"""The store through which torch's symmetric memory exchanges the handles of one window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._C._distributed_c10d import Store  # where type checkers find it

if TYPE_CHECKING:
    from datetime import timedelta

    from moe_a2a.group import Group

__all__ = ["WindowStore"]


class WindowStore(Store):
    """The group's store, with numbers of its own in the keys.

    torch writes ``CUDASymmetricMemory/N/RANK``, and N counts the exchanges that this process has
    been in with any group: ranks with different pasts would wait for keys that never come. Here
    the first N that comes up is 0, the next one 1, whatever they are, as all ranks of the window
    go through the same exchanges in the same order.

    C++ code that holds the store calls these methods as long as this object lives. Their errors
    pass through it: `PeerTimeout` for ranks that a key did not come from within the group's
    timeout, `StateError` where another rank has called `fail`.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group
        self._prefix = f"{group.name}/window/{group.step}"
        self._failed = f"{self._prefix}/failed"
        self._numbers: dict[str, int] = {}
        self._mine: set[str] = set()

    def set(self, key: str, value: bytes | str) -> None:
        self._mine.add(self._key(key))
        with self._group.store_errors():
            self._group.store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        with self._group.store_errors():
            return [self._group.store.get(self._key(key)) for key in keys]

    def add(self, key: str, value: int) -> int:
        self._mine.add(self._key(key))
        with self._group.store_errors():
            return int(self._group.store.add(self._key(key), value))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """The limit is the group's, whatever torch's is: that may be longer than anyone waits."""
        owners = {self._key(key): self._owners(key) for key in keys}
        self._group.wait_for(owners, unless=self._failed)

    def fail(self, text: str) -> None:
        """Ends the waits of the other ranks."""
        with self._group.store_errors():
            self._group.store.set(self._failed, text)

    def clear(self) -> None:
        """Deletes what this rank has set; all ranks must have read it."""
        with self._group.store_errors():
            for key in self._mine:
                self._group.store.delete_key(key)

    def _key(self, key: str) -> str:
        name, _, rest = key.partition("/")
        number, slash, rest = rest.partition("/")
        exchange = self._numbers.setdefault(f"{name}/{number}", len(self._numbers))
        return f"{self._prefix}/{name}/{exchange}{slash}{rest}"

    def _owners(self, key: str) -> list[int]:
        """The rank that a key names; all others for that which the last one at a barrier sets."""
        rank = key.rpartition("/")[2]
        if rank in map(str, range(self._group.size)):
            return [int(rank)]
        return [rank for rank in range(self._group.size) if rank != self._group.rank]
