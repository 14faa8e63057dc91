"""Rounds that every rank can foresee: inputs from seeds, dispatched, combined, held to the oracle.

T tokens of a rank, K top_k, H hidden_size, E num_experts, W ep_size, R runtime_max_tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_a2a import AllToAll, Received, Spec
from tests import oracle, oracle_formats
from tests.collective.places import place_of
from tests.formats_cases import raw, wild

if TYPE_CHECKING:
    from moe_a2a.testing import RankContext

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = torch.float8_e4m3fn
STORAGE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "nvfp4": torch.uint8,
    "mxfp4": torch.uint8,
}
STORAGE |= dict.fromkeys(("fp8", "fp8_block128", "mxfp8"), FP8)
SCALES = {"bf16": None, "fp16": None, "fp8": torch.float32, "fp8_block128": torch.float32}


@dataclass(frozen=True)
class Case:
    """A geometry."""

    size: int
    experts: int = 8
    top_k: int = 2
    hidden: int = 128
    capacity: int = 6
    wire: str = "bf16"
    combine_wire: str = "bf16"
    more: dict = field(default_factory=dict)  # further arguments of Spec

    def spec(self) -> Spec:
        own = (self.size, self.experts, self.top_k, self.hidden, self.capacity)
        return Spec(*own, wire=self.wire, combine_wire=self.combine_wire, **self.more)

    @property
    def extra(self) -> dict[str, int]:
        return self.more.get("extra", {})

    @property
    def unquantized(self) -> bool:
        return self.wire in ("bf16", "fp16")


@dataclass(frozen=True)
class Round:
    """A round. `tokens[r % len]` is T of rank r, at most R; None draws it."""

    seed: int = 0
    tokens: tuple[int, ...] | None = None
    rows: int | None = None  # R; None leaves the argument out
    routing: str = "random"
    source: str = "bf16"  # dtype of x, or "wire" for rows that the caller has quantized
    output: str | None = None  # dtype of y where the combine wire leaves a choice
    wide_ids: bool = False
    strided: bool = False
    specials: bool = False  # NaN, infinities, subnormals in x and y
    ones: bool = False  # NaN whose bits are all ones in y: elements, words and chunks of 16 bytes
    memory: str = "own"  # of y and out: own, buffer, strided
    active: tuple[bool, ...] | None = None
    global_scale: float | None = None
    defer: bool = False


def number_generator(case: Case, rnd: Round, rank: int, what: int) -> np.random.Generator:
    return np.random.default_rng([rnd.seed, rank, what, case.size])


def max_rows(case: Case, rnd: Round) -> int:
    return case.capacity if rnd.rows is None else rnd.rows


def choices(case: Case, rnd: Round, rank: int, count: int) -> np.ndarray:
    """int64 [T, K]"""
    rng, shape = number_generator(case, rnd, rank, 0), (count, case.top_k)
    if rnd.routing == "distinct":
        order = rng.random((count, case.experts)).argsort(1)
        return order[:, : case.top_k].astype(np.int64)
    ids = rng.integers(0, case.experts, shape)
    if rnd.routing == "hot":  # nearly all to the last expert
        ids = np.where(rng.random(shape) < 0.9, case.experts - 1, ids)
    elif rnd.routing == "first":
        ids[:] = 0
    elif rnd.routing == "nowhere":
        ids[:] = -1
    elif rnd.routing == "duplicates":
        ids[:, :] = ids[:, :1]
    elif rnd.routing == "invalid":
        narrow = [-1, -2, case.experts, case.experts + 7, 2**31 - 1, -(2**31)]
        beyond = [2**32, 2**32 + 1, -(2**40), 2**63 - 1, -(2**63)] if rnd.wide_ids else []
        odd = rng.choice(np.array(narrow + beyond, np.int64), shape)
        ids = np.where(rng.random(shape) < 0.5, odd, ids)
    return ids


def values(case: Case, rnd: Round, rng: np.random.Generator, shape: tuple, dtype: str):
    """float32 of `shape` that `dtype` holds exactly."""
    rows = int(np.prod(shape[:-1]))
    x = rng.standard_normal((rows, case.hidden), np.float32)
    x *= np.exp2(rng.integers(-6, 7, (rows, 1))).astype(np.float32)
    if rnd.specials:
        x = np.where(rng.random(x.shape) < 0.5, wild(rows, case.hidden, rnd.seed), x)
        x = np.where(np.isnan(x), np.float32(np.nan), x)
    with np.errstate(all="ignore"):
        return x.astype(oracle.DTYPES[dtype]).astype(np.float32).reshape(shape)


def tokens_of(case: Case, rnd: Round, rank: int) -> oracle.Tokens:
    """The dispatch call of `rank`."""
    rng, rows = number_generator(case, rnd, rank, 1), max_rows(case, rnd)
    count = int(rng.integers(0, rows + 1))
    if rnd.tokens is not None:
        count = min(rnd.tokens[rank % len(rnd.tokens)], rows)
    if rnd.active is not None and not rnd.active[rank]:
        count = 0
    x = values(case, rnd, rng, (count, case.hidden), input_dtype(case, rnd))
    weights = rng.random((count, case.top_k), np.float32)
    extra = {n: rng.integers(0, 256, (count, w), np.uint8) for n, w in case.extra.items()}
    payload = scales = None
    if rnd.source == "wire":  # any bytes at all, since they are only moved
        payload, scales = (
            rng.integers(0, 256, (count, n), np.uint8) for n in case.spec().row_bytes
        )
    return oracle.Tokens(x, choices(case, rnd, rank, count), weights, extra, payload, scales)


def input_dtype(case: Case, rnd: Round) -> str:
    if case.unquantized:
        return case.wire
    return "bf16" if rnd.source == "wire" else rnd.source


def output_dtype(case: Case, rnd: Round) -> str:
    return case.combine_wire if case.combine_wire in TORCH else rnd.output or "bf16"


def outputs_of(case: Case, rnd: Round, rank: int) -> np.ndarray:
    """y of `rank`: float32 [W, R, H]."""
    shape = (case.size, max_rows(case, rnd), case.hidden)
    y = values(case, rnd, number_generator(case, rnd, rank, 2), shape, output_dtype(case, rnd))
    rng = number_generator(case, rnd, rank, 3)
    for width in (1, 2, 4, 8) if rnd.ones else ():
        ones = rng.random((*shape[:2], case.hidden // width)) < 0.04
        y = np.where(ones.repeat(width, -1), np.float32(np.nan), y)
    return y


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """A copy whose strides are those of torch, which numpy's are not where there are no rows."""
    tensor = torch.from_numpy(array)
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def floats(array: np.ndarray, dtype: str) -> torch.Tensor:
    """float32 in `dtype`, NaN as the oracle writes it (torch's own casts write several)."""
    bits = np.ascontiguousarray(array).astype(oracle.DTYPES[dtype])
    return from_numpy(bits.view(np.int32 if dtype == "fp32" else np.int16)).view(TORCH[dtype])


