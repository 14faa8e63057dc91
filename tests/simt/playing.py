"""Rank functions that play rounds with the kernels on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.collective.rounds import play_rounds
from tests.simt.backend import register
from tests.simt.build import supported

KINDS = ("simt", "simt16")
NEEDS = [
    pytest.mark.skipif(not supported(), reason="fibers are switched in x86-64 assembly"),
    pytest.mark.usefixtures("compiled"),
]


def play_case(ranks, kind, case, rounds, **options):
    """A rank function."""
    register()
    return play_rounds(ranks, kind, case, rounds, **options)


def limited(ranks, blocks, case, rounds):
    return play_case(ranks, "simt", case, rounds, max_blocks=blocks)


def on_a_device(ranks, multiprocessors, kind, case, rounds, played=play_case):
    """Of so many multiprocessors, which the ranks divide between them."""
    os.environ["MOE_SIMT_MULTIPROCESSORS"] = str(multiprocessors)
    try:
        return played(ranks, kind, case, rounds)
    finally:
        del os.environ["MOE_SIMT_MULTIPROCESSORS"]


def inputs(case, rows):
    x = torch.zeros(rows, case.hidden, dtype=torch.bfloat16)
    ids = torch.zeros(rows, case.top_k, dtype=torch.int32)
    return x, ids, torch.ones(rows, case.top_k)
