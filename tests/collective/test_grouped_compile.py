"""torch.compile(fullgraph=True) around group, gather and combine_grouped: what eager code gives."""

from __future__ import annotations

import pytest
import torch

from moe_a2a import AllToAll
from moe_a2a.errors import PayloadError, StateError
from tests.collective.test_compile import (
    CAPACITY,
    COMPILERS,
    LIMIT,
    SLOW,
    H,
    compiled,
    inputs,
    same,
    spec,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


def layer_of(a2a):
    def layer(x, ids, weights):
        recv = a2a.dispatch(x, ids, weights)
        lists = recv.group(8)
        rows, _ = recv.gather(lists)
        # Powers of two and small integers: a compiler may fuse them as it likes.
        y = rows * 0.5 + (lists.row_index[:, None] & 3)
        out = a2a.combine_grouped(y.to(rows.dtype), lists)
        return out, lists.expert_offsets, lists.row_index, lists.row_weights, lists.positions

    return layer


def play_layers(ranks, backend, compiler):
    with AllToAll(spec(ranks.size), ranks.group, backend=backend, timeout=LIMIT) as a2a:
        eager = layer_of(a2a)
        fast = compiled(eager, compiler)
        for number, tokens in enumerate((3, 3, 5, 2, CAPACITY)):
            given = inputs(tokens, 10 * number + ranks.rank)
            got = fast(*given)
            assert a2a.phase == "idle"
            same(got, eager(*given))
            assert got[0].unique().numel() > 8, "this compares constants"


@pytest.mark.slow
@SLOW
@pytest.mark.parametrize("compiler", COMPILERS)
def test_layers(pool, compiler):
    backend = "collective" if compiler == "eager" else "shm"
    pool.run(play_layers, backend, compiler, ranks=2, timeout=LIMIT)


def test_errors_are_those_of_eager_code():
    with AllToAll(spec(1, combine_wire="mxfp8")) as a2a:
        layer = compiled(lambda rows, lists: a2a.combine_grouped(rows, lists), "aot_eager")
        x, ids, weights = inputs(4)
        lists = a2a.dispatch(x, ids, weights).group(8)
        rows = torch.zeros(len(lists.row_index), H)
        with pytest.raises(PayloadError, match="rows is float32"):
            layer(rows[1:].clone(), lists)
        out = layer(rows, lists)
        assert out.shape == (4, H) and out.dtype == torch.float32 and not out.any()
        with pytest.raises(StateError, match="combine_grouped in phase 'idle'"):
            layer(rows, lists)