def placed(tensor: torch.Tensor, strided: bool) -> torch.Tensor:
    """The same rows, or with gaps between them and off any alignment."""
    if not strided or tensor.dim() < 2:
        return tensor
    *lead, rows, width = tensor.shape
    shape = (*lead, rows + 2, width + 7)
    filler = torch.full(shape, 77, dtype=torch.uint8, device=tensor.device)
    wide = filler.to(tensor.dtype) if tensor.dtype != FP8 else filler.view(FP8)
    view = wide[..., 1 : rows + 1, 3 : width + 3]
    return view.copy_(tensor)


def same(what: str, got: object, want: np.ndarray, where: np.ndarray | None = None) -> None:
    """Equal bytes, or an AssertionError that says where not."""
    have = raw(got) if isinstance(got, torch.Tensor) else np.asarray(got)
    want = np.ascontiguousarray(want)
    want = want if have.dtype == want.dtype else want.view(np.uint8)
    if have.shape != want.shape:
        raise AssertionError(f"{what}: shape {have.shape}, expected {want.shape}")
    wrong = have != want
    if where is not None:
        wrong &= where.reshape(*where.shape, *[1] * (wrong.ndim - where.ndim))
    if wrong.any():
        at = tuple(int(i[0]) for i in wrong.nonzero())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} differ, first at {at}: "
            f"{have[at]!r}, expected {want[at]!r}"
        )


