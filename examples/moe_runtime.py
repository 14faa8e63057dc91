"""A small Mixture-of-Experts runtime with expert parallelism: weights from a file, batches served.

    python examples/moe_runtime.py                           # 4 ranks on the CPU
    python examples/moe_runtime.py --weights nvfp4 --wire mxfp8
    torchrun --nproc-per-node 8 examples/moe_runtime.py      # one rank for each GPU

Each layer: RMS norm, router, routed experts and a shared one, residual. The experts' weights are
quantized and go through a file: MXFP4 as GPT-OSS lays them out (with biases and its activation),
NVFP4 with a scale per expert. Every rank reads its own experts of it. The same batches are then
served by one rank that holds all experts; the exit code is 1 if any logit differs by more than
0.02 + 0.02 * |logit|. The two differ in the order of fp32 sums alone; the tolerance is for a code
of four bits that tips over by that.

T tokens of a rank, H hidden size, INNER intermediate size, E experts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import rms_norm, silu

from moe_a2a import AllToAll, MoELayer, Spec
from moe_a2a.experts import (
    ExpertMatrix,
    ExpertWeights,
    from_gpt_oss,
    select,
    shared_encode_scale,
)
from moe_a2a.testing import RankPool

if TYPE_CHECKING:
    from torch import Tensor

    from moe_a2a.testing import RankContext

TOLERANCE = 0.02
H, INNER, E, TOP_K, LAYERS, VOCABULARY = 256, 128, 16, 4, 3, 512
BATCHES = (61, 9, 2)  # tokens of a prompt, then of two steps of decoding: some ranks have none
FACTOR = 1.5  # routed_scaling_factor
LARGEST_INPUT = 8.0  # of the rows that meet w13, as if calibrated


class Options(NamedTuple):
    """What the command line says."""

    weights: str
    wire: str
    file: str


def write_checkpoint(path: Path, form: str) -> None:
    """Random weights, the routed experts quantized."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=drawn) * scale

    def layer() -> dict[str, Tensor]:
        gate_up = normal(E, 2 * INNER, H, scale=H**-0.5)
        down = normal(E, H, INNER, scale=INNER**-0.5)
        tensors = gpt_oss(gate_up, down, drawn) if form == "mxfp4" else nvfp4(gate_up, down)
        return {
            **tensors,
            "router": normal(E, H, scale=3 * H**-0.5),
            "shared_gate_up": normal(2 * INNER, H, scale=H**-0.5),
            "shared_down": normal(H, INNER, scale=INNER**-0.5),
        }

    embedding = normal(VOCABULARY, H, scale=1.0)
    torch.save({"embedding": embedding, "layers": [layer() for _ in range(LAYERS)]}, path)


def gpt_oss(gate_up: Tensor, down: Tensor, drawn: torch.Generator) -> dict[str, Tensor]:
    """Gate and up rows take turns, codes lie in blocks of 16 bytes."""
    gate, up = gate_up.chunk(2, dim=1)
    found = {}
    for name, matrix in (("gate_up_proj", torch.stack([gate, up], 2).flatten(1, 2)),
                         ("down_proj", down)):  # fmt: skip
        packed = ExpertMatrix.quantize(matrix, "mxfp4")
        assert packed.scales is not None
        found[f"{name}_blocks"] = packed.payload.view(E, packed.rows, -1, 16)
        found[f"{name}_scales"] = packed.scales
        found[f"{name}_bias"] = torch.randn(E, packed.rows, generator=drawn).bfloat16() * 0.1
    return found


