"""Rows by local expert, and back: held to a slow loop over choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_a2a import AllToAll, Grouped, Received, Spec
from moe_a2a.errors import GeometryError, PayloadError
from moe_a2a.grouped import weighted_sums
from tests import oracle_grouped as oracle
from tests.collective.rounds import SCALES, STORAGE, from_numpy, same, same_values

SHAPES = [  # W, R, K, E, rank
    (1, 9, 2, 8, 0),
    (3, 7, 4, 10, 1),
    (2, 40, 8, 64, 1),
    (4, 5, 1, 3, 3),  # a rank without experts
    (3, 6, 3, 3, 2),  # one expert here
    (2, 1, 6, 31, 0),
]


def received(
    size, rows, top_k, experts, rank, *, seed=0, counts=None, wire="bf16", ids=None, hidden=64
):
    """As a dispatch would leave it; padding rows name experts here, so that reading them shows."""
    rng = np.random.default_rng([seed, size, rows, top_k])
    spec = Spec(size, experts, top_k, hidden, max(rows, 1), wire=wire)
    counts = rng.integers(0, rows + 1, size) if counts is None else np.array(counts)
    drawn = rng.integers(-1, experts, (size, rows, top_k)) if ids is None else np.array(ids)
    payload, scales = (
        from_numpy(rng.integers(0, 256, (size, rows, width), np.uint8)) for width in spec.row_bytes
    )
    return Received(
        x=payload.view(STORAGE[wire]),
        scales=scales.view(SCALES.get(wire, torch.uint8)) if spec.quantized else None,
        topk_ids=from_numpy(drawn.astype(np.int32)),
        topk_weights=from_numpy(rng.random((size, rows, top_k), np.float32)),
        counts=from_numpy(counts.astype(np.int32)),
        extra={},
        global_scale=None,
        spec=spec,
        ep_rank=rank,
        deferred=False,
    )


def wanted(recv: Received, align: int) -> oracle.Lists:
    own = recv.spec.experts_of(recv.ep_rank)
    parts = (recv.topk_ids, recv.topk_weights, recv.counts)
    return oracle.group(*(part.numpy() for part in parts), own, align)


def check_lists(got: Grouped, want: oracle.Lists) -> None:
    for name, array in want._asdict().items():
        tensor = getattr(got, name)
        assert tensor.is_contiguous(), name
        same(name, tensor.numpy(), array)


def as_int32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("align", [1, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_listed_by_expert(shape, align):
    for seed in range(4):
        recv = received(*shape, seed=seed)
        check_lists(recv.group(align), wanted(recv, align))
    full = received(*shape, counts=[shape[1]] * shape[0], seed=9)
    try:
        lists = full.group(align)
    except PayloadError:  # drawn twice in one row: there was no room
        assert -2 in wanted(full, align).positions
    else:
        check_lists(lists, wanted(full, align))


def test_the_default_is_128():
    recv = received(2, 6, 2, 4, 0)
    check_lists(recv.group(), wanted(recv, 128))


def test_each_expert_has_its_own_rows():
    """Spelled out: source, then slot, then choice; offsets, gaps, weights."""
    ids = [[[4, 1], [5, 4], [4, 4]], [[5, 5], [4, 0], [4, 4]]]
    recv = received(2, 3, 2, 8, 1, ids=ids, counts=[2, 2])
    got, w = recv.group(4), recv.topk_weights
    assert got.expert_offsets.tolist() == [0, 4, 8, 8, 8]
    index = got.row_index.tolist()
    assert index[:8] == [0, 1, 4, -1, 1, 3, 3, -1]
    assert set(index[8:]) == {-1}
    assert got.positions.tolist() == [[0, -1], [4, 1], [-1, -1], [5, 6], [2, -1], [-1, -1]]
    weights = [w[0, 0, 0], w[0, 1, 1], w[1, 1, 0], 0, w[0, 1, 0], w[1, 0, 0], w[1, 0, 1], 0]
    assert got.row_weights.tolist()[:8] == [float(weight) for weight in weights]
    assert not got.row_weights[8:].any()


def test_no_experts_and_no_rows():
    none = received(4, 5, 2, 3, 3, counts=[5] * 4).group(32)
    assert none.expert_offsets.tolist() == [0]
    assert none.row_index.shape == none.row_weights.shape == (0,)
    assert (none.positions == -1).all() and none.positions.shape == (20, 2)
    empty = received(2, 0, 2, 4, 0)
    lists = empty.group(32)
    assert lists.expert_offsets.tolist() == [0, 0, 0]
    assert lists.row_index.tolist() == [-1] * 62
    assert lists.positions.shape == (0, 2)
    rows, scales = empty.gather(lists)
    assert rows.shape == (62, 64) and not rows.any() and scales is None


def test_an_expert_named_twice_stands_twice_while_there_is_room():
    twice = received(1, 4, 2, 2, 0, ids=[[[1, 1], [0, 0], [1, 0], [1, 1]]], counts=[4])
    check_lists(twice.group(1), wanted(twice, 1))
    over = received(2, 2, 2, 2, 0, ids=[[[0, 0]] * 2] * 2, counts=[2, 1])
    with pytest.raises(PayloadError, match=r"align=1.*twice.*4 places"):
        over.group(1)
    with_gaps = over.group(8)  # eleven places, eight up to the last multiple
    check_lists(with_gaps, wanted(over, 8))
    full = replace(over, counts=torch.tensor([2, 2], dtype=torch.int32))
    check_lists(full.group(8), wanted(full, 8))
    with pytest.raises(PayloadError, match="8 places"):
        full.group(5)


@pytest.mark.parametrize("align", [0, -1, 2.0, "8", True, None, 2**31, 10**30])
def test_align_is_a_positive_integer(align):
    recv = received(2, 3, 2, 4, 0)
    with pytest.raises(GeometryError, match="align=") as caught:
        recv.group(align)
    assert repr(align) in str(caught.value)


def test_the_list_has_an_end():
    with pytest.raises(GeometryError, match="at most 2,147,483,647"):
        received(1, 3, 2, 4, 0).group(2**30)


@pytest.mark.parametrize("wire", ["bf16", "fp16", "fp8", "fp8_block128", "mxfp8", "nvfp4", "mxfp4"])
def test_rows_are_gathered(wire):
    recv = received(3, 9, 3, 7, 1, wire=wire, hidden=128)
    lists = recv.group(16)
    rows, scales = recv.gather(lists)
    assert rows.dtype == recv.x.dtype
    want = oracle.gather(as_int32(recv.x.flatten(0, 1)), lists.row_index.numpy())
    same("rows", as_int32(rows), want)
    if recv.scales is None:
        assert scales is None
        return
    assert scales.dtype == recv.scales.dtype
    want = oracle.gather(as_int32(recv.scales.flatten(0, 1)), lists.row_index.numpy())
    same("scales", as_int32(scales), want)


def test_gather_wants_the_lists_of_this_round():
    recv, other = received(2, 6, 2, 4, 0), received(2, 5, 2, 4, 0)
    lists = replace(other.group(), round=None)
    with pytest.raises(PayloadError, match=r"positions is int32 \[10, 2\].*\[12, 2\]"):
        recv.gather(lists)
    with pytest.raises(PayloadError, match=r"grouped is list.*recv\.group\(\)"):
        recv.gather([1])


def test_sums_of_weighted_rows():
    recv = received(3, 9, 8, 12, 1)
    lists = recv.group(8)
    rows = torch.randn(len(lists.row_index), 64) * torch.exp2(torch.randint(-9, 9, (64,)))
    rows[lists.row_index < 0] = torch.nan  # what stands in gaps is never read
    want = oracle.sums(rows.numpy(), wanted(recv, 8), "fp32")
    same_values("sums", weighted_sums(rows, lists, 0, 27), want)
    same_values("some sums", weighted_sums(rows, lists, 9, 5), want[9:14])
    assert np.isfinite(want).all()


def test_rows_without_a_place_are_nan():
    recv = received(1, 2, 2, 2, 0)
    lists = recv.group(1)
    for lost in (-2, 4, 2**31 - 1):
        lists.positions.copy_(torch.tensor([[0, lost], [1, -1]]))
        total = weighted_sums(torch.ones(4, 64), lists, 0, 2)
        assert total[0].isnan().all() and total[1].isfinite().all()


def test_lists_of_another_round_are_refused():
    drawn = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 64, generator=drawn).bfloat16(), torch.rand(6, 2, generator=drawn)
    with AllToAll(Spec(1, 8, 2, 64, 8)) as a2a:
        ids = torch.rand(6, 8, generator=drawn).topk(2).indices
        old = a2a.dispatch(x[:3], ids[:3], weights[:3]).group(8)
        a2a.combine_grouped(torch.zeros(len(old.row_index), 64).bfloat16(), old)
        recv = a2a.dispatch(x, ids, weights)
        with pytest.raises(PayloadError, match="another round"):
            recv.gather(old)
        with pytest.raises(PayloadError, match="another round"):
            a2a.combine_grouped(torch.zeros(len(old.row_index), 64).bfloat16(), old)
        lists = recv.group(8)
        rows, _ = recv.gather(lists)
        a2a.combine_grouped(rows, lists)
