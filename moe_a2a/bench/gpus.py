"""The GPUs of a run, for the JSON."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch
import torch.distributed as dist

from moe_a2a._build import cuda_compiler
from moe_a2a.errors import BuildError

__all__ = ["gpu_facts"]

# Settings of others that change what rivals and peers' memory do.
_SETTINGS = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "CUDA_VISIBLE_DEVICES")


def gpu_facts(ranks: int) -> dict[str, Any]:
    """Names, driver, versions, settings."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{gpu.name}, {gpu.multi_processor_count} multiprocessors" for gpu in gpus],
        "ranks_per_gpu": -(-ranks // max(len(gpus), 1)),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "nvcc": _nvcc(),
        "nccl": _nccl(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _driver() -> str:
    return _line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 0)


def _nvcc() -> str:
    try:
        return _line([cuda_compiler(), "--version"], -1)
    except BuildError:
        return "unknown"


def _line(command: list[str], number: int) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[number].strip()
    except (OSError, IndexError):
        return "unknown"


def _nccl() -> str:
    if not dist.is_nccl_available():
        return "none"
    version: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))
