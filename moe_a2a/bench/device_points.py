"""What every rank does in a run on GPUs: for each point check every byte, time, check again.

Shape letters: T tokens of this rank, W ep_size, R runtime_max_tokens, H hidden_size.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from moe_a2a.alltoall import AllToAll
from moe_a2a.bench.cases import Effort
from moe_a2a.bench.check import Oracle, destinations
from moe_a2a.bench.connect import shares_gpu
from moe_a2a.bench.device_check import check_rival
from moe_a2a.bench.events import Note, Progress, Results
from moe_a2a.bench.gpus import gpu_facts
from moe_a2a.bench.graphs import DeviceTimings, StartLine, measure_on_device
from moe_a2a.bench.inputs import Inputs, InputSource, global_scale_of
from moe_a2a.bench.link import Link, LinkLimits, no_link
from moe_a2a.bench.points import check_backend
from moe_a2a.bench.report import case_of
from moe_a2a.bench.rivals_cuda import (
    DeviceRival,
    DeviceRound,
    NcclAllToAll,
    NcclGather,
    SymmetricMemory,
)
from moe_a2a.bench.rivals_flashinfer import FlashInfer
from moe_a2a.bench.timing import Quantiles, slowest
from moe_a2a.formats import quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_a2a.bench.cases import Sweep
    from moe_a2a.bench.events import Tell
    from moe_a2a.spec import Spec

__all__ = ["DEVICE_RIVALS", "Programme", "attempt", "device_round", "run_programme"]

DEVICE_RIVALS: tuple[type[DeviceRival], ...] = (
    FlashInfer,
    NcclAllToAll,
    NcclGather,
    SymmetricMemory,
)
ResultT = TypeVar("ResultT")

_CAPTURED = ("nvlink",)  # backends whose calls CUDA graphs may hold
_THREADS = 8  # of a rank's oracle


class Programme(NamedTuple):
    """Sweeps of one group of ranks.

    Attributes:
        sweeps: of the same ep_size, on the device ``cuda``.
        seconds: after which no further point begins; None is never.
    """

    sweeps: tuple[Sweep, ...]
    seconds: float | None = None

    @property
    def ep_size(self) -> int:
        return self.sweeps[0].ep_size

    @property
    def device(self) -> str:
        return self.sweeps[0].device


def run_programme(programme: Programme, tell: Tell) -> None:
    """Runs all sweeps on this rank; rank 0's ``tell`` gets the results.

    Raises:
        CheckFailed: a wrong byte.
    """
    torch.set_num_threads(min(_THREADS, max(1, len(os.sched_getaffinity(0)) // programme.ep_size)))
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed renames collectives
    _Run(programme, tell, torch.device("cuda", torch.cuda.current_device())).run()


class _Run:
    def __init__(self, programme: Programme, tell: Tell, device: torch.device) -> None:
        self._programme, self._tell = programme, tell
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._line = StartLine(device)
        self._limits: LinkLimits | None = None
        self._cases: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self._done, self._left_out = 0, 0
        self._total = sum(len(s.wires) * len(s.tokens) for s in programme.sweeps)
        self._notes: list[str] = []

    def run(self) -> None:
        facts = gpu_facts(self._size)
        if shares_gpu():
            self._note(
                f"{self._size} ranks share {torch.cuda.device_count()} GPU(s): the bytes are "
                "checked, the times mean nothing, and there are no rivals"
            )
        else:
            self._measure_link()
        for sweep in self._programme.sweeps:
            source = InputSource(sweep)
            for wire in sweep.wires:
                self._wire(sweep, wire, source)
        if self._left_out:
            self._note(f"{self._left_out} points were left out: the time was up")
        limits = None if self._limits is None else self._limits.as_dict()
        self._tell(Results(self._cases, {**facts, "link": limits, "notes": self._notes}))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            self._tell(Note(text))

    def _measure_link(self) -> None:
        reason = no_link(self._size)
        if reason is not None:
            self._note(reason)
            return
        without = "no link floor"
        link = self._attempt(without, lambda: Link(self._device))
        if link is None:
            return
        self._line.exchange = link.meet
        self._limits = self._attempt(without, lambda: link.limits(self._line))
        if self._limits is None:
            self._line.exchange = None

    def _wire(self, sweep: Sweep, wire: str, source: InputSource) -> None:
        if self._late():
            self._left_out += len(sweep.tokens)
            return
        spec = sweep.spec(wire)
        rivals = [] if shares_gpu() or not sweep.rivals else self._usable(sweep, spec)
        with ExitStack() as stack:
            opened = [
                stack.enter_context(
                    AllToAll(spec, backend=name, device=self._device, max_blocks=sweep.max_blocks)
                )
                for name in sweep.backends
            ]
            for tokens in sweep.tokens:
                if self._late():
                    self._left_out += 1
                    continue
                inputs = [source.of(rank, tokens, wire) for rank in range(self._size)]
                oracle = Oracle(spec, self._rank, inputs, f"wire {wire}, {tokens} tokens")
                self._begin(sweep, oracle)
                own = Inputs(*(tensor.to(self._device) for tensor in inputs[self._rank]))
                for a2a in opened:
                    self._backend(sweep, a2a, oracle, own, tokens)
                if rivals:
                    round = device_round(oracle, inputs[self._rank], own, self._rank, tokens)
                    rivals = [kind for kind in rivals if self._rival(sweep, kind, oracle, round)]
                self._bound(sweep, oracle, tokens)
        gc.collect()  # the graphs, and the memory that they keep

    def _begin(self, sweep: Sweep, oracle: Oracle) -> None:
        self._tell(Progress(self._done, self._total, f"{sweep.label} {oracle.label}".strip()))
        self._done += 1

    def _late(self) -> bool:
        """Rank 0's clock decides for all."""
        limit = self._programme.seconds
        late = [limit is not None and time.monotonic() - self._start > limit]
        dist.broadcast_object_list(late, src=0)
        return late[0]

    def _usable(self, sweep: Sweep, spec: Spec) -> list[type[DeviceRival]]:
        found = []
        for kind in DEVICE_RIVALS:
            if sweep.only is not None and kind.name not in sweep.only:
                continue
            reasons: list[str | None] = [None] * self._size
            dist.all_gather_object(reasons, kind.unusable(spec))
            reason = next((text for text in reasons if text is not None), None)
            if reason is None:
                found.append(kind)
            else:
                self._note(f"{kind.name} is skipped, wire {spec.wire}: {reason}")
        return found

    def _backend(
        self, sweep: Sweep, a2a: AllToAll, oracle: Oracle, inputs: Inputs, tokens: int
    ) -> None:
        label, oracle.label = oracle.label, f"{a2a.backend}, {oracle.label}"
        y = check_backend(a2a, oracle, inputs, tokens)
        scale = global_scale_of(a2a.spec.wire)
        scale = None if scale is None else scale.to(self._device)
        out = torch.full_like(oracle.combined, float("nan"), device=self._device)

        def dispatch() -> None:
            a2a.dispatch(*inputs, runtime_max_tokens=tokens, global_scale=scale)

        def combine() -> None:
            a2a.combine(y, out=out)

        ranks = self._measure(dispatch, combine, sweep, a2a.backend in _CAPTURED)
        torch.cuda.synchronize()
        oracle.check_combined(out.cpu())  # what the last round timed left
        check_backend(a2a, oracle, inputs, tokens)
        oracle.label = label
        self._record("backend", a2a.backend, sweep, oracle, tokens, ranks)

    def _measure(
        self, dispatch: Any, combine: Any, sweep: Sweep, captured: bool
    ) -> list[DeviceTimings]:
        dist.barrier()
        effort, pairs = sweep.effort, sweep.pairs
        if shares_gpu():  # every wait for a peer is a time slice; the figures say nothing anyway
            effort, pairs = Effort(2, 0.0, 1), 1
        return measure_on_device(dispatch, combine, effort, pairs, self._line, captured)

    def _rival(
        self, sweep: Sweep, kind: type[DeviceRival], oracle: Oracle, round: DeviceRound
    ) -> bool:
        """Whether it came through; a rival that fails is told and ends nothing."""

        def opened() -> DeviceRival:
            rival = kind(round)
            check_rival(rival, oracle)
            return rival

        where = f"{kind.name}, {oracle.label}"
        rival = self._attempt(f"{where}: skipped from here on", opened)
        if rival is None:
            return False
        dispatch, combine = rival.dispatch, rival.combine
        ranks = None
        if kind.captured:
            graphs = partial(self._measure, dispatch, combine, sweep, True)
            ranks = self._attempt(f"{where}: not in CUDA graphs", graphs)
        if ranks is None:
            eager = partial(self._measure, dispatch, combine, sweep, False)
            ranks = self._attempt(f"{where}: not timed", eager)
        checked = self._attempt(
            f"{where}: wrong after it was timed", partial(_again, rival, oracle)
        )
        rival.close()
        if ranks is None or not checked:
            return False
        self._record("rival", kind.name, sweep, oracle, round.rows, ranks)
        return True

    def _attempt(self, what: str, call: Callable[[], ResultT]) -> ResultT | None:
        """What ``call`` returns; None where it failed on any rank, and that is told."""
        result, said = attempt(call)
        if said is not None:
            self._note(f"{what}: {said}")
        return result

    def _bound(self, sweep: Sweep, oracle: Oracle, tokens: int) -> None:
        if self._limits is None:
            return
        case = case_of("bound", "link floor", oracle, tokens, [_NOTHING] * self._size)
        there = case["dispatch_bytes"]
        back = case["pair_bytes"] - there
        times = self._limits.floor(there), self._limits.floor(back)
        for part, value in zip(("dispatch", "combine", "pair"), (*times, sum(times)), strict=True):
            case[f"{part}_us"] = Quantiles(value, value, value)._asdict()
        case["per_rank"] = []
        self._add(case, sweep)

    def _record(
        self,
        kind: str,
        name: str,
        sweep: Sweep,
        oracle: Oracle,
        tokens: int,
        ranks: Sequence[DeviceTimings],
    ) -> None:
        case = case_of(kind, name, oracle, tokens, ranks)
        host = {p: slowest(ranks, f"host_{p}").median for p in ("dispatch", "combine")}
        self._add({**case, "host_us": host, "captured": ranks[0].captured}, sweep)

    def _add(self, case: dict[str, Any], sweep: Sweep) -> None:
        shape = {key: getattr(sweep.geometry, key) for key in ("hidden_size", "num_experts")}
        more = {"top_k": sweep.geometry.top_k, "max_blocks": sweep.max_blocks}
        self._cases.append({"sweep": sweep.label, **shape, **more, **case})


