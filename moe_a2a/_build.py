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
from typing import TYPE_CHECKING, NamedTuple

from moe_a2a.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "build_cpu",
    "build_cuda",
    "cache_directory",
    "cpu_compiler",
    "cuda_compiler",
    "source_directory",
]

# -ffp-contract=off: products and sums round on their own, as they do on a GPU and in the
# definitions of the formats. No other flag touches a value.
_CPU_FLAGS = (
    "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fPIC -fvisibility=hidden -Wall -Wextra"
) + (" -mprefer-vector-width=512" if platform.machine() == "x86_64" else "")

_CUDA_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


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


def cuda_compiler() -> str:
    """nvcc: in ``$CUDA_HOME/bin``, on the PATH, or in /usr/local/cuda/bin.

    Raises:
        BuildError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    for found in (
        shutil.which("nvcc", path=f"{homes[0]}/bin") if homes[0] else None,
        shutil.which("nvcc"),
        shutil.which("nvcc", path=f"{homes[1]}/bin"),
    ):
        if found:
            return found
    raise BuildError(
        "no nvcc: install the CUDA toolkit, or set CUDA_HOME. The CUDA backends need it once; the "
        "CPU backends need none."
    )


class _Library(NamedTuple):
    """What a compiled library is made of."""

    name: str  # of its folder in csrc, and of its cache entry
    compiler: list[str]
    flags: list[str]
    link: list[str]
    patience: str


def build_cpu() -> Path:
    """Path of the CPU library, compiled if the cache has none.

    Raises:
        BuildError: with the command and the compiler's output.
    """
    compiler = shlex.split(cpu_compiler())
    return _build(_Library("cpu", compiler, _CPU_FLAGS.split(), ["-shared"], "10 s"))


def build_cuda(architecture: str) -> Path:
    """Path of the CUDA library for one architecture (``"90a"``), compiled if the cache has none.

    ``$MOE_A2A_ARCH`` beats ``architecture``.

    Raises:
        BuildError: no nvcc, or it refused the sources: with the command and its output.
    """
    architecture = os.environ.get("MOE_A2A_ARCH", "").strip() or architecture
    flags = [*_CUDA_FLAGS.split(), *_generate(architecture)]
    link = ["-shared", *_generate(architecture)]
    return _build(_Library("cuda", [cuda_compiler()], flags, link, "30 s"))


def _generate(architecture: str) -> list[str]:
    name = architecture.removeprefix("sm_")
    return [f"-gencode=arch=compute_{name},code=sm_{name}"]


def _build(library: _Library) -> Path:
    source = source_directory()
    key = _key(source, library)
    target = cache_directory() / f"{library.name}-{key}" / f"moe_a2a_{library.name}.so"
    if target.is_file():
        return target
    with _lock(target.parent):
        if not target.is_file():
            print(
                f"moe_a2a: compiling the {library.name.upper()} kernels (once, some "
                f"{library.patience})",
                file=sys.stderr,
                flush=True,
            )
            with _publish(target.parent) as scratch:
                _compile(library, source / library.name, scratch / target.name)
    return target


def _compile(library: _Library, source: Path, target: Path) -> None:
    import tvm_ffi.libinfo as tvm

    includes = [flag for path in tvm.include_paths() for flag in ("-isystem", str(path))]

    def compile_one(path: Path) -> str:
        out = str(target.parent / f"{path.name}.o")
        _run([*library.compiler, *library.flags, *includes, "-c", str(path), "-o", out])
        return out

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, _translation_units(source)))
    ffi = Path(tvm.find_libtvm_ffi())
    # nvcc takes no -Wl; both take the linker's option this way.
    rpath = ["-Xlinker", "-rpath", "-Xlinker", str(ffi.parent)]
    link = [*library.link, *objects, f"-L{ffi.parent}", "-ltvm_ffi", *rpath]
    _run([*library.compiler, *link, "-o", str(target)])


def _translation_units(folder: Path) -> list[Path]:
    """The slowest to compile first: they are CUDA."""
    return sorted(folder.glob("*.cu")) + sorted(folder.glob("*.cc"))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}\n{error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _key(source: Path, library: _Library) -> str:
    import tvm_ffi

    digest = hashlib.sha256()
    for path in sorted([*source.glob("*.h"), *(source / library.name).iterdir()]):
        digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes() + b"\0")
    facts = [*library.compiler, *library.flags, *library.link, tvm_ffi.__version__]
    facts += [_run([*library.compiler, "--version"]), _processor()]
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
    architectures = [flag for name in ("90a", "100a") for flag in _generate(name)]
    commands = []
    for path in sorted((source_directory() / "cuda").glob("*.cu")):
        command = [cuda_compiler(), *_CUDA_FLAGS.split(), *architectures]
        command += ["-c", str(path), "-o", os.devnull]
        commands.append(shlex.join(command))
        _run(command)
    return commands


if __name__ == "__main__":
    for line in compile_cuda():
        print(line)
