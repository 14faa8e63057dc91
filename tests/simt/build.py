"""Compiles the kernels of csrc/cuda for the CPU."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_a2a._build import cache_directory, cpu_compiler, source_directory

HERE = Path(__file__).resolve().parent
FLAGS = "-std=c++17 -O1 -ffp-contract=off -fPIC -fvisibility=hidden -DMOE_SIMT -Wall"
UNITS = ("combine.cu", "combine_grouped.cu", "debug.cu", "dispatch_bulk.cu",
         "dispatch_packets.cu", "dispatch_quantized.cu", "dispatch_small.cu", "group.cu",
         "bind.cc", "debug.cc", "endpoint.cc", "group.cc", "restart.cc")  # fmt: skip


def supported() -> bool:
    """Fibers are switched in x86-64 assembly."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def build() -> Path:
    """Path of the library, compiled if the cache has none: some 20 s."""
    import tvm_ffi.libinfo as tvm

    source = source_directory()
    ffi = Path(tvm.find_libtvm_ffi())
    includes = [flag for path in tvm.include_paths() for flag in ("-isystem", str(path))]
    flags = [*FLAGS.split(), f"-I{HERE}", f"-I{source}", *includes]
    compiler = shlex.split(cpu_compiler())  # CXX may have sanitizers in it: CONTRIBUTING.md
    digest = hashlib.sha256(f"{compiler} {FLAGS} {ffi}".encode())
    for path in sorted([*source.glob("*.h"), *(source / "cuda").iterdir(), *HERE.iterdir()]):
        if path.is_file():
            digest.update(path.read_bytes())
    target = cache_directory() / f"simt-{digest.hexdigest()[:20]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def compile_one(path: Path) -> str:
            out = f"{scratch}/{path.name}.o"
            kernels = ["-include", str(HERE / "simt.h")] if path.suffix == ".cu" else []
            run(*compiler, *flags, *kernels, "-x", "c++", "-c", str(path), "-o", out)
            return out

        paths = [*(source / "cuda" / name for name in UNITS), HERE / "simt.cc"]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, paths))
        rpath = f"-Wl,-rpath,{ffi.parent}"
        made = f"{scratch}/simt.so"
        run(*compiler, "-shared", *objects, f"-L{ffi.parent}", "-ltvm_ffi", rpath, "-o", made)
        Path(made).rename(target)
    return target


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