def attempt(call: Callable[[], ResultT]) -> tuple[ResultT | None, str | None]:
    """What ``call`` returns, or None and what the first rank that failed has to say. Collective."""
    result, problem = None, None
    try:
        result = call()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    said = next((text for text in problems if text is not None), None)
    return (result, None) if said is None else (None, said)


_NO_TIME = Quantiles(0.0, 0.0, 0.0)
_NOTHING = DeviceTimings(_NO_TIME, _NO_TIME, _NO_TIME, _NO_TIME, _NO_TIME, 0, False)


def _again(rival: DeviceRival, oracle: Oracle) -> bool:
    check_rival(rival, oracle)
    return True


def device_round(
    oracle: Oracle, inputs: Inputs, own: Inputs, rank: int, tokens: int
) -> DeviceRound:
    """``inputs`` on the CPU and ``own`` on the GPU are the same."""
    spec, device = oracle.spec, own.x.device
    payload, scales = quantize(
        inputs.x, spec.wire, alignment=spec.alignment, global_scale=global_scale_of(spec.wire)
    )
    return DeviceRound(
        payload.to(device),
        None if scales is None else scales.to(device),
        own.topk_ids,
        own.topk_weights,
        destinations(inputs.topk_ids, spec.num_experts, spec.ep_size),
        oracle.rows_between[:, rank].tolist(),
        tokens,
        spec,
        rank,
    )
