"""Whole layers over `shm` against one process in float64: every wire, every weight format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import oracle_experts as oracle
from tests.collective.layers import Case, emulated, plain, play_all, play_deferred_too
from tests.oracle_formats import WIRES

QUANTIZED = [wire for wire in WIRES if wire not in ("bf16", "fp16")]
FP4 = ("nvfp4", "mxfp4")


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the ranks; threads that share two cores with them would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outputs(pool, size, cases):
    """[T, H] of each case, all ranks' tokens one after the other."""
    by_rank = pool.run(play_all, cases, ranks=size)
    return [np.concatenate(parts) for parts in zip(*by_rank, strict=True)]


def check_emulated(case, out):
    """Against the same quantizations in float64: only rounding is left."""
    assert oracle.far_rows(out, emulated(case)[0], 1e-7) <= 2, case


@pytest.mark.parametrize("wire", WIRES)
def test_every_wire_and_weight_format(pool, wire):
    cases = [Case(wire, form, biased=bool(n % 2)) for n, form in enumerate(oracle.FORMATS)]
    for case, out in zip(cases, outputs(pool, 2, cases), strict=True):
        fp4, wanted = wire in FP4 or case.weight in FP4, plain(case)
        tolerance = 0.1 if fp4 else 3e-2
        np.testing.assert_allclose(out, wanted, tolerance, tolerance, err_msg=str(case))
        assert oracle.distance(out, wanted) < (0.06 if fp4 else 0.01), case
        check_emulated(case, out)


def test_activations_other_than_the_weights(pool):
    cases = [Case("mxfp8", "mxfp4", activations="mxfp8"), Case("bf16", "mxfp4", activations="bf16")]
    cases += [Case("fp8", "nvfp4", activations="bf16"), Case("bf16", "bf16", activations="nvfp4")]
    for case, out in zip(cases, outputs(pool, 2, cases), strict=True):
        check_emulated(case, out)
        own = replace(case, activations=None)
        assert oracle.distance(out, emulated(own)[0]) > 1e-4, "activations= made no difference"


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_number_of_ranks_makes_no_difference(pool, top_k):
    pairs = [("bf16", "bf16"), ("mxfp8", "mxfp4"), ("nvfp4", "nvfp4")]
    cases = [
        Case(wire, form, combine_wire=back, top_k=top_k)
        for wire, form in pairs
        for back in ("bf16", "fp32")
    ]
    alone = outputs(pool, 1, cases)
    for size in (2, 3, 4):
        for case, one, out in zip(cases, alone, outputs(pool, size, cases), strict=True):
            if top_k == 1:
                np.testing.assert_array_equal(out, one, err_msg=f"{size} ranks, {case}")
                continue
            # Each partial sum is rounded, and the sum of them; alone there is but one.
            unit = 2.0**-8 if case.combine_wire == "bf16" else 2.0**-22
            assert (np.abs(out - one) <= 3.2 * unit * emulated(case)[1]).all(), (size, case)


def test_ranks_that_own_no_expert(pool):
    case = Case("mxfp8", "mxfp4", experts=2)
    (out,) = outputs(pool, 4, [case])
    check_emulated(case, out)


@pytest.mark.parametrize("wire", QUANTIZED)
def test_deferring_gives_the_same_bits_as_quantizing_first(pool, wire):
    case = Case(wire, "bf16", activations=wire, defer=True)
    for first, later in pool.run(play_deferred_too, case, ranks=2):
        np.testing.assert_array_equal(first, later)
    # It is the quantization that makes them equal: without, deferred rows are another result.
    unquantized = replace(case, activations="bf16")
    pairs = pool.run(play_deferred_too, unquantized, ranks=2)
    assert all((first != later).any() for first, later in pairs)


def test_what_padding_rows_hold_is_never_seen(pool):
    poisoned = [Case(wire) for wire in WIRES]
    clean = [replace(case, poison=False) for case in poisoned]
    for dirty, other in zip(outputs(pool, 2, poisoned), outputs(pool, 2, clean), strict=True):
        assert np.isfinite(dirty).all()
        np.testing.assert_array_equal(dirty, other)
