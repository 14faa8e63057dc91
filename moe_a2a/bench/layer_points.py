"""What every rank does in a run of whole layers: for each point check, time, check again.

T tokens of this rank, H hidden_size, W ep_size.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a import experts
from moe_a2a.alltoall import AllToAll
from moe_a2a.bench.cases import Effort, UsageError
from moe_a2a.bench.check import Oracle
from moe_a2a.bench.connect import shares_gpu
from moe_a2a.bench.device_points import attempt, device_round
from moe_a2a.bench.events import Note, Progress, Results
from moe_a2a.bench.gpus import gpu_facts
from moe_a2a.bench.graphs import StartLine
from moe_a2a.bench.inputs import Inputs, InputSource, global_scale_of
from moe_a2a.bench.layer_check import check_layer, drawn_weights, expected, normalized
from moe_a2a.bench.layer_report import layer_case
from moe_a2a.bench.layer_rivals import FlashInferLayer, GatherLayer, OwnLayer, TimedLayer
from moe_a2a.bench.layer_timing import measure_layer
from moe_a2a.bench.points import check_backend, pinned
from moe_a2a.bench.rivals_flashinfer import FlashInfer
from moe_a2a.experts.selection import load
from moe_a2a.moe_layer import MoELayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_a2a.bench.events import Tell
    from moe_a2a.bench.layer import LayerSweep
    from moe_a2a.bench.layer_timing import LayerTimings
    from moe_a2a.experts import Experts
    from moe_a2a.spec import Spec

__all__ = ["run_layers"]

_THREADS = 8  # of a rank on a machine with GPUs


class _Point(NamedTuple):
    """inputs: of every rank, on the CPU; own: this rank's, on the device; wanted: [T, H]."""

    tokens: int
    inputs: list[Inputs]
    own: Inputs
    wanted: Tensor


def run_layers(sweep: LayerSweep, tell: Tell) -> None:
    """Runs all points on this rank; rank 0's ``tell`` gets the results.

    Raises:
        CheckFailed: a wrong byte, or an output too far from the layer in float64.
        UsageError: the routing file does not fit, or no expert backend can be used.
    """
    on_gpu = sweep.device == "cuda"
    cores = len(os.sched_getaffinity(0)) // sweep.ep_size
    torch.set_num_threads(min(_THREADS, max(1, cores)) if on_gpu else 1)
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed renames collectives
    warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it is a prototype
    place = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
    _Layers(sweep, tell, torch.device(place)).run()


