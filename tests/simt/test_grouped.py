"""Rows by local expert with the CUDA kernels on the CPU: the lists, and combine_grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_a2a import Grouped
from moe_a2a.grouped import Choices, listed
from tests import oracle_grouped as oracle
from tests.collective.rounds import same
from tests.simt.backend import library
from tests.simt.playing import NEEDS

pytestmark = NEEDS


def drawn(size, rows, top_k, experts, seed, most=None):
    """Choices of experts 3 to 3 + experts, and of others; padding rows name some of them too."""
    rng = np.random.default_rng([seed, size, rows, top_k, experts])
    ids = rng.integers(-1, most or experts + 6, (size, rows, top_k))
    if seed % 2:  # nearly all to a few experts
        ids = np.where(rng.random(ids.shape) < 0.8, 3 + ids % 4, ids)
    weights = rng.random(ids.shape, np.float32)
    counts = rng.integers(rows // 2, rows + 1, size) if rows else np.zeros(size)
    return ids.astype(np.int32), weights, counts.astype(np.int32)


def check(given, experts, align, first=3):
    choices = Choices(*(torch.from_numpy(array.copy()) for array in given), first, experts)
    got = Grouped(*listed(choices, align, library()))
    want = oracle.group(*given, range(first, first + experts), align)
    for name, array in want._asdict().items():
        same(f"{name} of {choices.topk_ids.shape}", getattr(got, name).numpy(), array)
    return want


@pytest.mark.parametrize("align", [1, 32, 128])
def test_lists_are_those_of_the_cpu(align):
    shapes = [(1, 1, 1, 1), (2, 9, 3, 5)]
    shapes += [(3, 40, 8, 64), (4, 5, 2, 0), (2, 0, 4, 7), (2, 70, 32, 33)]
    for seed, (size, rows, top_k, experts) in enumerate(shapes * 2):
        check(drawn(size, rows, top_k, experts, seed), experts, align)


def test_many_segments():
    """Several passes of a warp over its own segment; more segments than lanes."""
    check(drawn(4, 1100, 8, 40, 2), 40, 128)
    check(drawn(2, 600, 8, 256, 3), 256, 16)


def test_more_experts_than_shared_memory_holds():
    check(drawn(1, 300, 8, 8300, 2), 8300, 4)


def test_choices_without_a_place():
    given = drawn(2, 30, 4, 2, 2, most=5)
    given[0][:, :, :] = np.where(given[0] < 3, 3, given[0])
    given[2][:] = 30
    for align in (1, 8, 50):
        want = check(given, 2, align)
        assert (want.positions == -2).any()
        assert want.expert_offsets[-1] == len(want.row_index) // align * align
