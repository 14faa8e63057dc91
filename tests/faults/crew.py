"""Rank processes any of which may die: a call replaces those that did, the others live on.

`moe_a2a.testing.run_ranks` starts processes for one function, which costs a second or two;
here only the dead cost something, and whoever survives many calls shows what leaks.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from moe_a2a.rank_context import Raised, RankContext, RankHung, seed_of
from moe_a2a.testing import RankExit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess

PRELOAD = ("torch", "torch.distributed", "numpy", "tvm_ffi", "moe_a2a")
OPENING = timedelta(seconds=60)  # of a group


class Seat(NamedTuple):
    process: BaseProcess
    pipe: Connection


class Crew:
    """Up to `size` processes, which begin when they are first needed."""

    def __init__(self, size: int, preload: Sequence[str] = ()) -> None:
        self._start = multiprocessing.get_context("forkserver")
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as in moe_a2a.testing
        self._start.set_forkserver_preload([*PRELOAD, *preload])
        # Here, so that it outlives every rank; the port is the system's choice.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="moe_a2a_stacks_")
        self._seats: list[Seat | None] = [None] * size
        self._calls = 0

    def run(
        self,
        size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        seats: Sequence[int] | None = None,
    ) -> list[RankExit]:
        """``fn(rank_context, *args)`` on `size` ranks, of a group of their own, any of which may
        die; rank r sits on ``seats[r]``.

        Raises:
            RankHung: a rank neither returned nor died; all are killed.
        """
        seats = list(range(size)) if seats is None else seats
        crew = [self._seat(number) for number in seats]
        self._calls += 1
        for rank, seat in enumerate(crew):
            message = ForkingPickler.dumps((self._calls, rank, size, fn, args))
            with contextlib.suppress(BrokenPipeError):  # _answer() says who died
                seat.pipe.send_bytes(bytes(message))
        answers = self._collect(crew, timeout)
        late = [rank for rank in range(size) if rank not in answers]
        if late:
            raised = [f"rank {r} raised:\n{a.error}" for r, a in answers.items() if a.error]
            text = "\n".join([*raised, self._stacks({rank: seats[rank] for rank in late})])
            self.close()
            raise RankHung(late, timeout, text)
        for rank, number in enumerate(seats):
            # One that raised may have left anything behind: it is not to be trusted.
            if answers[rank].exitcode:
                self._dismiss(number)
        return [answers[rank] for rank in range(size)]

    def pids_by_seat(self) -> dict[int, int]:
        return {n: seat.process.pid or 0 for n, seat in enumerate(self._seats) if seat is not None}

    def close(self) -> None:
        """Ends the processes, stopped ones too. The crew may be used again."""
        for number, seat in enumerate(self._seats):
            if seat is not None:
                self._dismiss(number)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._folder.cleanup()

    def _seat(self, number: int) -> Seat:
        seat = self._seats[number]
        if seat is not None and seat.process.is_alive():
            return seat
        if seat is not None:
            self._dismiss(number)
        mine, theirs = self._start.Pipe()
        given = (theirs, self._store.port, self._stack_file(number))
        process = self._start.Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()
        self._seats[number] = seat = Seat(process, mine)
        return seat

    def _dismiss(self, number: int) -> None:
        seat, self._seats[number] = self._seats[number], None
        assert seat is not None
        seat.pipe.close()
        seat.process.kill()
        seat.process.join()
        seat.process.close()

    def _collect(self, crew: list[Seat], timeout: float) -> dict[int, RankExit]:
        answers: dict[int, RankExit] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(crew):
            waiting: dict[Any, int] = {}
            for rank in (rank for rank in range(len(crew)) if rank not in answers):
                waiting[crew[rank].pipe] = waiting[crew[rank].process.sentinel] = rank
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            for rank in dict.fromkeys(waiting[item] for item in ready):
                answers[rank] = _answer(crew[rank])
            if not ready:
                break
        return answers

    def _stacks(self, late: dict[int, int]) -> str:
        for number in late.values():
            seat = self._seats[number]
            if seat is not None and seat.process.is_alive() and seat.process.pid:
                os.kill(seat.process.pid, signal.SIGUSR1)
                os.kill(seat.process.pid, signal.SIGCONT)
        time.sleep(0.5)
        texts = [
            (rank, Path(self._stack_file(number)).read_text()) for rank, number in late.items()
        ]
        return "\n".join(f"rank {rank}:\n{text}" for rank, text in texts)

    def _stack_file(self, number: int) -> str:
        return str(Path(self._folder.name) / str(number))


def _answer(seat: Seat) -> RankExit:
    try:
        if seat.pipe.poll():
            answer = pickle.loads(seat.pipe.recv_bytes())
            if isinstance(answer, Raised):
                return RankExit(1, None, answer.text)
            return RankExit(0, answer, None)
    except (EOFError, ConnectionError):
        pass
    seat.process.join(5)
    return RankExit(seat.process.exitcode or 0, None, None)


def _serve(pipe: Connection, port: int, stack_file: str) -> None:
    """The life of a rank process."""
    # One that is stopped would outlive a parent that was killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    stacks = Path(stack_file).open("w")  # noqa: SIM115 - for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=OPENING)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # the parent has gone
            os._exit(0)
        answer = _outcome(store, message)
        try:
            pipe.send_bytes(bytes(ForkingPickler.dumps(answer)))
        except Exception as problem:
            pipe.send_bytes(pickle.dumps(Raised(f"the result can't be sent: {problem!r}", None)))


def _outcome(store: TCPStore, message: bytes) -> Any:
    try:
        call, rank, size, fn, args = pickle.loads(message)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"call {call}", store),
            rank=rank,
            world_size=size,
            timeout=OPENING,
        )
        seed = seed_of(fn)
        torch.manual_seed(seed + rank)
        try:
            return fn(RankContext(rank, size, dist.group.WORLD, seed), *args)
        finally:
            dist.destroy_process_group()
    except BaseException:  # pytest.fail() raises one that is no Exception
        return Raised(traceback.format_exc(), None)