class _Layers:
    def __init__(self, sweep: LayerSweep, tell: Tell, device: torch.device) -> None:
        self._layer, self._sweep, self._tell, self._device = sweep, sweep.sweep, tell, device
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._on_gpu, self._shares = device.type == "cuda", device.type == "cuda" and shares_gpu()
        self._line = StartLine(device) if self._on_gpu else None
        self._weights = drawn_weights(sweep, self._rank, device)
        self._points: dict[tuple[int, torch.dtype], _Point] = {}
        self._source = InputSource(self._sweep)
        self._cases: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._done = self._total = 0

    def run(self) -> None:
        facts = gpu_facts(self._size) if self._on_gpu else {}
        if self._shares:
            self._note("the ranks share a GPU: the times mean nothing, and there are no rivals")
        plan = [(spec, name) for wire in self._sweep.wires for spec, name in self._usable(wire)]
        if not plan:
            raise UsageError(f"no expert backend is left: {'; '.join(self._notes)}")
        rivals = self._sweep.rivals and not self._shares
        if rivals and "bf16" not in self._sweep.wires:
            self._note("the all-gather moves bf16: it is left out without that wire")
        per_wire = len(self._sweep.backends) + (rivals and self._on_gpu)
        points = sum(per_wire + (rivals and spec.wire == "bf16") for spec, _ in plan)
        self._total = points * len(self._sweep.tokens)
        for spec, name in plan:
            self._experts(spec, load(name)(spec, self._device, self._weights), rivals)
        self._tell(Results(self._cases, {**facts, "notes": self._notes}))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            self._tell(Note(text))

    def _usable(self, wire: str) -> list[tuple[Spec, str]]:
        """Expert backends that every rank can use, each with the exchange it wants."""
        found = []
        wanted = self._layer.backends or [
            name for name in experts.EXPERTS if self._device.type in load(name).device_types
        ]
        for name in wanted:
            spec = self._sweep.spec(wire)
            if load(name).expects_unquantized_inputs and spec.quantized:
                spec = replace(spec, allow_defer=True)
            own = experts.reasons(spec, self._device, self._weights)[name]
            reason = self._first(own)
            if reason is None:
                found.append((spec, name))
            else:
                self._note(f"experts {name} are skipped, wire {wire}: {reason}")
        return found

    def _first(self, own: str | None) -> str | None:
        """What the first rank that has something to say says, on all."""
        said: list[str | None] = [None] * self._size
        dist.all_gather_object(said, own)
        return next((text for text in said if text is not None), None)

    def _experts(self, spec: Spec, backend: Experts, rivals: bool) -> None:
        with ExitStack() as stack:
            opened = [
                stack.enter_context(
                    AllToAll(
                        spec, backend=name, device=self._device, max_blocks=self._sweep.max_blocks
                    )
                )
                for name in self._sweep.backends
            ]
            if self._sweep.pinned:
                stack.enter_context(pinned(self._rank))
            for tokens in self._sweep.tokens:
                point = self._point(tokens, spec)
                for a2a in opened:
                    self._own(a2a, backend, point)
                if rivals and spec.wire == "bf16":  # what it moves, whatever our wire is
                    self._gather(spec, backend, point)
                if rivals and self._on_gpu:
                    self._flashinfer(spec, backend, point)

    def _point(self, tokens: int, spec: Spec) -> _Point:
        dtype = torch.float16 if spec.wire == "fp16" else torch.bfloat16
        if (tokens, dtype) not in self._points:
            drawn = (self._source.of(rank, tokens, spec.wire) for rank in range(self._size))
            inputs = [normalized(one) for one in drawn]
            own = Inputs(*(part.to(self._device) for part in inputs[self._rank]))
            first = spec.experts_of(self._rank).start
            wanted = expected(inputs, self._weights, first, self._rank)
            self._points[tokens, dtype] = _Point(tokens, inputs, own, wanted)
        return self._points[tokens, dtype]

    def _own(self, a2a: AllToAll, backend: Experts, point: _Point) -> None:
        where = self._begin(a2a.backend, backend, a2a.spec.wire, point)
        oracle = Oracle(a2a.spec, self._rank, point.inputs, where)
        check_backend(a2a, oracle, point.own, point.tokens)  # every byte of the exchange
        scale = global_scale_of(a2a.spec.wire)
        scale = None if scale is None else scale.to(self._device)
        x, ids, router = point.own
        whole = MoELayer(a2a, experts=backend)(
            x, router, ids, runtime_max_tokens=point.tokens, global_scale=scale
        )
        self._check(whole, a2a.spec, point, where)
        layer = OwnLayer(a2a, backend, point.own, point.tokens, scale)
        self._measure("backend", a2a.backend, backend, a2a.spec, point, layer, where)

    def _gather(self, spec: Spec, backend: Experts, point: _Point) -> None:
        name = "NCCL all-gather" if self._on_gpu else "gloo all-gather"
        where = self._begin(name, backend, spec.wire, point)
        layer = GatherLayer(spec, self._rank, backend, point.own)
        self._measure("rival", name, backend, spec, point, layer, where)

    def _flashinfer(self, spec: Spec, backend: Experts, point: _Point) -> None:
        where = self._begin(FlashInfer.name, backend, spec.wire, point)
        reason = FlashInfer.unusable(spec)
        if backend.expects_unquantized_inputs and spec.quantized:
            reason = "these experts quantize by themselves, and it moves what it is given"
        if (reason := self._first(reason)) is not None:
            self._note(f"{FlashInfer.name} is skipped, wire {spec.wire}: {reason}")
            return
        oracle = Oracle(spec, self._rank, point.inputs, where)
        own = point.inputs[self._rank]
        round = device_round(oracle, own, point.own, self._rank, point.tokens)
        scale = global_scale_of(spec.wire)
        scale = None if scale is None else scale.to(self._device)

        def opened() -> tuple[FlashInfer, TimedLayer]:
            rival = FlashInfer(round, cleared=True)
            layer = FlashInferLayer(rival, round, backend, scale)
            self._play(layer, spec, point, where)
            return rival, layer

        # A rival that fails is told and ends nothing. Ranks compare notes after each step, so that
        # none waits in the next one for a rank that has given up.
        found, said = attempt(opened)
        if found is not None:
            rival, layer = found
            ranks, said = attempt(lambda: self._time(layer))
            if ranks is not None:
                said = attempt(lambda: self._check(layer.output(), spec, point, where))[1]
            rival.close()
            if ranks is not None and said is None:
                self._record("rival", FlashInfer.name, backend, spec, point, ranks)
        if said is not None:
            self._note(f"{where}: {said}")

    def _begin(self, name: str, backend: Experts, wire: str, point: _Point) -> str:
        where = f"{name}, {backend.name}, wire {wire}, {point.tokens} tokens"
        self._tell(Progress(self._done, self._total, where))
        self._done += 1
        return where

    def _check(self, out: Tensor, spec: Spec, point: _Point, where: str) -> None:
        formats = (spec.wire, self._layer.weights)
        check_layer(out, point.wanted, formats, f"{where}, rank {self._rank}")

    def _play(self, layer: TimedLayer, spec: Spec, point: _Point, where: str) -> None:
        for phase in _phases(layer):
            phase()
        self._check(layer.output(), spec, point, where)

    def _time(self, layer: TimedLayer) -> list[LayerTimings]:
        effort = Effort(2, 0.0, 1) if self._shares else self._sweep.effort
        captured = self._on_gpu and self._only_launches(layer)
        dist.barrier()
        return measure_layer(_phases(layer), effort, self._line, captured)

    def _only_launches(self, layer: TimedLayer) -> bool:
        """Whether experts wait for the device on no rank, so that graphs can hold them."""
        said = None
        layer.prepare()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.experts()
        except RuntimeError as error:
            said = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if said is not None:
            layer.experts()
        layer.finalize()
        return self._first(said) is None

    def _measure(
        self,
        kind: str,
        name: str,
        backend: Experts,
        spec: Spec,
        point: _Point,
        layer: TimedLayer,
        where: str,
    ) -> None:
        self._play(layer, spec, point, where)
        ranks = self._time(layer)
        self._check(layer.output(), spec, point, f"{where}, after it was timed")
        self._record(kind, name, backend, spec, point, ranks)

    def _record(
        self,
        kind: str,
        name: str,
        backend: Experts,
        spec: Spec,
        point: _Point,
        ranks: list[LayerTimings],
    ) -> None:
        self._cases.append(layer_case(kind, name, backend.name, spec, point.tokens, ranks))


def _phases(layer: TimedLayer) -> list[Callable[[], None]]:
    return [layer.prepare, layer.experts, layer.finalize]
