"""combine_grouped against the same in steps: gather, weighted sum, combine.

    torchrun --nproc-per-node 2 benchmarks/grouped.py [--tokens 8,128,1024] [--combine-wire bf16]

The experts' output lies in grouped order in both cases. The steps are the kernel by which
`triton_w4a16` gathers, weights and adds a token's rows, writing combine's y (several of torch's
kernels without Triton), and combine. `group` is what listing the rows takes. Microseconds in CUDA
graphs, on the slowest rank.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moe_a2a import AllToAll, Spec
from moe_a2a.bench.cases import Effort
from moe_a2a.bench.connect import connect
from moe_a2a.bench.graphs import StartLine, capture, measure_on_device, replay_times
from moe_a2a.bench.table import print_table
from moe_a2a.bench.timing import Quantiles, slowest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_a2a.grouped import Grouped

EFFORT, PAIRS, GROUPS = Effort(100, 0.0, 5), 20, 20


def torch_sums(rows: Tensor, lists: Grouped, _: Tensor, y: Tensor) -> Tensor:
    """``y`` [W, R, H]: each received row's choices, weighted and added; padding is zeros."""
    there = lists.positions >= 0
    places = lists.positions.clamp(min=0)
    weight = torch.where(there, lists.row_weights[places], 0.0)
    sums = (rows[places].float() * weight.unsqueeze(-1)).sum(1)
    return y.copy_(sums.view(y.shape))


def routed(tokens: int, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator(device=place).manual_seed(1 + dist.get_rank())
    x = torch.randn(tokens, 7168, generator=draw, device=place, dtype=torch.bfloat16)
    ids = torch.rand(tokens, 256, generator=draw, device=place).topk(8).indices.int()
    return x, ids, torch.rand(tokens, 8, generator=draw, device=place)


def compare(
    tokens: int, back: str, align: int, in_steps: Callable[..., Tensor], line: StartLine
) -> tuple[Quantiles, Quantiles, Quantiles]:
    """combine_grouped, the steps, and group."""
    place = torch.device("cuda", torch.cuda.current_device())
    spec = Spec(dist.get_world_size(), 256, 8, 7168, tokens, combine_wire=back)
    call = routed(tokens, place)
    with AllToAll(spec, device=place, backend="nvlink") as a2a:
        recv = a2a.dispatch(*call)
        lists = recv.group(align)
        rows = torch.randn(len(lists.row_index), 7168, device=place, dtype=torch.bfloat16)
        listing = capture(lambda: recv.group(align), GROUPS)
        group = Quantiles.of(replay_times(listing.replay, line, 50, 5, GROUPS))
        out, y = torch.empty_like(call[0]), recv.x.new_empty((spec.ep_size, tokens, 7168))
        router = recv.topk_weights.flatten(0, 1).clone()

        def steps() -> None:
            a2a.combine(in_steps(rows, lists, router, y), out=out)

        received = [recv]

        def dispatch() -> None:
            received[0] = a2a.dispatch(*call)

        def grouped() -> None:  # every round lists the same rows
            a2a.combine_grouped(rows, replace(lists, round=received[0].counts), out=out)

        steps()  # of the dispatch above
        expected = out.clone()
        found = []
        for combine in (grouped, steps):
            out.fill_(torch.nan)
            timings = measure_on_device(dispatch, combine, EFFORT, PAIRS, line, captured=True)
            a2a.check()
            # The steps round sums to bf16 before they travel, quantized or not.
            off = (out.float() - expected.float()).square().sum() / expected.float().square().sum()
            assert off < 1e-3, f"combine_grouped is {float(off):.2g} from the steps"
            found.append(slowest(timings, "combine"))
    return found[0], found[1], group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", default="1,8,32,64,128,256,512,1024,4096")
    parser.add_argument("--combine-wire", default="bf16", choices=("bf16", "fp8_block128", "mxfp8"))
    parser.add_argument("--align", type=int, default=128)
    arguments = parser.parse_args()
    connect("cuda")
    line = StartLine(torch.device("cuda", torch.cuda.current_device()))
    in_steps: Callable[..., Tensor] = torch_sums
    if find_spec("triton") is not None:
        from moe_a2a.experts.grouped_experts import sum_up as in_steps
    rows = []
    for tokens in (int(text) for text in arguments.tokens.split(",")):
        found = compare(tokens, arguments.combine_wire, arguments.align, in_steps, line)
        cells = [text for q in found for text in (f"{q.median:.2f}", f"{q.p10:.2f} to {q.p90:.2f}")]
        rows.append((str(tokens), *cells, f"{found[1].median / found[0].median:.2f}"))
    if dist.get_rank() == 0:
        header = ("tokens", "grouped, us", "p10 to p90", "in steps, us", "p10 to p90",
                  "group, us", "p10 to p90", "times faster")  # fmt: skip
        print_table(f"rows of experts back to their tokens, {arguments.combine_wire}", header, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    main()