def same_values(what: str, got: torch.Tensor, want: np.ndarray, where=None) -> None:
    """Equal bits but for the payload of NaN; `want` in the dtype of `got`."""
    nan = np.isnan(want.astype(np.float32))
    same(f"NaN of {what}", torch.isnan(got).cpu().numpy(), nan, where)
    item = got.element_size()
    have = raw(got).reshape(*got.shape, item)
    bits = np.ascontiguousarray(want).view(np.uint8).reshape(*want.shape, item)
    cover = ~nan if where is None else ~nan & where[..., None]
    same(what, np.where(cover[..., None], have, 0), np.where(cover[..., None], bits, 0))


def call_of(case: Case, rnd: Round, mine: oracle.Tokens, device: torch.device) -> dict:
    """The arguments of the dispatch of `mine`, by name."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return placed(tensor.to(device), rnd.strided)

    call: dict = {}
    if rnd.source == "wire":
        storage, scale = STORAGE[case.wire], SCALES.get(case.wire, torch.uint8)
        call["x"] = there(from_numpy(mine.payload).view(storage))
        call["scales"] = there(from_numpy(mine.scales).view(scale))
    else:
        call["x"] = there(floats(mine.x, input_dtype(case, rnd)))
    ids = from_numpy(mine.ids).to(torch.int64 if rnd.wide_ids else torch.int32)
    call |= {"topk_ids": there(ids), "topk_weights": there(from_numpy(mine.weights))}
    if rnd.rows is not None:
        call["runtime_max_tokens"] = rnd.rows
    if rnd.active is not None:
        call["active_ranks"] = torch.tensor(rnd.active)
    if rnd.global_scale is not None:
        call["global_scale"] = torch.tensor(rnd.global_scale, device=device)
    if rnd.defer:
        call["defer"] = True
    if case.extra:
        call["extra"] = {name: there(from_numpy(rows)) for name, rows in mine.extra.items()}
    return call


def send(a2a: AllToAll, case: Case, rnd: Round, mine: oracle.Tokens) -> Received:
    return a2a.dispatch(**call_of(case, rnd, mine, a2a.device))


def expected(case: Case, rnd: Round, rank: int, tokens: list[oracle.Tokens]) -> oracle.Delivery:
    return oracle.dispatch(
        tokens,
        rank,
        max_rows(case, rnd),
        num_experts=case.experts,
        wire="bf16" if rnd.defer and not case.unquantized else case.wire,
        invalid=case.more.get("invalid_expert_id", -1),
        active=active_set(case, rnd),
        global_scale=1.0 if rnd.global_scale is None else rnd.global_scale,
        alignment=case.more.get("alignment", 32),
    )


def active_set(case: Case, rnd: Round) -> set[int]:
    flags = rnd.active or (True,) * case.size
    return {rank for rank in range(case.size) if flags[rank]}


def check_delivery(case: Case, rnd: Round, recv: Received, want: oracle.Delivery) -> None:
    real = want.real()
    everything = None if case.more.get("scrub") == "all" else real
    deferred = rnd.defer and not case.unquantized
    assert recv.x.dtype == (torch.bfloat16 if deferred else STORAGE[case.wire]), recv.x.dtype
    same("counts", recv.counts.cpu().numpy(), want.counts)
    same("topk_ids", recv.topk_ids.cpu().numpy(), want.ids)
    same("topk_weights", recv.topk_weights, want.weights)
    same("payload", recv.x, want.payload, everything)
    if want.scales.size or not (case.unquantized or deferred):
        assert recv.scales.dtype == SCALES.get(case.wire, torch.uint8), recv.scales.dtype
        same("scales", recv.scales, want.scales, everything)
    else:
        assert recv.scales is None
    assert set(recv.extra) == set(want.extra)
    for name, rows in want.extra.items():
        same(name, recv.extra[name], rows, real)
    views = [recv.x, recv.topk_ids, recv.topk_weights, *recv.extra.values()]
    assert all(view.is_contiguous() for view in views)
    check_reading(case, rnd, recv, want, real)


def check_reading(case: Case, rnd: Round, recv: Received, want: oracle.Delivery, real) -> None:
    """local_ids() and dequantize()"""
    owner = oracle.owners(case.experts, case.size)
    invalid = case.more.get("invalid_expert_id", -1)
    mine = [expert for expert, rank in enumerate(owner) if rank == recv.ep_rank]
    local = {expert: at for at, expert in enumerate(mine)}
    wanted = [local.get(i, invalid) for i in want.ids.reshape(-1).tolist()]
    same("local_ids", recv.local_ids().cpu().numpy().reshape(-1), np.array(wanted, np.int32))
    if rnd.source == "wire":
        return
    wire = "bf16" if rnd.defer and not case.unquantized else case.wire
    scale = 1.0 if rnd.global_scale is None else rnd.global_scale
    rows = oracle_formats.dequantize(want.payload, want.scales, wire, case.hidden, scale)
    same_values("dequantize()", recv.dequantize(), rows, real)


def answers(case: Case, rnd: Round, rank: int, counts: list[int]) -> torch.Tensor:
    """y of `rank`, with NaN in every row that must not be read."""
    y = floats(outputs_of(case, rnd, rank), output_dtype(case, rnd))
    for source, count in enumerate(counts):
        y[source, count:] = torch.nan
    if rnd.ones:
        y.view(torch.int32 if y.dtype == torch.float32 else torch.int16)[y.isnan()] = -1
    return y


def experts(a2a: AllToAll, case: Case, rnd: Round, rank: int, recv: Received) -> torch.Tensor:
    """`answers`, in the memory that the round wants."""
    y = answers(case, rnd, rank, recv.counts.tolist()).to(a2a.device)
    if rnd.memory == "buffer":
        default = TORCH.get(case.combine_wire, torch.bfloat16)
        return a2a.combine_buffer(None if y.dtype == default else y.dtype).copy_(y)
    return placed(y, rnd.memory == "strided")


def sums_of(case: Case, rnd: Round, rank: int, mine: oracle.Tokens) -> np.ndarray:
    """What `rank` gets back, in the dtype of its y."""
    return oracle.combine(
        mine,
        [outputs_of(case, rnd, peer) for peer in range(case.size)],
        rank,
        num_experts=case.experts,
        combine_wire=case.combine_wire,
        dtype=output_dtype(case, rnd),
        active=active_set(case, rnd),
    )


def opened(ranks: RankContext, backend: str, case: Case, **options) -> AllToAll:
    options = {"timeout": 40, "device": place_of(ranks, backend)} | options
    return AllToAll(case.spec(), ranks.group, backend=backend, **options)


def play(a2a: AllToAll, ranks: RankContext, case: Case, rnd: Round) -> str:
    """One round against the oracle; returns a digest of all that arrived."""
    tokens = [tokens_of(case, rnd, rank) for rank in range(case.size)]
    mine, want = tokens[ranks.rank], expected(case, rnd, ranks.rank, tokens)
    recv = send(a2a, case, rnd, mine)
    a2a.check()
    assert a2a.phase == "dispatched"
    check_delivery(case, rnd, recv, want)
    y = experts(a2a, case, rnd, ranks.rank, recv)
    out = None
    if rnd.memory == "strided":
        shape = (len(mine.x), case.hidden)
        out = placed(torch.full(shape, 5.0, dtype=y.dtype, device=y.device), True)
    result = a2a.combine(y, out=out)
    a2a.check()
    assert out is None or result is out
    assert a2a.phase == "idle"
    sums = sums_of(case, rnd, ranks.rank, mine)
    same_values("combine", result, sums)
    counted = raw(torch.nan_to_num(result.float(), nan=1.0)).tobytes()
    return hashlib.sha256(counted + want.payload.tobytes()).hexdigest()


def play_rounds(ranks: RankContext, backend: str, case: Case, rounds: list[Round], **options):
    """A rank function: opens, plays, closes; the digests of the rounds."""
    with opened(ranks, backend, case, **options) as a2a:
        assert a2a.backend == backend
        assert a2a.device == place_of(ranks, backend)
        assert (a2a.ep_rank, a2a.phase) == (ranks.rank, "idle")
        digests = []
        for number, rnd in enumerate(rounds):
            try:
                digests.append(play(a2a, ranks, case, rnd))
            except AssertionError as error:  # noqa: PERF203
                raise AssertionError(f"round {number} ({rnd}): {error}") from None
        return digests
