"""The compiled functions, loaded on first use."""

from __future__ import annotations

from functools import cache
from typing import Any

from moe_a2a._build import build_cpu, build_cuda

__all__ = ["cpu_library", "cuda_library"]


@cache
def cpu_library() -> Any:
    """Module of the functions that ``csrc/cpu/bind.cc`` exports.

    Raises:
        BuildError: no compiler, or it refused the sources.
    """
    import tvm_ffi

    return tvm_ffi.load_module(str(build_cpu()))


@cache
def cuda_library() -> Any:
    """Module of the functions that ``csrc/cuda/bind.cc`` exports, for the current device.

    Raises:
        BuildError: no nvcc, or it refused the sources.
    """
    import torch
    import tvm_ffi

    major, minor = torch.cuda.get_device_capability()
    # The suffix brings the instructions that are not forward compatible.
    return tvm_ffi.load_module(str(build_cuda(f"{major}{minor}{'a' if major >= 9 else ''}")))
