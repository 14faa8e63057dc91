"""How a rank of the benchmark joins the others: gloo for CPU tensors, NCCL beside it for GPUs'."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moe_a2a.bench.cases import UsageError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["connect", "gpu_count", "shares_gpu"]


def gpu_count() -> int:
    """GPUs that this process sees; takes none of them into use."""
    return torch.cuda.device_count()


def shares_gpu() -> bool:
    """Whether ranks of this group share a GPU: times then mean nothing, and NCCL refuses."""
    return dist.is_initialized() and _ranks_here(dist.get_world_size()) > max(gpu_count(), 1)


def _ranks_here(size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def connect(
    device: str, rank: int | None = None, size: int | None = None, store: TCPStore | None = None
) -> None:
    """Initializes the default group; without ``store`` as torchrun's environment says.

    Raises:
        UsageError: no GPU.
    """
    place: dict[str, Any] = {"timeout": timedelta(minutes=10)}
    if store is not None:
        place.update(store=store, rank=rank, world_size=size)
    if device == "cpu":
        dist.init_process_group("gloo", **place)
        return
    gpus = gpu_count()
    if not gpus:
        raise UsageError("--device cuda, and torch sees no GPU")
    here = int(os.environ["LOCAL_RANK"]) if store is None else rank
    assert here is not None
    torch.cuda.set_device(here % gpus)
    if _ranks_here(size or int(os.environ["WORLD_SIZE"])) > gpus:
        # torch looks at this when it maps a peer's memory: not before, so it is not too late.
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("gloo", **place)
    else:
        # Both, so that objects and host barriers do not go through the GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl", **place)
