"""Whole layers that every rank can foresee: prepare, experts, finalize on real ranks.

T tokens of all ranks, K top_k, H hidden_size, E num_experts, W ep_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_a2a import AllToAll, PrepareFinalize, Spec
from moe_a2a.experts import Activation, ExpertMatrix, ExpertWeights, select, shared_encode_scale
from moe_a2a.experts.emulated import Emulated
from tests import oracle_experts as oracle
from tests import oracle_formats as wires
from tests.formats_cases import raw

if TYPE_CHECKING:
    from moe_a2a import Received
    from moe_a2a.testing import RankContext

SPLITS = {1: (13,), 2: (9, 4), 3: (7, 0, 6), 4: (5, 0, 7, 1)}  # of T over the ranks
TOKENS, EXPERTS, HIDDEN, INNER = 13, 5, 128, 128
DECODE = (1 / 500, 1 / 300)  # nvfp4 scales of the rows that meet w13 and w2
UNUSED = 3  # an expert without tokens


@dataclass(frozen=True)
class Case:
    wire: str = "bf16"
    weight: str = "bf16"
    activations: str | None = None  # None: the weights' own
    combine_wire: str = "fp32"
    top_k: int = 2
    experts: int = EXPERTS  # the first so many
    biased: bool = True
    defer: bool = False
    poison: bool = True  # every byte that padding rows arrive with

    def spec(self, size: int) -> Spec:
        own = (size, self.experts, self.top_k, HIDDEN, TOKENS)
        more = {"invalid_expert_id": self.experts if size % 2 else -1, "allow_defer": self.defer}
        return Spec(*own, wire=self.wire, combine_wire=self.combine_wire, **more)


def numbers(*seed: int) -> np.random.Generator:
    return np.random.default_rng([17, *seed])


def floats(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """float32 that bf16 holds exactly."""
    return oracle.bf16(rng.standard_normal(shape) * scale).astype(np.float32)


def tokens(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [T, H], ids [T, K] and router weights of all ranks' tokens, one after the other."""
    rng = numbers(1)
    x = floats(rng, TOKENS, HIDDEN)
    there = [expert for expert in range(case.experts) if expert != UNUSED]
    ids = rng.choice([*there, *there, *there, -1, EXPERTS + 2], (TOKENS, case.top_k))
    ids[0], ids[1] = there[0], -1  # one expert, K times; and no expert at all
    router = rng.random((TOKENS, case.top_k)) + 0.1
    return x, ids, (router / router.sum(1, keepdims=True)).astype(np.float32)


