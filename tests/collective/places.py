"""Where a rank of a test is, and where all of them meet."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

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


def meet(ranks: RankContext, limit: float = 30.0) -> None:
    """Returns when all ranks have come, each with nothing left to run on its current stream."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    if not isinstance(ranks.group, LocalRank):
        dist.barrier(group=ranks.group)
        return
    store, deadline = ranks.group.store, time.monotonic() + limit
    come = store.add("tests/meet", 1)
    everyone = -(-come // ranks.size) * ranks.size  # of this meeting, the ones before included
    while store.add("tests/meet", 0) < everyone:
        assert time.monotonic() < deadline, f"the others did not come within {limit:g} s"
        time.sleep(0.0002)
