"""The grouped GEMM over MXFP4 weights against torch's over bf16 weights, on one GPU, no ranks.

    python benchmarks/grouped_gemm.py [--sweep] [--out FILE.json]

DeepSeek-V3's experts at EP8: hidden size 7168, intermediate size 2048, 32 of 256 experts, top 8.
With T tokens per rank, 8 T tokens choose 8 experts each at random; this rank computes the choices
of its own. Results are checked before anything is timed. Ours gathers rows by index, and with
gate_up adds the activation; torch's finds its rows gathered and stops at the product.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_a2a.bench.machine import circumstances
from moe_a2a.experts import SILU, ExpertMatrix
from moe_a2a.experts.four_bits import Arranged, arrange
from moe_a2a.experts.grouped_experts import multiply, sum_up
from moe_a2a.experts.tiles import Tile, tiles_for
from moe_a2a.grouped import Choices, Grouped, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

BYTES_PER_SECOND, FLOPS = 4.8e12, 990e12  # of one H200: memory, dense bf16
TOKENS = (1, 8, 16, 64, 256, 1024, 4096)
SWEPT_FIRST = (64, 4096, 16, 256, 1024, 8, 1)
FLUSHED = 256 << 20  # bytes written between calls, several times L2
LIMIT = 1e-5  # distance of our rows, rounded to bf16, from float64's


@dataclass(frozen=True)
class Shape:
    hidden: int = 7168
    inner: int = 2048
    experts: int = 256
    ep_size: int = 8
    top_k: int = 8

    @property
    def local(self) -> int:
        return self.experts // self.ep_size


class Weights(NamedTuple):  # one of the two matrices, [E, N, K], with the same values
    packed: Arranged
    plain: Tensor  # bf16


class Bench(NamedTuple):
    shape: Shape
    weights: dict[str, Weights]
    flush: Tensor  # uint8 [FLUSHED]
    replays: int


class Routed(NamedTuple):
    x: Tensor  # bf16 [8 T, H]
    ids: Tensor  # int32 [8 T, top_k], local
    router: Tensor  # fp32 [8 T, top_k]
    counts: Tensor  # int32 [1], 8 T
    order: Tensor  # int64 [M]: rows sorted by expert, for torch
    ends: Tensor  # int32 [E]: where they end


class Product(NamedTuple):
    """One of the two products for one number of tokens."""

    name: str
    weights: Weights
    x: Tensor  # what ours reads: [8 T, H], or None rows of a gap in [L, I]
    dense: Tensor  # bf16 [M, K], what torch's reads
    gated: bool


def make_weights(shape: Shape, device: str) -> dict[str, Weights]:
    made = {}
    for name, rows, columns in (
        ("gate_up", 2 * shape.inner, shape.hidden),
        ("down", shape.hidden, shape.inner),
    ):
        size = (shape.local, rows, columns)
        payload = torch.randint(0, 256, (*size[:2], columns // 2), dtype=torch.uint8, device=device)
        # Products of about one, whatever K.
        scales = torch.randint(118, 121, (*size[:2], columns // 32), device=device)
        matrix = ExpertMatrix(payload, "mxfp4", scales.to(torch.uint8))
        plain = torch.empty(size, dtype=torch.bfloat16, device=device)
        for e in range(shape.local):
            plain[e] = matrix.dequantize(slice(e, e + 1))[0]
        made[name] = Weights(arrange(matrix), plain)
    return made


def route(shape: Shape, tokens: int, device: str) -> Routed:
    rows = tokens * shape.ep_size
    drawn = torch.rand(rows, shape.experts, device=device).topk(shape.top_k).indices
    ids = torch.where(drawn < shape.local, drawn, -1).to(torch.int32)
    flat = torch.where(ids < 0, shape.local, ids).flatten()
    keys, order = flat.sort(stable=True)
    count = int((keys < shape.local).sum())
    edges = torch.arange(1, shape.local + 1, device=device, dtype=keys.dtype)
    return Routed(
        torch.randn(rows, shape.hidden, device=device).to(torch.bfloat16),
        ids,
        torch.rand(rows, shape.top_k, device=device),
        torch.tensor([rows], dtype=torch.int32, device=device),
        order[:count] // shape.top_k,
        torch.searchsorted(keys, edges).to(torch.int32),
    )


def grouped_for(routed: Routed, shape: Shape, align: int) -> Grouped:
    choices = Choices(routed.ids[None], routed.router[None], routed.counts, 0, shape.local)
    return Grouped(*listed(choices, align))


def products(
    shape: Shape, weights: dict[str, Weights], routed: Routed, align: int
) -> list[Product]:
    grouped = grouped_for(routed, shape, align)
    rows = len(grouped.row_index)
    dense = routed.x[routed.order]
    h = torch.randn(rows, shape.inner, device=dense.device).to(torch.bfloat16)
    live = grouped.row_index >= 0
    return [
        Product("gate_up", weights["gate_up"], routed.x, dense, True),
        Product("down", weights["down"], h, h[live], False),
    ]


def output(product: Product, grouped: Grouped) -> Tensor:
    rows = len(grouped.row_index)
    wide = product.weights.plain.shape[1] // (2 if product.gated else 1)
    return torch.zeros((rows, wide), dtype=torch.bfloat16, device=product.x.device)


def ours(product: Product, grouped: Grouped, out: Tensor, tile: Tile) -> None:
    activation = SILU if product.gated else None
    packed = product.weights.packed
    multiply(product.x, grouped, packed, out, tile, activation=activation, gather=product.gated)


def rival(product: Product, ends: Tensor) -> Tensor:
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    result: Tensor = grouped_mm(product.dense, product.weights.plain.mT, offs=ends)
    return result


def check(product: Product, grouped: Grouped, tile: Tile) -> float:
    """The largest distance of 24 rows from float64; stops the run where it is too large."""
    out = output(product, grouped)
    ours(product, grouped, out, tile)
    live = (grouped.row_index >= 0).nonzero().squeeze(-1)
    worst = 0.0
    for at in live[torch.linspace(0, len(live) - 1, 24).long().to(live.device)].tolist():
        expert = int((grouped.expert_offsets[1:] <= at).sum())
        row = int(grouped.row_index[at]) if product.gated else at
        wanted = product.weights.plain[expert].double() @ product.x[row].double()
        if product.gated:
            gate, up = wanted.chunk(2)
            wanted = torch.nn.functional.silu(gate) * up
        got = out[at].double()
        worst = max(worst, float(1 - 2 * (got @ wanted) / (got @ got + wanted @ wanted)))
    if not worst < LIMIT:
        sys.exit(f"{product.name} with {tile} is wrong: distance {worst:.3g} from float64")
    return worst


def timed(call: Callable[[], object], replays: int, flush: Tensor) -> float:
    """Median microseconds of a replay, L2 flushed before each."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    pairs = []
    for _ in range(replays + 2):
        flush.zero_()
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    lasted: list[float] = [1e3 * begin.elapsed_time(end) for begin, end in pairs[2:]]
    return statistics.median(lasted)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def bounds(product: Product, routed: Routed) -> tuple[float, float]:
    """Microseconds that packed weights and arithmetic take at least; and bf16 weights."""
    experts, rows, columns = product.weights.plain.shape
    sizes = routed.ends.diff(prepend=routed.ends.new_zeros(1))
    used = int((sizes > 0).sum())
    arithmetic = 2 * int(routed.ends[-1]) * rows * columns / FLOPS
    packed = product.weights.packed
    held = (packed.words.nbytes + packed.scales.nbytes) * used / experts / BYTES_PER_SECOND
    plain = product.weights.plain.nbytes * used / experts / BYTES_PER_SECOND
    return 1e6 * max(held, arithmetic), 1e6 * max(plain, arithmetic)


