"""Whole layers with Triton's experts on ranks that are processes, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from moe_a2a.experts.mxfp4_w4a4 import Mxfp4W4A4
from moe_a2a.experts.triton_w4a16 import TritonW4A16
from tests import oracle_experts as oracle
from tests.collective.layers import Case, plain
from tests.collective.whole_layers import play_layer


def w4a16(spec, place, held, *, activations):
    return TritonW4A16(spec, place, held)


def w4a4(spec, place, held, *, activations):
    return Mxfp4W4A4(spec, place, held)


@pytest.mark.parametrize("kind", [w4a16, w4a4])
def test_any_number_of_ranks_gives_what_one_does(pool, kind):
    case = Case("mxfp8", "mxfp4", top_k=1, combine_wire="bf16", defer=kind is w4a4)
    found = []
    for size in (1, 2, 3, 4):
        parts = pool.run(play_layer, "shm", case, kind, ranks=size)
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    for several in found[1:]:
        for name, rows in several.items():
            np.testing.assert_array_equal(rows, found[0][name], err_msg=name)
    assert oracle.distance(found[0]["plain"], plain(case)) < 0.06
