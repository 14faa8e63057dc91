"""What the limit on waits costs: the kernels as they are against the same without it.

    torchrun --nproc-per-node 2 benchmarks/bounded_waits.py [--tokens 1,8,128,1024,4096]

The second library is compiled from a copy of the sources in which a wait polls and nothing else,
with no look at the time, at posts, at other warps. Pairs of both are replayed in turn, so that
whatever else changes on the machine changes for both.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec, _build, backends
from moe_a2a._ops import cuda_library
from moe_a2a.backends.nvlink import Nvlink
from moe_a2a.bench.connect import connect
from moe_a2a.bench.graphs import StartLine, capture, replay_times
from moe_a2a.bench.table import print_table

BOUND = "  if ((++w.polls & 63) != 0) return true;\n"  # of csrc/cuda/wait.cuh
PAIRS, REPLAYS = 20, 60


@functools.cache
def unbounded_library() -> Any:
    """Compiled anew where the sources have changed, as the library itself is."""
    import tvm_ffi

    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(_build.source_directory(), sources)
        wait = sources / "cuda" / "wait.cuh"
        text = wait.read_text()
        if text.count(BOUND) != 1:
            raise SystemExit(f"csrc/cuda/wait.cuh no longer has the line {BOUND.strip()!r}")
        wait.write_text(text.replace(BOUND, "  return true;\n"))
        original = _build.source_directory
        _build.source_directory = lambda: sources
        try:
            major, minor = torch.cuda.get_device_capability()
            return tvm_ffi.load_module(str(_build.build_cuda(f"{major}{minor}a")))
        finally:
            _build.source_directory = original


class Unbounded(Nvlink):
    name: ClassVar[str] = "unbounded"

    def _load(self) -> Any:
        return unbounded_library()


class Pairs(NamedTuple):
    a2a: AllToAll
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor
    inputs: tuple[torch.Tensor, ...]  # a graph keeps none of the tensors that it reads


def pairs_of(backend: str, tokens: int, place: torch.device) -> Pairs:
    """An open exchange, and a graph of PAIRS rounds of it."""
    spec = Spec(dist.get_world_size(), 256, 8, 7168, tokens)
    a2a = AllToAll(spec, backend=backend, device=place)
    draw = torch.Generator(device=place).manual_seed(1 + dist.get_rank())
    x = torch.randn(tokens, 7168, generator=draw, device=place, dtype=torch.bfloat16)
    ids = torch.rand(tokens, 256, generator=draw, device=place).topk(8).indices.int()
    weights = torch.rand(tokens, 8, generator=draw, device=place)
    out = torch.empty_like(x)
    a2a.dispatch(x, ids, weights)
    y = a2a.combine_buffer().normal_(generator=draw)
    a2a.combine(y, out=out)
    a2a.check()

    def together() -> None:
        a2a.dispatch(x, ids, weights)
        a2a.combine(y, out=out)

    return Pairs(a2a, capture(together, PAIRS), out, (x, ids, weights, y))


def compare(tokens: int, place: torch.device, line: StartLine) -> dict[str, list[float]]:
    """Microseconds of a pair on the slowest rank, replay by replay."""
    opened = {name: pairs_of(name, tokens, place) for name in ("nvlink", "unbounded")}
    found: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(REPLAYS):
        for name, pairs in opened.items():
            took = torch.tensor(replay_times(pairs.graph.replay, line, 1, 0, PAIRS), device=place)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            found[name].append(took.item() / 1e3)
    for pairs in opened.values():
        pairs.a2a.check()
        if not torch.equal(pairs.out, opened["unbounded"].out):
            raise SystemExit("the two kernels' results differ")
    for pairs in opened.values():
        pairs.a2a.close()
    return {name: sorted(times[REPLAYS // 10 :]) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", default="1,8,32,128,1024,4096")
    arguments = parser.parse_args()
    connect("cuda")
    place = torch.device("cuda", torch.cuda.current_device())
    backends.BACKENDS["unbounded"] = f"{__name__}:Unbounded"
    cuda_library()
    unbounded_library()
    dist.barrier()
    line, rows = StartLine(place), []
    for tokens in (int(text) for text in arguments.tokens.split(",")):
        found = compare(tokens, place, line)
        with_limit, without = (statistics.median(found[name]) for name in found)
        spread = [f"{t[len(t) // 10]:.2f} to {t[-1 - len(t) // 10]:.2f}" for t in found.values()]
        change = f"{100 * (with_limit / without - 1):+.1f} %"
        rows.append(
            (str(tokens), f"{with_limit:.2f}", spread[0], f"{without:.2f}", spread[1], change)
        )
    if dist.get_rank() == 0:
        header = ("tokens", "limit, us", "p10 to p90", "none, us", "p10 to p90", "cost")
        print_table("pairs of dispatch and combine, bf16", header, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    main()