def nvfp4(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, matrix, largest in (("w13", gate_up, LARGEST_INPUT), ("w2", down, 4 * LARGEST_INPUT)):
        packed = ExpertMatrix.quantize(matrix, "nvfp4")
        assert packed.scales is not None and packed.decode_scale is not None
        found[f"{name}_weight"] = packed.payload
        found[f"{name}_weight_scale"] = packed.scales.view(torch.float8_e4m3fn)
        found[f"{name}_weight_scale_2"] = packed.decode_scale
        found[f"{name}_input_scale"] = torch.full((E,), largest / (448 * 6))
    return found


def experts_of(tensors: dict[str, Tensor], mine: range, form: str) -> ExpertWeights:
    """A rank's share of a layer."""
    if form == "mxfp4":
        return from_gpt_oss(tensors, mine)
    own = {name: part[mine.start : mine.stop] for name, part in tensors.items() if name[0] == "w"}
    w13, w2 = (
        ExpertMatrix(
            own[f"{name}_weight"],
            "nvfp4",
            own[f"{name}_weight_scale"],
            own[f"{name}_weight_scale_2"],
        )
        for name in ("w13", "w2")
    )
    return ExpertWeights(
        w13, w2, w13_input_scale=own["w13_input_scale"], w2_input_scale=own["w2_input_scale"]
    )


class Runtime:
    """A model on the ranks of a group; all its layers share one exchange."""

    def __init__(self, options: Options, group: dist.ProcessGroup, device: torch.device) -> None:
        size, wire = dist.get_world_size(group), options.wire
        # Sums travel as fp32, so that the number of ranks changes as little as possible.
        spec = Spec(size, E, TOP_K, H, max(BATCHES), wire=wire, combine_wire="fp32")
        # Mapped: a rank reads the pages of its own experts.
        stored = torch.load(options.file, mmap=True, weights_only=True)
        self.a2a = AllToAll(spec, group, device=device)
        self.embedding: Tensor = stored["embedding"].to(device)
        self.layers: list[tuple[dict[str, Tensor], MoELayer]] = []
        mine = spec.experts_of(self.a2a.ep_rank)
        for tensors in stored["layers"]:
            weights = experts_of(tensors, mine, options.weights).to(device)
            layer = MoELayer(self.a2a, experts=select(spec, device, weights))
            dense = ("router", "shared_gate_up", "shared_down")
            self.layers.append(({name: tensors[name].to(device) for name in dense}, layer))
        self.scale: Tensor | None = None
        if wire == "nvfp4":  # one for all ranks and layers
            inputs = torch.full((E,), LARGEST_INPUT / (448 * 6))
            self.scale = shared_encode_scale(inputs).to(device)

    @torch.inference_mode()
    def serve(self, tokens: Tensor, most: int) -> Tensor:
        """int64 [T] -> logits fp32 [T, vocabulary]; ``most``: the largest T of any rank."""
        x = self.embedding[tokens]  # the residual stream stays fp32
        for dense, layer in self.layers:
            normed = rms_norm(x, (H,))
            gates, ids = (normed @ dense["router"].T).topk(TOP_K)
            gate, up = (normed @ dense["shared_gate_up"].T).chunk(2, -1)
            shared = (silu(gate) * up) @ dense["shared_down"].T
            x = x + layer(
                normed.bfloat16(),
                gates.softmax(-1),
                ids,
                shared=shared,
                routed_scaling_factor=FACTOR,
                runtime_max_tokens=most,
                global_scale=self.scale,
            )
        logits: Tensor = rms_norm(x, (H,)) @ self.embedding.T * H**-0.5
        return logits

    def close(self) -> None:
        self.a2a.close()


def shares(tokens: Tensor, size: int) -> list[Tensor]:
    """Unequal, as a scheduler's: the first rank takes about a half of what is left, and so on."""
    parts, left = [], tokens
    for rank in range(size):
        count = len(left) if rank == size - 1 else -(-len(left) // 2)
        parts.append(left[:count])
        left = left[count:]
    return parts


def serve_all(options: Options, group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """This rank's logits of each batch, on the CPU."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    runtime = Runtime(options, group, device)
    drawn = torch.Generator().manual_seed(1)
    found = []
    for count in BATCHES:
        parts = shares(torch.randint(0, VOCABULARY, (count,), generator=drawn), size)
        logits = runtime.serve(parts[rank].to(device), max(map(len, parts)))
        found.append(logits.cpu())
    runtime.a2a.check()
    runtime.close()
    return found


def play(ranks: RankContext, options: Options, device: str) -> bool:
    """What a rank does: its part, then rank 0 compares it all with one rank that holds all."""
    place = torch.device(device)
    alone = [dist.new_group([rank]) for rank in range(ranks.size)]  # collective, each of them
    served = serve_all(options, ranks.group, place)
    gathered: list[Any] = [None] * ranks.size
    dist.all_gather_object(gathered, served, group=ranks.group)
    verdict = [True]
    if ranks.rank == 0:
        verdict = [compare(gathered, serve_all(options, alone[0], place), options, ranks.size)]
    dist.broadcast_object_list(verdict, src=0, group=ranks.group)
    return verdict[0]


def compare(
    gathered: list[list[Tensor]], wanted: list[Tensor], options: Options, size: int
) -> bool:
    """Prints what came out; whether all of it is within the tolerance."""
    good = True
    print(f"{LAYERS} layers, {E} experts in {options.weights}, wire {options.wire}, {size} ranks")
    for parts, want in zip(zip(*gathered, strict=True), wanted, strict=True):
        got = torch.cat(parts)
        off = float(((got - want).abs() / (1 + want.abs())).max())
        good &= got.shape == want.shape and off <= TOLERANCE and bool(want.any())
        same = int((got.argmax(-1) == want.argmax(-1)).sum())
        print(
            f"  {len(want)} tokens, {'+'.join(str(len(part)) for part in parts)} by rank: largest "
            f"difference from one process {off:.1e} of 1 + |logit|, {same} next tokens the same"
        )
    print(f"{'equal' if good else 'NOT EQUAL'} within {TOLERANCE} + {TOLERANCE} * |logit|")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", choices=("mxfp4", "nvfp4"), default="mxfp4")
    add("--wire", help="default: as the weights")
    add("--ranks", type=int, default=4, help="processes to start (4); torchrun's beat it")
    add("--file", help="the checkpoint, written if it is not there; default: a temporary one")
    given = parser.parse_args()
    wire = given.wire or given.weights
    if "RANK" in os.environ:
        return 0 if under_torchrun(given.weights, wire, given.file) else 1
    with tempfile.TemporaryDirectory() as folder, RankPool(given.ranks) as pool:
        options = Options(given.weights, wire, given.file or str(Path(folder) / "moe.pt"))
        if given.file is None or not Path(given.file).exists():
            write_checkpoint(Path(options.file), given.weights)
        return 0 if all(pool.run(play, options, "cpu")) else 1


def under_torchrun(form: str, wire: str, file: str | None) -> bool:
    from moe_a2a.testing import RankContext

    gpus = torch.cuda.device_count()
    device = "cpu"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as folder:
        # Every rank of this example writes a copy of its own: they need not share a file system.
        options = Options(form, wire, file or str(Path(folder) / "moe.pt"))
        if file is None or (rank == 0 and not Path(file).exists()):
            write_checkpoint(Path(options.file), form)
        dist.barrier()
        context = RankContext(rank, dist.get_world_size(), dist.group.WORLD, 0)
        verdict = play(context, options, device)
    dist.destroy_process_group()
    return verdict


if __name__ == "__main__":
    sys.exit(main())
