"""What every rank does in a run: for each point check every byte, then time.

Shape letters: T tokens of this rank, W ep_size.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moe_a2a.alltoall import AllToAll
from moe_a2a.bench.bound import METHODS, MemcpyBound, RowBytes
from moe_a2a.bench.cases import Sweep, row_traffic
from moe_a2a.bench.check import CheckFailed, Oracle, destinations, same_bytes
from moe_a2a.bench.events import Note, Progress, Results
from moe_a2a.bench.inputs import Inputs, InputSource, global_scale_of
from moe_a2a.bench.report import case_of
from moe_a2a.bench.rivals import RIVALS, Rival, Round
from moe_a2a.bench.timing import Timings, measure, slowest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_a2a.bench.events import Tell

__all__ = ["check_backend", "pinned", "run_points"]


def run_points(sweep: Sweep, tell: Tell) -> None:
    """Runs all points on this rank; rank 0's ``tell`` gets the results.

    Raises:
        CheckFailed: a wrong byte, before anything is timed at that point.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed renames collectives
    _Points(sweep, tell).run()


def check_backend(a2a: AllToAll, oracle: Oracle, inputs: Inputs, rows: int) -> torch.Tensor:
    """One round, every byte compared on the CPU. Returns the ``y`` [W, R, H] that it combined.

    ``inputs`` are on the exchange's device, and so is what is returned.

    Raises:
        CheckFailed: a byte is wrong.
    """
    scale = global_scale_of(a2a.spec.wire)
    received = a2a.dispatch(
        *inputs,
        runtime_max_tokens=rows,
        global_scale=None if scale is None else scale.to(a2a.device),
    )
    oracle.check_received(
        received.x.cpu(),
        None if received.scales is None else received.scales.cpu(),
        received.topk_ids.cpu(),
        received.topk_weights.cpu(),
        received.counts.cpu(),
    )
    y = oracle.expert_outputs(rows).to(a2a.device)
    oracle.check_combined(a2a.combine(y).cpu())
    return y


@contextmanager
def pinned(rank: int) -> Iterator[None]:
    """Keeps the calling thread to a core of its own; gloo's threads stay free."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[rank % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Points:
    def __init__(self, sweep: Sweep, tell: Tell) -> None:
        self._sweep, self._tell = sweep, tell
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._source = InputSource(sweep)
        self._cases: list[dict[str, Any]] = []
        self._done = 0
        per_wire = len(sweep.tokens) * (len(sweep.backends) + 1)
        self._total = per_wire * len(sweep.wires) + len(sweep.tokens) * (
            len(RIVALS) * self._has_rivals(sweep.wires)
        )

    def _has_rivals(self, wires: tuple[str, ...]) -> bool:
        return self._sweep.rivals and "bf16" in wires and self._sweep.combine_wire == "bf16"

    def run(self) -> None:
        if self._sweep.rivals and not self._has_rivals(self._sweep.wires):
            self._tell(Note("the rivals move bf16 both ways: they are skipped in this sweep"))
        for wire in self._sweep.wires:
            spec = self._sweep.spec(wire)
            with ExitStack() as stack:
                opened = [
                    stack.enter_context(AllToAll(spec, backend=name))
                    for name in self._sweep.backends
                ]
                if self._sweep.pinned:
                    # After opening: a backend may look at how many cores there are.
                    stack.enter_context(pinned(self._rank))
                for tokens in self._sweep.tokens:
                    self._point(wire, tokens, opened)
        self._tell(Results(self._cases))

    def _point(self, wire: str, tokens: int, opened: list[AllToAll]) -> None:
        spec = self._sweep.spec(wire)
        inputs = [self._source.of(rank, tokens, wire) for rank in range(self._size)]
        oracle = Oracle(spec, self._rank, inputs, f"wire {wire}, {tokens} tokens")
        for a2a in opened:
            self._backend(a2a, oracle, inputs[self._rank], tokens)
        if self._has_rivals((wire,)):
            for rival in RIVALS:
                self._rival(rival, oracle, inputs[self._rank], tokens)
        self._bound(oracle, inputs[self._rank], tokens)

    def _begin(self, name: str, oracle: Oracle) -> None:
        self._tell(Progress(self._done, self._total, f"{name}, {oracle.label}"))
        self._done += 1

    def _backend(self, a2a: AllToAll, oracle: Oracle, inputs: Inputs, tokens: int) -> None:
        self._begin(a2a.backend, oracle)
        label, oracle.label = oracle.label, f"{a2a.backend}, {oracle.label}"
        y = check_backend(a2a, oracle, inputs, tokens)
        out = torch.empty(tokens, a2a.spec.hidden_size, dtype=y.dtype)
        scale = global_scale_of(a2a.spec.wire)

        def dispatch() -> None:
            a2a.dispatch(*inputs, runtime_max_tokens=tokens, global_scale=scale)

        ranks = measure(dispatch, lambda: a2a.combine(y, out=out), self._sweep.effort)
        oracle.check_combined(out)  # the last round is still as right as the first
        oracle.label = label
        self._record("backend", a2a.backend, oracle, tokens, ranks)

    def _rival(self, kind: type[Rival], oracle: Oracle, inputs: Inputs, tokens: int) -> None:
        self._begin(kind.name, oracle)
        spec = oracle.spec
        goes = destinations(inputs.topk_ids, spec.num_experts, spec.ep_size)
        arriving = oracle.rows_between[:, self._rank].tolist()
        rival = kind(Round(inputs, goes, arriving, spec.num_experts, self._rank, self._size))
        rows, here = rival.dispatch(), rival.here()
        expected = torch.cat([source.x for source in oracle.received])
        where = f"{kind.name}, {oracle.label}: on rank {self._rank}"
        same_bytes("payload", expected, rows[here], where)
        y = torch.zeros_like(rows)
        outputs = [oracle.output_of(source, self._rank) for source in oracle.received]
        y[here] = torch.cat(outputs)
        rival.combine(y)
        if kind.exact:
            same_bytes("out", oracle.combined, rival.output(), where)
        elif not torch.allclose(oracle.combined.float(), rival.output().float(), 2**-6, 2**-4):
            raise CheckFailed(f"{where}: the output is off by more than the order of sums explains")
        ranks = measure(rival.dispatch, lambda: rival.combine(y), self._sweep.effort)
        self._record("rival", kind.name, oracle, tokens, ranks)

    def _bound(self, oracle: Oracle, inputs: Inputs, tokens: int) -> None:
        self._begin("memcpy bound", oracle)
        spec = oracle.spec
        nbytes = RowBytes(*row_traffic(spec), spec.hidden_size * oracle.combined.element_size())
        goes = destinations(inputs.topk_ids, spec.num_experts, spec.ep_size)
        arriving = oracle.rows_between[:, self._rank].tolist()
        bound = MemcpyBound(goes, arriving, nbytes, self._rank)
        found: dict[str, list[Timings]] = {}
        for method in METHODS:
            dist.barrier()
            found[method] = measure(*bound.calls(method), self._sweep.effort)
        best = min(METHODS, key=lambda method: slowest(found[method], "pair").median)
        self._record("bound", "memcpy bound", oracle, tokens, found[best], method=best)

    def _record(
        self,
        kind: str,
        name: str,
        oracle: Oracle,
        tokens: int,
        ranks: list[Timings],
        **more: str,
    ) -> None:
        self._cases.append({**case_of(kind, name, oracle, tokens, ranks), **more})
