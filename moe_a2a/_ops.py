"""The compiled functions, loaded on first use."""

from __future__ import annotations

from functools import cache
from typing import Any

from moe_a2a._build import build_cpu

__all__ = ["cpu_library"]


@cache
def cpu_library() -> Any:
    """Module of the functions that ``csrc/cpu/bind.cc`` exports.

    Raises:
        BuildError: no compiler, or it refused the sources.
    """
    import tvm_ffi

    return tvm_ffi.load_module(str(build_cpu()))
