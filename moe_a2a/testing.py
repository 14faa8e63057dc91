"""Real rank processes for collective tests, of this library and of what you build on it.

A rank function is a module-level function that gets a `RankContext` first; it runs in processes
that have torch loaded already and a gloo group between them:

    def add(ranks, x):
        total = torch.tensor([x * ranks.rank])
        torch.distributed.all_reduce(total, group=ranks.group)
        return total.item()

    with RankPool(4) as pool:
        assert pool.run(add, 10) == [60, 60, 60, 60]      # 2 to 10 ms once the pool is warm
        assert pool.run(add, 10, ranks=2) == [10, 10]     # the first two of them

`run_ranks` starts processes for one function only, which may die of it. Ranks run as forkserver
children on one host; as with every such start, a script needs its ``if __name__ == "__main__":``.

`run_local` runs ranks as threads of this process, on a GPU each with its own stream: what wants
many rounds on one GPU, or a sanitizer, is tested so.
"""

from __future__ import annotations

import contextlib
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
from torch._C._distributed_c10d import TCPStore  # where type checkers find it

from moe_a2a.local_ranks import LocalRank, run_local
from moe_a2a.rank_context import (
    AFTER_ERROR,
    Raised,
    RankContext,
    RankHung,
    RankRaised,
    seed_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess

__all__ = [
    "LocalRank",
    "RankContext",
    "RankDied",
    "RankExit",
    "RankHung",
    "RankPool",
    "RankRaised",
    "run_local",
    "run_ranks",
]

_PRELOAD = ("torch", "torch.distributed", "numpy", "tvm_ffi", "moe_a2a")
_STACKS = 0.5  # seconds to write stacks to a file


class RankExit(NamedTuple):
    """How a process of `run_ranks` ended: negative ``exitcode`` is a signal, 1 an exception, whose
    traceback is ``error``."""

    exitcode: int
    result: Any
    error: str | None


class RankDied(RuntimeError):
    """A process ended in the middle of a rank function."""

    def __init__(self, rank: int, exitcode: int | None) -> None:
        died_of = f"signal {-exitcode}" if exitcode and exitcode < 0 else f"exit code {exitcode}"
        super().__init__(f"rank {rank} died ({died_of})")
        self.rank, self.exitcode = rank, exitcode


class _Died(NamedTuple):
    exitcode: int | None


class RankPool:
    """``size`` rank processes that live until `close`; new ones after an exception, death or hang.

    Args:
        size: ranks; `run` may use fewer.
        timeout: default limit of a `run`, seconds.
        preload: modules to import once, before the processes are forked. They hold for the whole
            program: only the first pool's count.
    """

    def __init__(self, size: int, *, timeout: float = 60.0, preload: Sequence[str] = ()) -> None:
        self.size, self.timeout = size, timeout
        self._preload = preload
        self._crew: _Crew | None = None

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ranks: int | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """``fn(rank_context, *args)`` on the first ``ranks`` ranks; the results by rank.

        ``fn`` is picklable, that is defined at module level, and so are arguments and results.

        Raises:
            RankRaised, RankDied, RankHung.
        """
        size = self.size if ranks is None else ranks
        if not 1 <= size <= self.size:
            raise ValueError(f"ranks={ranks}: the pool has {self.size}")
        if self._crew is None:
            self._crew = _Crew(self.size, self._preload)
        limit = self.timeout if timeout is None else timeout
        answers: dict[int, Any] = {}
        try:
            self._crew.call(size, fn, args)
            answers = self._crew.collect(size, limit, until_death=True)
            self._judge(answers, size, limit)
        finally:
            # Ranks that raised may have left a collective halfway: the group is not to be trusted.
            clean = not any(isinstance(answer, (_Died, Raised)) for answer in answers.values())
            if len(answers) < size or not clean:
                self.close()
        return [answers[rank] for rank in range(size)]

    def _judge(self, answers: dict[int, Any], size: int, limit: float) -> None:
        assert self._crew is not None
        for rank, answer in sorted(answers.items()):
            if isinstance(answer, _Died):
                raise RankDied(rank, answer.exitcode)
        for rank, answer in answers.items():  # in the order in which they came: first cause first
            if isinstance(answer, Raised):
                raise RankRaised(rank, answer.text) from answer.exception
        late = [rank for rank in range(size) if rank not in answers]
        if late:
            raise RankHung(late, limit, self._crew.stacks(late))

    def close(self) -> None:
        """Ends the processes. The pool may be used again."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_ranks(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    preload: Sequence[str] = (),
) -> list[RankExit]:
    """``fn(rank_context, *args)`` in ``size`` processes of its own, any of which may die.

    Raises:
        RankHung: a rank neither returned nor died; all are killed.
    """
    crew = _Crew(size, preload)
    try:
        crew.call(size, fn, args)
        answers = crew.collect(size, timeout, until_death=False)
        late = [rank for rank in range(size) if rank not in answers]
        if late:
            raised = [
                f"rank {r} raised:\n{a.text}" for r, a in answers.items() if isinstance(a, Raised)
            ]
            raise RankHung(late, timeout, "\n".join([*raised, crew.stacks(late)]))
    finally:
        crew.kill()
    exits = []
    for rank in range(size):
        answer = answers[rank]
        if isinstance(answer, _Died):
            exits.append(RankExit(answer.exitcode or 0, None, None))
        elif isinstance(answer, Raised):
            exits.append(RankExit(1, None, answer.text))
        else:
            exits.append(RankExit(0, answer, None))
    return exits


class _Crew:
    """One generation of processes, their pipes, and the store at which they meet."""

    def __init__(self, size: int, preload: Sequence[str]) -> None:
        start = multiprocessing.get_context("forkserver")
        # What the server imports asks whether there is a GPU (tvm_ffi does). Asked of the driver,
        # that starts CUDA there, and no rank forked from it could use CUDA any more.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        start.set_forkserver_preload([*_PRELOAD, *preload])
        # Here, so that it outlives every rank; the port is the system's choice.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="moe_a2a_stacks_")
        self._groups = {size}
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(size):
            mine, theirs = start.Pipe()
            given = (theirs, rank, size, self._store.port, self._stack_file(rank))
            process = start.Process(target=_serve, args=given, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def call(self, size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if size not in self._groups:
            self._groups.add(size)
            for pipe in self._pipes:  # making a group is collective over all ranks
                self._send(pipe, pickle.dumps(("group", size)))
        message = bytes(ForkingPickler.dumps(("call", size, fn, args)))
        for pipe in self._pipes[:size]:
            self._send(pipe, message)

    def _send(self, pipe: Connection, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # collect() says who died
            pipe.send_bytes(message)

    def collect(self, size: int, timeout: float, *, until_death: bool) -> dict[int, Any]:
        """Answers by rank, in the order of arrival; without those that are late."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < size:
            waiting: dict[Any, int] = {}
            for rank in (rank for rank in range(size) if rank not in answers):
                waiting[self._pipes[rank]] = waiting[self._processes[rank].sentinel] = rank
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            for rank in dict.fromkeys(waiting[item] for item in ready):
                answers[rank] = self._answer(rank)
                if until_death and isinstance(answers[rank], _Died):
                    return answers
                if isinstance(answers[rank], Raised):
                    deadline = min(deadline, time.monotonic() + AFTER_ERROR)
            if not ready:
                break
        return answers

    def _answer(self, rank: int) -> Any:
        try:
            if self._pipes[rank].poll():
                return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            pass
        self._processes[rank].join(5)
        return _Died(self._processes[rank].exitcode)

    def stacks(self, ranks: Sequence[int]) -> str:
        for rank in ranks:
            process = self._processes[rank]
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(_STACKS)
        texts = [Path(self._stack_file(rank)).read_text() for rank in ranks]
        return "\n".join(f"rank {r}:\n{text}" for r, text in zip(ranks, texts, strict=True))

    def kill(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._folder.cleanup()

    def _stack_file(self, rank: int) -> str:
        return str(Path(self._folder.name) / str(rank))


def _serve(pipe: Connection, rank: int, size: int, port: int, stack_file: str) -> None:
    """The life of a rank process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    stacks = Path(stack_file).open("w")  # noqa: SIM115 - for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=60)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    groups: dict[int, Any] = {size: dist.group.WORLD}
    while True:
        try:
            kind, ranks, *call = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the parent has gone
            os._exit(0)
        except Exception as error:  # a function that can't be imported here
            _reply(pipe, Raised(traceback.format_exc(), error))
            continue
        if kind == "group":
            groups[ranks] = dist.new_group(list(range(ranks)), timeout=limit)
        else:
            _reply(pipe, _outcome(RankContext(rank, ranks, groups[ranks], 0), *call))


def _outcome(context: RankContext, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    seed = seed_of(fn)
    torch.manual_seed(seed + context.rank)
    try:
        return fn(context._replace(seed=seed), *args)
    except BaseException as error:  # pytest.fail() raises one that is no Exception
        return Raised(traceback.format_exc(), error)


def _reply(pipe: Connection, answer: Any) -> None:
    try:
        message = bytes(ForkingPickler.dumps(answer))
        pickle.loads(message)
    except Exception as problem:  # an exception, or a result, that does not survive the journey
        if isinstance(answer, Raised):
            answer = Raised(answer.text, None)
        else:
            answer = Raised(f"the result can't be sent: {problem!r}", None)
        message = pickle.dumps(answer)
    pipe.send_bytes(message)
