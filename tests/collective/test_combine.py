"""Combine: where y and out live, what is never read, and that the sum is always the same bits."""

from __future__ import annotations

import numpy as np
import torch

from moe_a2a import AllToAll, Spec
from moe_a2a.spec import COMBINE_WIRES
from tests import oracle
from tests.collective.places import place_of
from tests.collective.rounds import TORCH, Case, Round, opened, play, play_rounds
from tests.conftest import sizes


def test_y_and_out_in_any_memory(pool, every_backend):
    """Padding rows of y hold NaN in each of these rounds: see rounds.experts."""
    for combine_wire in COMBINE_WIRES:
        choices = ("bf16", "fp16", "fp32") if combine_wire not in TORCH else (None,)
        rounds = [
            Round(seed, memory=memory, output=output, specials=seed % 2 == 1, rows=4 + seed % 3)
            for seed, memory in enumerate(("buffer", "strided", "own", "buffer", "strided"))
            for output in choices
        ]
        case = Case(3, experts=7, top_k=4, combine_wire=combine_wire)
        pool.run(play_rounds, every_backend, case, rounds, ranks=3)


def combine_views(ranks, backend):
    """y as an expanded row, a transposed view and a slice of a larger tensor."""
    spec = Spec(ranks.size, 4, 2, 32, 4, combine_wire="fp32")
    place = place_of(ranks, backend)
    x = torch.zeros(3, 32, dtype=torch.bfloat16, device=place)
    ids = torch.tensor([[0, 3], [1, 2], [0, 1]], device=place)
    with AllToAll(spec, ranks.group, backend=backend, device=place, timeout=10) as a2a:
        row = torch.arange(32.0, device=place)
        rows = row.expand(ranks.size, 4, 32)
        transposed = row.repeat(4, ranks.size, 1).transpose(0, 1)
        sliced = row.repeat(ranks.size + 1, 6, 1)[1:, 1:5]
        for y in (rows, transposed, sliced):
            a2a.dispatch(x, ids, torch.ones(3, 2, device=place))
            out = a2a.combine(y)
            distinct = torch.tensor(
                [[2.0], [2.0], [1.0]], device=place
            )  # two ranks, two experts each
            assert torch.equal(out, distinct * row)


def test_y_may_be_expanded_transposed_or_sliced(pool, every_backend):
    pool.run(combine_views, every_backend, ranks=2)


def buffers(ranks, backend):
    spec = Spec(ranks.size, 4, 2, 128, 5, combine_wire="mxfp8")
    place = place_of(ranks, backend)
    none = (
        torch.zeros(0, 128, dtype=torch.bfloat16, device=place),
        torch.zeros(0, 2, dtype=torch.int32, device=place),
        torch.zeros(0, 2, device=place),
    )
    with AllToAll(spec, ranks.group, backend=backend, device=place, timeout=10) as a2a:
        seen = set()
        for rows in (5, 2, 0, 5):
            a2a.dispatch(*none, runtime_max_tokens=rows)
            default = a2a.combine_buffer()
            assert default.shape == (ranks.size, rows, 128)
            assert default.dtype == torch.bfloat16
            assert default.is_contiguous()
            assert a2a.combine_buffer(torch.float32).dtype == torch.float32
            assert a2a.combine_buffer(torch.float16).dtype == torch.float16
            seen |= {default.data_ptr()} if rows else set()
            assert a2a.combine(default).shape == (0, 128)
        assert len(seen) == 1, "the buffer is kept from round to round"
        assert a2a.backend == backend


def test_combine_buffer_has_the_shape_of_the_round(pool, every_backend):
    pool.run(buffers, every_backend, ranks=2)


