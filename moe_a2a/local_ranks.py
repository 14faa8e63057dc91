"""Ranks as threads of one process, on one GPU each with a stream of its own.

Their windows are plain allocations and a peer is microseconds away, where processes that share a
GPU wait a time slice for each other: what wants many rounds on one GPU, kernel timing or
compute-sanitizer is run so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import HashStore  # where type checkers find it

from moe_a2a.group import LocalRank
from moe_a2a.rank_context import (
    AFTER_ERROR,
    Raised,
    RankContext,
    RankHung,
    RankRaised,
    seed_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CUDA_SETTINGS", "LocalRank", "run_local"]

# Streams that share a hardware queue run one after the other (there are 8 by default), and a
# kernel that torch loads on first use waits for all that run: either way the kernel of a rank that
# waits for its peer could keep that peer from starting. The driver reads both once, when it starts.
CUDA_SETTINGS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}


def run_local(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    device: torch.device | str | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """``fn(rank_context, *args)`` in ``size`` threads of this process; the results by rank.

    ``fn`` opens an exchange by ``AllToAll(spec, ranks.group, ...)`` and uses it on its own thread
    only. Where ``device`` is a CUDA device each thread has it as the current device and a stream of
    its own as the current stream, which is synchronized before `run_local` returns.

    Beware of what waits for the whole device: ``cudaMalloc`` and ``cudaFree`` of one rank (a tensor
    larger than any that torch's allocator has kept, ``torch.cuda.empty_cache``) stall behind the
    kernel of another that waits for its peers; if such a peer is the one that is stalled, until
    the wait expires. So does a launch once some 1000 are queued, and it keeps the interpreter
    meanwhile: synchronize the stream every few dozen rounds. And so can copies between host and
    device, in line behind a copy whose own stream waits: synchronize before ``cpu()``. Threads
    share torch's random generator: draw from
    ``torch.Generator().manual_seed(ranks.seed + ranks.rank)``.

    Args:
        device: None is the CPU.
        timeout: of the whole call, seconds.

    Raises:
        RankRaised: the first exception. The others get 5 s more.
        RankHung: with the stacks of the late threads. A thread can't be ended: those live on, and
            so does what they hold, until they return or the process ends.
        RuntimeError: CUDA was started without ``CUDA_SETTINGS`` in the environment (where it has
            not been started, they are put there).
    """
    if size < 1:
        raise ValueError(f"size={size}: at least one rank")
    place = torch.device("cpu" if device is None else device)
    streams: list[torch.cuda.Stream | None] = [None] * size
    if place.type == "cuda":
        prepare_cuda()
        # One after the other: torch hands out a pool's streams in turn, so these are distinct.
        streams = [torch.cuda.Stream(place) for _ in range(size)]  # type: ignore[no-untyped-call]
    store, answers = HashStore(), SimpleQueue[tuple[int, Any]]()
    seed = seed_of(fn)
    threads = []
    for rank in range(size):
        context = RankContext(rank, size, LocalRank(rank, size, store), seed)
        given = (answers, context, streams[rank], fn, args)
        threads.append(threading.Thread(target=_serve, args=given, name=f"rank {rank}"))
        threads[-1].daemon = True  # one that hangs must not keep the interpreter from ending
    for thread in threads:
        thread.start()
    return _judge(_collect(answers, size, timeout), threads, timeout)


def prepare_cuda() -> None:
    """Puts `CUDA_SETTINGS` into the environment; an error where CUDA runs without them."""
    missing = {
        name: value for name, value in CUDA_SETTINGS.items() if os.environ.get(name) != value
    }
    if missing and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"run_local needs {' '.join(f'{k}={v}' for k, v in CUDA_SETTINGS.items())} in the "
            f"environment before CUDA starts; it has started without {' and '.join(missing)}. With "
            "fewer queues the waiting kernel of one rank would block its peers' streams."
        )
    os.environ.update(missing)


def _serve(
    answers: SimpleQueue[tuple[int, Any]],
    context: RankContext,
    stream: torch.cuda.Stream | None,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of a rank thread."""
    answer: Any
    try:
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            answer = fn(context, *args)
            if stream is not None:
                stream.synchronize()
    except BaseException as error:  # pytest.fail() raises one that is no Exception
        answer = Raised(traceback.format_exc(), error)
    answers.put((context.rank, answer))


def _collect(answers: SimpleQueue[tuple[int, Any]], size: int, timeout: float) -> dict[int, Any]:
    """Answers by rank, in the order of arrival; without those that are late."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < size:
        try:
            rank, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
        except Empty:
            break
        found[rank] = answer
        if isinstance(answer, Raised):
            deadline = min(deadline, time.monotonic() + AFTER_ERROR)
    return found


def _judge(answers: dict[int, Any], threads: list[threading.Thread], timeout: float) -> list[Any]:
    late = [rank for rank in range(len(threads)) if rank not in answers]
    stacks = _stacks(threads, late)
    for rank, answer in answers.items():  # in the order in which they came: first cause first
        if isinstance(answer, Raised):
            text = answer.text
            if late:
                text += f"\nranks {', '.join(map(str, late))} still run:\n{stacks}"
            raise RankRaised(rank, text) from answer.exception
    if late:
        raise RankHung(late, timeout, stacks)
    return [answers[rank] for rank in range(len(threads))]


def _stacks(threads: list[threading.Thread], ranks: list[int]) -> str:
    frames = sys._current_frames()
    texts = []
    for rank in ranks:
        frame = frames.get(threads[rank].ident or 0)
        lines = traceback.format_stack(frame) if frame is not None else ["  (returning)\n"]
        texts.append(f"rank {rank}:\n{''.join(lines)}")
    return "\n".join(texts)
