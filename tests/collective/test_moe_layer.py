"""`MoELayer` on real ranks: against one process in float64, over any wire, backend and number of
ranks; test_experts.py has the weight formats and the parts one by one."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle_experts as oracle
from tests.collective.layers import Case, emulated, plain
from tests.collective.whole_layers import (
    FACTOR,
    play_behind_nan,
    play_by_hand,
    play_deferring,
    play_grouped,
    play_layers,
    shared_rows,
)
from tests.conftest import CPU_BACKENDS
from tests.oracle_formats import WIRES

FP4 = ("nvfp4", "mxfp4")
QUANTIZED = [wire for wire in WIRES if wire not in ("bf16", "fp16")]


def outputs(pool, backend, size, cases):
    """By what was asked for: [T, H] of each case, all ranks' tokens one after the other."""
    by_rank = pool.run(play_layers, backend, cases, ranks=size)
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*by_rank, strict=True)
    ]


@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_against_float64(pool, every_backend, wire):
    cases = [Case(wire, "bf16"), Case(wire, "mxfp4", biased=False, combine_wire="bf16")]
    size = 3  # one of which has no tokens
    by_hand = pool.run(play_by_hand, cases, ranks=size)
    for n, (case, found) in enumerate(
        zip(cases, outputs(pool, every_backend, size, cases), strict=True)
    ):
        check_close(case, found)
        if every_backend in CPU_BACKENDS:
            one_by_one = np.concatenate([part[n] for part in by_hand])
            np.testing.assert_array_equal(found["plain"], one_by_one)


def check_close(case, found):
    routed, shared = plain(case), shared_rows().astype(np.float64)
    wanted = {
        "plain": routed,
        "narrow": routed,
        "scaled": routed * FACTOR,
        "shared": routed + shared,
        "both": routed * FACTOR + shared,
    }
    assert found.keys() == wanted.keys()
    fp4 = case.wire in FP4 or case.weight in FP4
    tolerance, apart = (0.1, 0.06) if fp4 else (3e-2, 0.01)
    for name, want in wanted.items():
        size = FACTOR if name in ("scaled", "both") else 1.0  # of the routed part, and its error
        np.testing.assert_allclose(
            found[name], want, tolerance, tolerance * size, err_msg=f"{case}, {name}"
        )
        assert oracle.distance(found[name], want) < apart, (case, name)


def test_the_factor_and_the_shared_experts_count_once(pool, every_backend):
    """To the bit: f32(combined) * factor + shared, rounded once more."""
    cases = [Case(combine_wire=wire) for wire in ("fp32", "bf16")]
    for case, found in zip(cases, outputs(pool, every_backend, 2, cases), strict=True):
        routed, shared = found["plain"], shared_rows()
        scaled = routed * np.float32(FACTOR)
        to_wire = (lambda x: x) if case.combine_wire == "fp32" else oracle.bf16
        for name, want in (
            ("scaled", scaled),
            ("shared", routed + shared),
            ("both", scaled + shared),
            ("narrow", routed),
        ):
            np.testing.assert_array_equal(found[name], to_wire(want), err_msg=name)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_number_of_ranks_makes_no_difference(pool, every_backend, top_k):
    pairs = [("bf16", "bf16", "bf16"), ("mxfp8", "mxfp4", "fp32"), ("nvfp4", "nvfp4", "bf16")]
    cases = [Case(wire, form, combine_wire=back, top_k=top_k) for wire, form, back in pairs]
    alone = outputs(pool, every_backend, 1, cases)
    for size in (2, 3, 4):
        several = outputs(pool, every_backend, size, cases)
        for case, one, found in zip(cases, alone, several, strict=True):
            if top_k == 1:
                for name, want in one.items():
                    np.testing.assert_array_equal(found[name], want, err_msg=f"{size}, {name}")
                continue
            unit = 2.0**-8 if case.combine_wire == "bf16" else 2.0**-22
            limit = 3.2 * unit * emulated(case)[1]
            assert (np.abs(found["plain"] - one["plain"]) <= limit).all(), (size, case)


def test_ranks_without_experts(pool, every_backend):
    (found,) = outputs(pool, every_backend, 4, [case := Case("mxfp8", "bf16", experts=2)])
    check_close(case, found)


@pytest.mark.parametrize("back", ["fp32", "fp16", "mxfp8"])
def test_experts_that_leave_the_sum_to_combine_grouped(pool, every_backend, back):
    case, size = Case("mxfp8", "bf16", combine_wire=back, top_k=3), 3
    plainly = outputs(pool, every_backend, size, [case])[0]
    for parts in zip(*pool.run(play_grouped, every_backend, case, ranks=size), strict=True):
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        check_close(case, found)
        if back != "mxfp8":  # otherwise the fp32 sum was quantized, not its bf16
            for name, rows in found.items():
                np.testing.assert_allclose(rows, plainly[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("wire", QUANTIZED)
def test_experts_that_quantize_by_themselves_get_unquantized_rows(pool, every_backend, wire):
    case = Case(wire, "bf16", activations=wire, defer=True)
    for first, later in pool.run(play_deferring, every_backend, case, ranks=2):
        np.testing.assert_array_equal(first, later)


@pytest.mark.parametrize("wire", WIRES)
def test_what_a_round_leaves_in_padding_rows_is_never_seen(pool, every_backend, wire):
    for naive in (False, True):
        case, scrub = Case(wire), "all" if naive else "ids"
        for fresh, behind in pool.run(play_behind_nan, every_backend, case, naive, scrub, ranks=2):
            assert np.isfinite(behind).all()
            np.testing.assert_array_equal(fresh, behind)


def test_experts_that_skip_nothing_see_stale_rows_without_scrubbing(pool):
    """What makes the test above one of scrub="all"."""
    found = pool.run(play_behind_nan, "shm", Case(), True, "ids", ranks=2)
    assert any(np.isnan(behind).any() for _, behind in found)
