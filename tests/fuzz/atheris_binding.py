"""Coverage-guided runs over the binding of the CPU library, under AddressSanitizer.

    make fuzz-binding MINUTES=5
    make fuzz-binding ARGS=.fuzz/crash-...       # once more what a run has found

Compiles csrc/cpu with g++, AddressSanitizer and calls at every branch (`coverage.cc` takes them to
libFuzzer, inside atheris), then runs itself again with the sanitizer's library in front of all
others. What bytes do is in `binding.py`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from moe_a2a._build import source_directory

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".fuzz"
LIBRARY = WORK / "moe_a2a_cpu_asan.so"
FLAGS = "-std=c++17 -O1 -g -fno-omit-frame-pointer -fPIC -fvisibility=hidden -ffp-contract=off"
WATCHED = "-fsanitize=address -fsanitize-coverage=trace-pc,trace-cmp"
# libFuzzer's, in the order in which coverage.cc takes them.
FUNCTIONS = ["8bit_counters_init", "pcs_init"]
FUNCTIONS += [f"trace_{kind}{n}" for kind in ("cmp", "const_cmp") for n in (1, 2, 4, 8)]


def compiled() -> Path:
    """The library, compiled anew unless it is younger than its sources."""
    import tvm_ffi.libinfo as tvm

    sources = sorted((source_directory() / "cpu").glob("*.cc"))
    every = [*sources, *source_directory().glob("*.h"), *source_directory().glob("cpu/*.h")]
    youngest = max(path.stat().st_mtime for path in [*every, HERE / "coverage.cc"])
    if LIBRARY.is_file() and LIBRARY.stat().st_mtime > youngest:
        return LIBRARY
    WORK.mkdir(exist_ok=True)
    print(f"compiling {LIBRARY.name} (half a minute)", flush=True)
    includes = [part for path in tvm.include_paths() for part in ("-isystem", str(path))]
    objects = []
    for source in [*sources, HERE / "coverage.cc"]:
        watched = [] if source.name == "coverage.cc" else WATCHED.split()
        objects.append(str(WORK / f"{source.name}.o"))
        # -O2 there: it hands comparisons on by tail calls.
        command = ["g++", *FLAGS.split(), *(watched or ["-O2"]), *includes, "-c", str(source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    ffi = Path(tvm.find_libtvm_ffi())
    link = [
        "-shared",
        "-fsanitize=address",
        f"-L{ffi.parent}",
        "-ltvm_ffi",
        f"-Wl,-rpath,{ffi.parent}",
    ]
    subprocess.run(["g++", *objects, *link, "-o", str(LIBRARY)], check=True)
    return LIBRARY


def under_the_sanitizer(arguments: list[str]) -> int:
    # libstdc++ too: the sanitizer looks for what throws exceptions when it starts.
    preloaded = " ".join(
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    options = "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"
    environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": options}
    command = [sys.executable, "-m", "tests.fuzz.atheris_binding", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def connect(library: Path) -> None:
    """Shows libFuzzer the counters of the library."""
    from atheris import core_with_libfuzzer

    fuzzer = ctypes.CDLL(core_with_libfuzzer.__file__)
    found = [getattr(fuzzer, f"__sanitizer_cov_{name}") for name in FUNCTIONS]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in found]
    array = (ctypes.c_void_p * len(addresses))(*addresses)
    ctypes.CDLL(str(library)).moe_a2a_connect(array)


def fuzz(arguments: list[str]) -> None:
    import atheris
    import tvm_ffi

    import moe_a2a._ops as ops
    from tests.fuzz import binding

    library: Any = tvm_ffi.load_module(str(LIBRARY))
    ops.cpu_library = lambda: library
    connect(LIBRARY)
    tally: Counter[str] = Counter()

    def one(data: bytes) -> None:
        tally.update(binding.play(library, data))
        tally["sessions"] += 1
        if tally["sessions"] % 20_000 == 0:
            print(f"so far: {dict(tally)}", flush=True)

    atheris.Setup([sys.argv[0], *arguments], one, enable_python_coverage=False)
    atheris.Fuzz()


def main() -> int:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        fuzz(sys.argv[1:])
        return 0
    compiled()
    corpus = WORK / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:]
    if not any(not item.startswith("-") for item in given):
        given = [str(corpus), f"-artifact_prefix={WORK}/", "-max_len=400", "-timeout=20", *given]
    return under_the_sanitizer(["-rss_limit_mb=4096", *given])


if __name__ == "__main__":
    sys.exit(main())
