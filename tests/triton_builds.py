"""Triton kernels compiled to machine code for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Built(NamedTuple):
    ptx: str
    ttgir: str
    shared: int  # bytes
    registers: int
    stack: int  # bytes, of spilled registers among others
    target: str


def built(kernel, types, constants, *, arch, warps, stages=3):
    """`types` by argument (16 divides pointers and strides); `constants` are all others."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert set(signature) == set(types) | set(constants), "arguments"
    whole = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or name.endswith("stride")
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, dict(constants), whole)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx).group(1)
    return Built(ptx, made.asm["ttgir"], made.metadata.shared, *usage, target)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        ran = subprocess.run(command, capture_output=True)
    found = re.search(rb"REG:(\d+) STACK:(\d+)", ran.stdout)
    assert found, ran
    return tuple(int(number) for number in found.groups())


def loop_of(ptx):
    """The body of the innermost loop: from the label that the last backward branch goes to."""
    found = re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE)
    labels = {m.group(1): m.start() for m in found}
    back = [m for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx)
            if labels[m.group(1)] < m.start()]  # fmt: skip
    return ptx[labels[back[0].group(1)] : back[0].start()]