def candidates(tokens: int, gated: bool) -> Iterator[Tile]:
    rows = tokens // 4  # of each expert, on average
    blocks = [m for m in (16, 32, 64, 128, 256) if rows / 2 <= m <= max(32, 2 * rows)]
    for m, (n, warps), stages, group_m in itertools.product(
        blocks or [128, 256], ((64, 4), (128, 4), (128, 8), (256, 8)), (2, 3, 4, 5), (1, 8)
    ):
        loads = stages * (m * 256 + n * 68 * (1 + gated))
        registers = m * n * (1 + gated) / (32 * warps)
        known = stages in ((2, 3, 4) if m > 64 else (3, 4, 5))
        if registers > 128 or loads > 220 << 10 or not known:
            continue
        if (group_m == 1) == (m <= 64):  # few rows share nothing, many do
            yield Tile(m, n, warps, stages, group_m)


def compile_tile(shape: Shape, tile: Tile, gated: bool) -> None:
    """In a process of its own; what it compiles is found in Triton's cache by all others."""
    columns, rows = shape.hidden, 2 * shape.inner
    if not gated:
        columns, rows = shape.inner, shape.hidden

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")

    words = empty(1, columns // 128, rows, 16).expand(shape.local, -1, -1, -1)
    packed = Arranged(words, empty(1), "mxfp4", None, False)
    none = torch.zeros(shape.local + 1, dtype=torch.int32, device="cuda")
    grouped = Grouped(empty(1024).fill_(-1), none, empty(1024), empty(1))
    out = empty(1024, rows // (1 + gated), dtype=torch.bfloat16)
    x = empty(1024, columns, dtype=torch.bfloat16)
    activation = SILU if gated else None
    multiply(x, grouped, packed, out, tile, activation=activation, gather=gated)


def compile_all(shape: Shape, sizes: list[int], seconds: float) -> None:
    """Compiles all candidates at once, which takes longer than to time them."""
    both = itertools.product(sizes, (True, False))
    wanted = {(tile, gated) for tokens, gated in both for tile in candidates(tokens, gated)}
    begun = time.monotonic()
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [pool.submit(compile_tile, shape, *one) for one in sorted(wanted, key=str)]
        concurrent.futures.wait(waiting, timeout=seconds)
        for one in waiting:
            one.cancel()
    print(f"{len(wanted)} candidates compiled in {time.monotonic() - begun:.0f} s", flush=True)


def measure(bench: Bench, tokens: int) -> list[Any]:
    shape, weights, flush, replays = bench
    routed = route(shape, tokens, "cuda")
    tiles = tiles_for(tokens * shape.ep_size * shape.top_k / shape.experts)
    grouped = grouped_for(routed, shape, tiles.align)
    lines = []
    for product in products(shape, weights, routed, tiles.align):
        tile = tiles.gate_up if product.gated else tiles.down
        distance = check(product, grouped, tile)
        out = output(product, grouped)
        us = timed(lambda p=product, o=out, t=tile: ours(p, grouped, o, t), replays, flush)  # type: ignore[misc]
        other = timed(lambda p=product: rival(p, routed.ends), replays, flush)  # type: ignore[misc]
        least, least_plain = bounds(product, routed)
        lines.append(
            {
                "tokens": tokens, "product": product.name, "rows": int(routed.ends[-1]),
                "ours_us": us, "torch_us": other, "speedup": other / us, "bound_us": least,
                "torch_bound_us": least_plain, "distance": distance, "tile": asdict(tile),
            }
        )  # fmt: skip
    lines.append(layer(bench, routed, tokens))
    return lines


def layer(bench: Bench, routed: Routed, tokens: int) -> dict[str, Any]:
    """Grouping, both products and the sum; the first and the last by themselves too."""
    shape, weights, flush, replays = bench
    tiles = tiles_for(tokens * shape.ep_size * shape.top_k / shape.experts)
    y = routed.x.new_empty((1, len(routed.x), shape.hidden))
    grouped = grouped_for(routed, shape, tiles.align)
    h = routed.x.new_empty((len(grouped.row_index), shape.inner))
    rows = torch.zeros((len(h), shape.hidden), dtype=torch.bfloat16, device=h.device)

    def whole() -> None:
        found = grouped_for(routed, shape, tiles.align)
        first = weights["gate_up"].packed
        multiply(routed.x, found, first, h, tiles.gate_up, activation=SILU, gather=True)
        multiply(h, found, weights["down"].packed, rows, tiles.down)
        sum_up(rows, found, routed.router, y)

    return {
        "tokens": tokens,
        "product": "layer",
        "ours_us": timed(whole, replays, flush),
        "group_us": timed(lambda: grouped_for(routed, shape, tiles.align), replays, flush),
        "sum_us": timed(lambda: sum_up(rows, grouped, routed.router, y), replays, flush),
    }


def sweep(bench: Bench, sizes: list[int], until: float) -> list[Any]:
    """The best tiles of each size, as long as there is time."""
    best: list[Any] = []
    if sizes:
        compile_all(bench.shape, sizes, (until - time.monotonic()) / 2)
    for tokens in sorted(sizes, key=(*SWEPT_FIRST, *sizes).index):
        routed = route(bench.shape, tokens, "cuda")
        for gated in (True, False):
            found = []
            for tile in candidates(tokens, gated):
                if time.monotonic() > until:
                    break
                try:
                    found.append((sweep_one(bench, routed, tile, gated), tile))
                except Exception as error:  # too much shared memory, say
                    print(f"  {tile}: {type(error).__name__} {str(error)[:80]}", flush=True)
            for us, tile in sorted(found, key=lambda pair: pair[0])[:4]:
                name = "gate_up" if gated else "down"
                print(f"T={tokens:<5} {name:<8} {us:9.1f} us  {tile}", flush=True)
                best.append({"tokens": tokens, "product": name, "us": us, "tile": asdict(tile)})
    return best


def sweep_one(bench: Bench, routed: Routed, tile: Tile, gated: bool) -> float:
    shape, weights, flush, _ = bench
    grouped = grouped_for(routed, shape, tile.block_m)
    product = products(shape, weights, routed, tile.block_m)[0 if gated else 1]
    out = output(product, grouped)
    return timed(lambda: ours(product, grouped, out, tile), 12, flush)


def print_lines(lines: list[Any]) -> None:
    print(f"{'T':>5} {'product':<8} {'rows':>6} {'ours':>9} {'torch':>9} {'ratio':>6} {'bound':>9}"
          f" {'of it':>6} {'torch bound':>11}  us")  # fmt: skip
    for line in lines:
        head = f"{line['tokens']:>5} {line['product']:<8}"
        if line["product"] == "layer":
            print(f"{head} {'':>6} {line['ours_us']:9.1f}   of these grouping "
                  f"{line['group_us']:.1f}, sum {line['sum_us']:.1f}")  # fmt: skip
            continue
        print(
            f"{head} {line['rows']:>6} {line['ours_us']:9.1f} {line['torch_us']:9.1f} "
            f"{line['speedup']:6.2f} {line['bound_us']:9.1f} "
            f"{line['bound_us'] / line['ours_us']:6.0%} {line['torch_bound_us']:11.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweep", action="store_true", help="try tiles, print the best ones")
    parser.add_argument("--seconds", type=float, default=140.0, help="the sweep ends then (140)")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    begun = time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    torch.manual_seed(0)
    shape = Shape()
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    bench = Bench(shape, make_weights(shape, "cuda"), flush, arguments.replays)
    lines: list[Any] = []
    with torch.no_grad():
        for tokens in arguments.tokens:
            lines += measure(bench, tokens)
        print_lines(lines)
        print(f"measured in {time.monotonic() - begun:.0f} s", flush=True)
        sizes = arguments.tokens if arguments.sweep else []
        best = sweep(bench, sizes, begun + arguments.seconds)
    if arguments.out:
        facts = {**circumstances(sys.argv[1:]), "gpu": torch.cuda.get_device_name()}
        document = {**facts, "shape": asdict(shape), "lines": lines, "sweep": best}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
