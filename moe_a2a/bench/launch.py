"""Ranks: those that torchrun started, or processes of our own that the parent watches over.

Ctrl-C reaches every process of the terminal's group. The ranks never see it: they start with it
blocked, and the parent ends them. A rank whose parent is gone ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing import connection, forkserver, resource_tracker
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_a2a.bench.cases import UsageError
from moe_a2a.bench.check import CheckFailed
from moe_a2a.bench.connect import connect
from moe_a2a.bench.events import Failed
from moe_a2a.errors import MoeA2AError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerProcess

    from moe_a2a.bench.events import Event, Tell

__all__ = ["RankFailed", "join_torchrun", "start_ranks", "torchrun_place"]

_GRACE = 0.5  # seconds in which the cause of a failure may be heard after its consequences
_END = 1.0  # seconds that a rank has to end when told to
_KNOWN = (MoeA2AError, CheckFailed, UsageError)


class Work(Protocol):
    """What ranks are started for: picklable."""

    @property
    def ep_size(self) -> int: ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...


WorkT = TypeVar("WorkT", bound=Work)


class RankFailed(Exception):
    """A rank gave up or died; the text names it."""


class _Place(NamedTuple):
    rank: int
    size: int
    port: int


class _Watched(NamedTuple):
    rank: int
    process: ForkServerProcess
    ear: connection.Connection[Any, Any]


def torchrun_place() -> tuple[int, int] | None:
    """(RANK, WORLD_SIZE) of the environment; None where torchrun did not start this process.

    Raises:
        UsageError: they are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise UsageError(
            f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r} in the "
            "environment: expected two numbers, as torchrun sets them"
        ) from None


def join_torchrun(body: Callable[[WorkT, Tell], None], work: WorkT, show: Tell) -> None:
    """Runs ``body`` as the rank that torchrun made this process; rank 0 shows.

    Raises:
        RankFailed: this rank did.
    """
    connect(work.device)
    rank = dist.get_rank()
    try:
        body(work, show if rank == 0 else lambda event: None)
        dist.destroy_process_group()
    except Exception as error:
        raise RankFailed(f"rank {rank}: {_describe(error)}") from error


def start_ranks(body: Callable[[WorkT, Tell], None], work: WorkT, show: Tell) -> None:
    """Runs ``body`` in ``work.ep_size`` processes until all have ended well.

    Raises:
        RankFailed: with the first cause; the other ranks have been ended.
    """
    # The parent holds the store: no rank's death takes it away, and port 0 is the kernel's choice.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, body.__module__])  # that of a script is not found
    ranks: list[_Watched] = []
    try:
        _start_forkserver()
        for rank in range(work.ep_size):
            ear, mouth = context.Pipe(duplex=False)
            place = _Place(rank, work.ep_size, store.port)
            process = context.Process(
                target=_rank_main, args=(body, work, place, mouth), daemon=True
            )
            process.start()
            mouth.close()
            ranks.append(_Watched(rank, process, ear))
        _supervise(ranks, show)
    finally:
        _end(ranks)


def _start_forkserver() -> None:
    """With SIGINT blocked, which it hands down to the ranks. A Ctrl-C meanwhile is heard after."""
    resource_tracker.ensure_running()  # first: its own start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rank_main(
    body: Callable[[WorkT, Tell], None],
    work: WorkT,
    place: _Place,
    mouth: connection.Connection[Any, Any],
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not resolve
    try:
        store = TCPStore("127.0.0.1", place.port, is_master=False)
        connect(work.device, place.rank, place.size, store)
        body(work, mouth.send if place.rank == 0 else lambda event: None)
        if work.device == "cuda":
            # Windows, graphs and NCCL would have to go in the right order on all ranks, which can
            # hang. The driver takes everything back from a process that ends.
            dist.barrier()
            os._exit(0)
        dist.destroy_process_group()
    except Exception as error:
        mouth.send(Failed(_describe(error)))
        mouth.close()
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _describe(error: Exception) -> str:
    """The sentence of an expected error; where an unexpected one came from, too."""
    if isinstance(error, _KNOWN):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119 - a str, for display
    return f"{type(error).__name__} at {place}: {error}"


def _supervise(ranks: list[_Watched], show: Tell) -> None:
    """Shows what the ranks tell until all have ended."""
    listening = {watched.ear: watched for watched in ranks}
    while listening:
        for ear in connection.wait(list(listening)):
            event = _hear(ear)
            watched = listening[ear]  # type: ignore[index]
            if isinstance(event, Failed) or (event is None and not _ended_well(watched)):
                raise RankFailed(_cause(watched, event, list(listening.values())))
            if event is None:
                del listening[watched.ear]
            else:
                show(event)


def _hear(ear: Any) -> Event | None:
    """The next event; None at the end of the process."""
    try:
        event: Event = ear.recv()
    except (EOFError, OSError):
        return None
    return event


def _ended_well(watched: _Watched) -> bool:
    watched.process.join(_END)
    return watched.process.exitcode == 0


def _cause(first: _Watched, event: Event | None, ranks: list[_Watched]) -> str:
    """What to say of a failure: a rank that died without a word, whoever spoke first."""
    said = {first.rank: event}
    waiting = {watched.ear: watched for watched in ranks if watched is not first}
    deadline = time.monotonic() + _GRACE
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ear in connection.wait(list(waiting), left):
            watched = waiting[ear]  # type: ignore[index]
            heard = _hear(ear)
            if heard is None or isinstance(heard, Failed):
                del waiting[watched.ear]
                if heard is not None or not _ended_well(watched):
                    said[watched.rank] = heard
    by_rank = {watched.rank: watched for watched in ranks}
    for rank, last in said.items():
        if not isinstance(last, Failed):
            return f"rank {rank} {_death(by_rank[rank].process)}"
    assert isinstance(event, Failed)
    return f"rank {first.rank}: {event.message}"


def _death(process: ForkServerProcess) -> str:
    code = process.exitcode
    if code is None:
        return "went silent without ending"
    if code >= 0:
        return f"ended with exit code {code} and without a word"
    return f"was ended by {signal.Signals(-code).name}"


def _end(ranks: list[_Watched]) -> None:
    """Ends whoever still runs; an impatient second Ctrl-C must not stop that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for watched in ranks:
            if watched.process.is_alive():
                watched.process.terminate()
        deadline = time.monotonic() + _END
        for watched in ranks:
            watched.process.join(max(deadline - time.monotonic(), 0))
            if watched.process.is_alive():
                watched.process.kill()
                watched.process.join()
            watched.ear.close()
    finally:
        signal.signal(signal.SIGINT, before)
