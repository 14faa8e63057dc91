"""Which device a rank of a test is on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from moe_a2a.testing import LocalRank

if TYPE_CHECKING:
    from moe_a2a.testing import RankContext

CPU = torch.device("cpu")


def place_of(ranks: RankContext, backend: str) -> torch.device:
    """The CPU, or with a CUDA backend: where the thread is, or GPU `rank` modulo their number."""
    if backend != "nvlink":
        return CPU
    if not isinstance(ranks.group, LocalRank):
        if not torch.cuda.is_initialized():
            # Several processes of one GPU are wanted here, and not every kernel of torch in each.
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            os.environ["CUDA_MODULE_LOADING"] = "LAZY"
        torch.cuda.set_device(ranks.rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