def sum_in_order(ranks, backend, combine_wire, dtype):
    """Values whose fp32 sum depends on the order, on fusing, and on rounding more than once."""
    size, hidden, tokens = ranks.size, 128, 6
    spec = Spec(size, size, size, hidden, tokens, combine_wire=combine_wire)
    rng = np.random.default_rng(5)
    power = rng.integers(-12, 13, (size, size, tokens, hidden))
    outputs = np.ldexp(rng.standard_normal(power.shape), power)
    if dtype != "fp32":  # a large term that comes and goes shows the order even in few bits
        outputs = rng.standard_normal(power.shape)
        outputs[1], outputs[-2] = 2.0**15, -(2.0**15)
    outputs = outputs.astype(oracle.DTYPES[dtype]).astype(np.float32)
    ids = np.tile(np.arange(size)[::-1], (tokens, 1))  # order of choices is not rank order
    given = oracle.Tokens(np.zeros((tokens, hidden), np.float32), ids, np.ones(ids.shape))
    want = oracle.combine(
        given,
        list(outputs),
        ranks.rank,
        num_experts=size,
        combine_wire=combine_wire,
        dtype=dtype,
    )
    place = place_of(ranks, backend)
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=place)
    y = torch.from_numpy(outputs[ranks.rank]).to(place, TORCH[dtype])
    choices = torch.from_numpy(ids.copy()).to(place)
    with AllToAll(spec, ranks.group, backend=backend, device=place, timeout=10) as a2a:
        a2a.dispatch(x, choices, torch.ones(tokens, size, device=place))
        out = a2a.combine(y)
    assert np.array_equal(out.float().cpu().numpy(), want.astype(np.float32))
    backwards = np.zeros((tokens, hidden), np.float32)
    for rows in outputs[::-1, ranks.rank]:
        backwards += rows
    return bool((backwards.astype(oracle.DTYPES[dtype]) != want).any())


def test_sum_is_fp32_in_rank_order_rounded_once(pool, every_backend):
    for combine_wire in COMBINE_WIRES:
        dtype = combine_wire if combine_wire in TORCH else "fp32"
        (most,) = sizes(every_backend, 8) or (4,)
        differs = pool.run(sum_in_order, every_backend, combine_wire, dtype, ranks=most)
        assert all(differs), f"these values would not notice another order ({combine_wire})"


def negative_zeros(ranks, backend):
    spec = Spec(ranks.size, ranks.size, 2, 32, 2, combine_wire="fp32")
    place = place_of(ranks, backend)
    x = torch.zeros(2, 32, dtype=torch.bfloat16, device=place)
    ids = torch.tensor([[0, 1], [-1, 99]], device=place)
    with AllToAll(spec, ranks.group, backend=backend, device=place, timeout=10) as a2a:
        a2a.dispatch(x, ids, torch.ones(2, 2, device=place))
        out = torch.full((2, 32), torch.nan, device=place)
        a2a.combine(torch.full((ranks.size, 2, 32), -0.0, device=place), out=out)
    assert torch.equal(out.cpu(), torch.zeros(2, 32))
    assert not torch.signbit(out).any(), "the sum starts at +0.0, and nowhere combines to +0.0"


def test_sum_starts_from_positive_zero(pool, every_backend):
    pool.run(negative_zeros, every_backend, ranks=2)


def flushed(ranks, backend, case, rounds):
    torch.set_flush_denormal(True)
    try:
        with opened(ranks, backend, case, timeout=10) as a2a:
            for number, rnd in enumerate(rounds):
                recv, out = bare_round(a2a, ranks, case, rnd)
                torch.set_flush_denormal(False)
                assert (recv, out) == bare_round(a2a, ranks, case, rnd), (number, rnd)
                torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(False)


def bare_round(a2a, ranks, case, rnd):
    """Bytes that arrive, for inputs full of subnormals that only integer operations touch."""
    rng = np.random.default_rng(rnd.seed)
    bits = rng.integers(0, 1 << 24, (case.capacity, case.hidden), np.int64).astype(np.int32)
    x = torch.from_numpy(bits).view(torch.float32)
    ids = torch.arange(case.capacity)[:, None] % case.experts
    recv = a2a.dispatch(x, ids, torch.ones(case.capacity, 1))
    arrived = recv.x.view(torch.uint8).numpy().tobytes() + recv.scales.numpy().tobytes()
    wide = rng.integers(0, 1 << 24, (case.size, case.capacity, case.hidden), np.int64)
    y = torch.from_numpy(wide.astype(np.int32)).view(torch.float32)
    return arrived, a2a.combine(y).view(torch.int32).numpy().tobytes()


def test_flush_to_zero_in_the_caller_changes_nothing(pool, backend):
    for wire in ("fp8", "mxfp8", "nvfp4", "mxfp4"):
        case = Case(2, top_k=1, wire=wire, combine_wire="fp32", more={"scrub": "all"})
        pool.run(flushed, backend, case, [Round(1), Round(2)], ranks=2)


def repeat(ranks, backend, case, rnd):
    with opened(ranks, backend, case, timeout=10) as a2a:
        return {play(a2a, ranks, case, rnd) for _ in range(5)}


def test_the_same_round_gives_the_same_bits(pool, every_backend):
    case = Case(4, experts=9, top_k=5, wire="nvfp4", combine_wire="fp8_block128")
    for digests in pool.run(repeat, every_backend, case, Round(4, output="fp32"), ranks=4):
        assert len(digests) == 1
