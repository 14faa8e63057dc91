"""Compiles the kernels on first use and caches what came out.

The cache key covers everything the result depends on: sources, flags, compiler version, tvm-ffi
version and, since the code is compiled for this processor, the processor. A library is built in a
temporary directory and published by an atomic rename, so a reader sees a whole one or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_a2a.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["build_cpu", "cache_directory", "cpu_compiler", "source_directory"]

_CPU_SOURCES = ("bind.cc", "combine.cc", "dispatch.cc", "quantize.cc", "wait.cc")
# -ffp-contract=off: products and sums round on their own, as they do on a GPU and in the
# definitions of the formats. No other flag touches a value.
_CPU_FLAGS = (
    "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fPIC -fvisibility=hidden -Wall -Wextra"
) + (" -mprefer-vector-width=512" if platform.machine() == "x86_64" else "")


def source_directory() -> Path:
    """``csrc``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "layout.h").is_file():
            return candidate
    raise BuildError(f"csrc is neither in {package} nor beside it: the installation is incomplete")


def cache_directory() -> Path:
    """``$MOE_A2A_CACHE``, else ``~/.cache/moe_a2a`` (in the temporary directory without a home)."""
    if "MOE_A2A_CACHE" in os.environ:
        return Path(os.environ["MOE_A2A_CACHE"])
    try:
        return Path.home() / ".cache" / "moe_a2a"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"moe_a2a-{os.getuid()}"


def cpu_compiler() -> str:
    """``$CXX``, else the first of g++, c++, clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    try:
        if wanted and not shutil.which(shlex.split(wanted)[0]):
            raise BuildError(f"CXX={wanted!r}: there is no such compiler")
    except ValueError as error:  # an open quote
        raise BuildError(f"CXX={wanted!r}: {error}") from None
    for name in (wanted, "g++", "c++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(
        "no C++ compiler: install g++ (or clang++), or set CXX. The shm backend and the workspace "
        "layout need it once; the result is cached."
    )


def build_cpu() -> Path:
    """Path of the CPU library, compiled if the cache has none.

    Raises:
        BuildError: with the command and the compiler's output.
    """
    import tvm_ffi.libinfo as tvm

    source = source_directory()
    compiler = shlex.split(cpu_compiler())
    includes = [flag for path in tvm.include_paths() for flag in ("-isystem", str(path))]
    library = Path(tvm.find_libtvm_ffi())
    key = _key(source, [*compiler, _CPU_FLAGS], compiler)
    target = cache_directory() / f"cpu-{key}" / "moe_a2a_cpu.so"
    if target.is_file():
        return target
    with _lock(target.parent):
        if not target.is_file():
            print(
                "moe_a2a: compiling the CPU kernels (once, some 10 s)", file=sys.stderr, flush=True
            )
            with _publish(target.parent) as scratch:
                _compile(compiler, includes, library, source / "cpu", scratch / target.name)
    return target


def _compile(
    compiler: list[str], includes: list[str], library: Path, source: Path, target: Path
) -> None:
    def compile_one(name: str) -> str:
        out = str(target.parent / f"{name}.o")
        _run([*compiler, *_CPU_FLAGS.split(), *includes, "-c", str(source / name), "-o", out])
        return out

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, _CPU_SOURCES))
    link = ["-shared", *objects, f"-L{library.parent}", "-ltvm_ffi", f"-Wl,-rpath,{library.parent}"]
    _run([*compiler, *link, "-o", str(target)])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}\n{error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _key(source: Path, flags: list[str], compiler: list[str]) -> str:
    import tvm_ffi

    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.suffix in {".h", ".cc"}:
            digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes() + b"\0")
    facts = [*flags, _run([*compiler, "--version"]), tvm_ffi.__version__, _processor()]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    wanted = ("flags", "Features", "cpu family", "model\t", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One process builds, the others wait; the kernel frees the lock of one that dies."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        handle = Path(f"{directory}.lock").open("w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise BuildError(
            f"cannot write to the build cache {directory.parent}: {error}. "
            "Set MOE_A2A_CACHE to a directory that can be written."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _publish(directory: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield scratch
        try:
            scratch.rename(directory)
        except OSError:  # a process that could not share the lock was first
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compile_cuda() -> list[str]:
    """Compiles every CUDA source for sm_90a and sm_100a, discarding the result; the commands run.

    Raises:
        BuildError: nvcc refused one, or there is no nvcc.
    """
    sources = sorted(source_directory().rglob("*.cu"))
    if sources and shutil.which("nvcc") is None:
        raise BuildError("no nvcc: the CUDA sources can't be compiled. The CPU backends need none.")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("90a", "100a")]
    commands = []
    for path in sources:
        command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", *architectures]
        command += ["-c", str(path), "-o", os.devnull]
        commands.append(shlex.join(command))
        _run(command)
    return commands


if __name__ == "__main__":
    for line in compile_cuda() or ["moe_a2a: there are no CUDA sources yet: nothing to compile"]:
        print(line)
