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

# ruff: noqa: E402 - Ctrl-C during the imports, too, is one line

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn


def end(number: int, _: object) -> NoReturn:
    """Ctrl-C, or a kill: one line, and what is open closes on the way out."""
    signal.signal(number, signal.SIG_IGN)  # an impatient second one must not stop that
    complain("interrupted" if number == signal.SIGINT else "terminated", of_all=True)
    sys.exit(128 + number)


def complain(text: str, *, of_all: bool = False) -> None:
    """One line; what concerns all ranks alike is torchrun's first to say."""
    if not of_all or os.environ.get("RANK", "0") == "0":
        print(f"moe_runtime: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":  # ahead of imports that take a second
    signal.signal(signal.SIGINT, end)
    if "RANK" not in os.environ:  # torchrun would have to wait for the end of a collective
        signal.signal(signal.SIGTERM, end)

import torch
import torch.distributed as dist
from torch.nn.functional import rms_norm, silu

from moe_a2a import AllToAll, MoELayer, Spec
from moe_a2a.bench.events import Note
from moe_a2a.bench.launch import RankFailed, join_torchrun, start_ranks, torchrun_place
from moe_a2a.errors import MoeA2AError
from moe_a2a.experts import (
    ExpertMatrix,
    ExpertWeights,
    from_gpt_oss,
    select,
    shared_encode_scale,
)
from moe_a2a.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_a2a.bench.events import Tell

TOLERANCE = 0.02
H, INNER, E, TOP_K, LAYERS, VOCABULARY = 256, 128, 16, 4, 3, 512
BATCHES = (61, 9, 2)  # tokens of a prompt, then of two steps of decoding: some ranks have none
FACTOR = 1.5  # routed_scaling_factor
NAMES = {"mxfp4": "gate_up_proj_blocks", "nvfp4": "w13_weight"}  # by which a file is known
LARGEST_INPUT = 8.0  # of the rows that meet w13, as if calibrated


class Options(NamedTuple):
    """What the command line says, for the ranks."""

    weights: str
    wire: str
    file: str
    ep_size: int
    device: str  # cpu or cuda


class WrongArgument(ValueError):
    """One sentence, exit code 2."""


def write_checkpoint(path: Path, form: str) -> None:
    """Random weights, the routed experts quantized. Whole, or not there at all."""
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
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save({"embedding": embedding, "layers": [layer() for _ in range(LAYERS)]}, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def ready(path: Path, form: str) -> None:
    """Writes the checkpoint if it is not there.

    Raises:
        WrongArgument: it can't be written or read, or holds something else.
    """
    try:
        if not path.parent.is_dir():
            raise WrongArgument(f"--file {path}: there is no folder {path.parent}")
        if not path.exists():
            write_checkpoint(path, form)
            return
        with path.open("rb"):  # torch.load would hide why it can't
            pass
    except OSError as error:
        raise WrongArgument(f"--file {path}: {error.strerror or error}") from None
    except RuntimeError as error:  # torch's own, of a full disk for one
        raise WrongArgument(f"--file {path}: {str(error).splitlines()[0]}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of other files
            stored = dict(torch.load(path, mmap=True, weights_only=True))
        layers = stored["layers"]
        held = [form for form, name in NAMES.items() if all(name in tensors for tensors in layers)]
        whole = stored["embedding"].shape == (VOCABULARY, H) and len(layers) > 0
    except Exception:  # truncated, or anything else: torch raises a dozen kinds
        whole = False
    if not whole or not held:
        raise WrongArgument(f"--file {path}: not a whole checkpoint of this example")
    holds = held[0]
    if holds != form:
        raise WrongArgument(f"--file {path}: it holds {holds} weights, not {form}")


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
        self.dtype = torch.float16 if wire == "fp16" else torch.bfloat16
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
                normed.to(self.dtype),
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


def play(options: Options, tell: Tell) -> None:
    """What a rank does: its part, then rank 0 compares it all with one rank that holds all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if options.device == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(1)
        place = torch.device("cpu")
    alone = [dist.new_group([peer]) for peer in range(size)]  # collective, each of them
    assert dist.group.WORLD is not None
    served = serve_all(options, dist.group.WORLD, place)
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, served)
    good = rank > 0 or compare(
        gathered, serve_all(options, alone[0], place), options, lambda line: tell(Note(line))
    )
    dist.barrier()
    if not good:
        raise MoeA2AError("logits are not those of one process")


def compare(
    gathered: list[list[Tensor]],
    wanted: list[Tensor],
    options: Options,
    say: Callable[[str], object],
) -> bool:
    """Says what came out; whether all of it is within the tolerance."""
    good = True
    say(f"{E} experts in {options.weights}, wire {options.wire}, {options.ep_size} ranks")
    for parts, want in zip(zip(*gathered, strict=True), wanted, strict=True):
        got = torch.cat(parts)
        off = float(((got - want).abs() / (1 + want.abs())).max())
        good &= got.shape == want.shape and off <= TOLERANCE and bool(want.any())
        same = int((got.argmax(-1) == want.argmax(-1)).sum())
        say(
            f"  {len(want)} tokens, {'+'.join(str(len(part)) for part in parts)} by rank: largest "
            f"difference from one process {off:.1e} of 1 + |logit|, {same} next tokens the same"
        )
    say(f"{'equal' if good else 'NOT EQUAL'} within {TOLERANCE} + {TOLERANCE} * |logit|")
    return good


class Parser(argparse.ArgumentParser):
    """One sentence, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see --help)", of_all=True)
        self.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected an integer >= 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (logits differ, a rank failed) or 2 (a wrong argument)."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", choices=("mxfp4", "nvfp4"), default="mxfp4")
    add("--wire", choices=FORMATS, help="default: as the weights")
    add("--ranks", type=positive, default=4, help="processes to start (4); torchrun's beat it")
    add("--file", help="the checkpoint, written if it is not there; default: a temporary one")
    given = parser.parse_args(argv)
    wire = given.wire or given.weights
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = torchrun_place()
            path = Path(given.file or Path(folder) / "moe.pt")
            # Without a file every rank writes a copy of its own: they need not share a file system.
            # With one, no rank gets past the meeting in `join_torchrun` before rank 0 has it.
            if given.file is None or place is None or place[0] == 0:
                ready(path, given.weights)
            size = given.ranks if place is None else place[1]
            device = "cuda" if place is not None and torch.cuda.device_count() else "cpu"
            start = start_ranks if place is None else join_torchrun  # they end with this process
            start(play, Options(given.weights, wire, str(path), size, device), show)
        except (RankFailed, ValueError, OSError) as error:
            complain(str(error))
            return 1 if not isinstance(error, ValueError) else 2
    return 0


def show(event: object) -> None:
    """What rank 0 tells."""
    if isinstance(event, Note):
        print(event.text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