@cache
def matrices(weight: str) -> tuple[ExpertMatrix, ExpertMatrix]:
    """Of all experts, each at its own magnitude."""
    rng = numbers(2)
    size = (np.exp2(rng.integers(-1, 2, (EXPERTS, 1, 1)) / 2)).astype(np.float32)
    w13 = floats(rng, EXPERTS, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
    w2 = floats(rng, EXPERTS, HIDDEN, INNER, scale=0.05 * INNER**-0.5)
    return tuple(ExpertMatrix.quantize(torch.from_numpy(w * size), weight) for w in (w13, w2))


def biases(case: Case) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not case.biased:
        return None, None
    rng = numbers(3)
    return (
        floats(rng, EXPERTS, 2 * INNER, scale=0.3),
        floats(rng, EXPERTS, HIDDEN, scale=0.03),
    )


def of_experts(matrix: ExpertMatrix, mine: slice) -> ExpertMatrix:
    parts = (matrix.scales, matrix.decode_scale)
    taken = [None if part is None else part[mine] for part in parts]
    return ExpertMatrix(matrix.payload[mine], matrix.format, *taken)


def weights(case: Case, experts: range) -> ExpertWeights:
    mine = slice(experts.start, experts.stop)
    w13, w2 = matrices(case.weight)
    b13, b2 = (None if b is None else torch.from_numpy(b[mine]) for b in biases(case))
    scales = [torch.full((len(experts),), scale) for scale in DECODE]
    act = Activation(1.702, 1.0, 2.0) if case.biased else Activation()
    return ExpertWeights(of_experts(w13, mine), of_experts(w2, mine), act, b13, b2, *scales)


@cache
def decoded(weight: str) -> list[np.ndarray]:
    found = []
    for matrix in matrices(weight):
        decode = None if matrix.decode_scale is None else matrix.decode_scale.numpy()
        found.append(oracle.weights(raw(matrix.payload), raw(matrix.scales), weight, decode))
    return found


def layer(case: Case) -> oracle.Layer:
    act = {"alpha": 1.702, "beta": 1.0, "limit": 2.0} if case.biased else {}
    return oracle.Layer(*decoded(case.weight), *biases(case), **act)


def encode_scales() -> tuple[float, float]:
    return tuple(float(np.float32(1) / np.float32(scale)) for scale in DECODE)


def plain(case: Case) -> np.ndarray:
    """float64 [T, H] without any quantization of activations."""
    return oracle.run(layer(case), *tokens(case))[0]


def emulated(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """float64 [T, H] of rows and activations quantized as case says; its terms' magnitudes."""
    x, ids, router = tokens(case)
    names = [case.activations or case.weight] * 2
    gs, arrived = encode_scales(), case.wire
    x = wires.dequantize(*wires.quantize(x, arrived, gs[0]), arrived, None, gs[0])
    seen = oracle.hardware(*names, case.weight, arrived, gs)
    return oracle.run(layer(case), x, ids, router, seen)


def poisoned(recv: Received) -> Received:
    """NaN, where the format has one, in every row that is padding."""
    for source, count in enumerate(recv.counts.tolist()):
        for rows in (recv.x, recv.scales):
            if rows is not None:
                rows[source, count:].view(torch.uint8).fill_(255)
    return recv


def play(ranks: RankContext, case: Case, *, deferred: bool = False) -> np.ndarray:
    """This rank's outputs [T of the rank, H], as float32."""
    size = ranks.size
    spec, split = case.spec(size), SPLITS[size]
    first = sum(split[: ranks.rank])
    mine = slice(first, first + split[ranks.rank])
    x, ids, router = (torch.from_numpy(array[mine]) for array in tokens(case))
    held = weights(case, spec.experts_of(ranks.rank))
    if case.activations is None:
        experts = select(spec, "cpu", held)
    else:
        experts = Emulated(spec, "cpu", held, activations=case.activations)
    more = {}
    if case.wire == "nvfp4":
        more["global_scale"] = shared_encode_scale(torch.full((5,), DECODE[0]))
    x = x.half() if case.wire == "fp16" else x.bfloat16()
    with AllToAll(spec, ranks.group, backend="shm", timeout=40) as a2a:
        both = PrepareFinalize(a2a)
        got = both.prepare(x, router, ids, defer_input_quant=deferred, **more)
        recv = got.received
        assert recv.deferred == deferred
        if case.poison:
            poisoned(recv)
        y = experts(recv, out=a2a.combine_buffer() if ranks.rank % 2 else None)
        check_zeros(y, recv)
        return both.finalize(y).float().numpy()


def check_zeros(y: torch.Tensor, recv: Received) -> None:
    """Rows without a choice of an expert here, padding among them."""
    first = recv.spec.experts_of(recv.ep_rank)
    here = ((recv.topk_ids >= first.start) & (recv.topk_ids < first.stop)).any(-1)
    padding = torch.arange(y.shape[1])[None, :] >= recv.counts[:, None]
    assert padding.any() and not (here & padding).any()
    assert not y[~here].any(), "a row that no expert computed is not zero"
    assert y.isfinite().all()


def play_all(ranks: RankContext, cases: list[Case]) -> list[np.ndarray]:
    """A rank function."""
    return [play(ranks, case) for case in cases]


def play_deferred_too(ranks: RankContext, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A rank function: quantized before dispatch, and by the experts."""
    return play(ranks, case), play(ranks, case, deferred=True)
