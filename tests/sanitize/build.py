"""Compiles the kernels of csrc/cpu and the rounds of this folder under a sanitizer."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moe_a2a._build import cache_directory, cpu_compiler, source_directory

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -pthread -Wall -Wextra "
    "-D_GLIBCXX_ASSERTIONS"
)


class Sanitizer(NamedTuple):
    """What ``-fsanitize=`` takes, and what goes with it."""

    name: str
    flags: str
    options: dict[str, str]  # environment of the program


class Change(NamedTuple):
    """One place of a source that a test breaks."""

    file: str  # in csrc
    old: str
    new: str


class Unsupported(Exception):
    """This compiler, or this machine, can't do it: the text says why and what helps."""


SANITIZERS = {
    s.name: s
    for s in (
        # -Wno-tsan: g++ says that it doesn't understand fences. Those of meet.h order atomic words
        # only, in which there can be no race; what a meeting publishes besides is ordered by the
        # release and the acquire of its sequence number.
        Sanitizer("thread", "-Wno-tsan", {}),
        Sanitizer(
            "address,undefined",
            "-fno-sanitize-recover=all",
            {
                "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_init_order=1",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        ),
    )
}


def build(sanitizer: Sanitizer, target: Path, *changes: Change) -> int:
    """Links the program at ``target``; returns how many units were compiled, not found compiled."""
    with tempfile.TemporaryDirectory() as scratch:
        source = source_directory()
        if changes:
            source = Path(shutil.copytree(source, Path(scratch) / "csrc"))
        for change in changes:
            apply(change, source / change.file)
        units = [p for p in sorted((source / "cpu").glob("*.cc")) if p.name != "bind.cc"]
        units += sorted(HERE.glob("*.cc"))
        command = _command(sanitizer, source)
        version = run([*shlex.split(cpu_compiler()), "--version"])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda unit: _compile(command, unit, version), units))
        run([*command, *(str(path) for path, _ in objects), "-o", str(target)])
        return sum(fresh for _, fresh in objects)


def apply(change: Change, path: Path) -> None:
    text = path.read_text()
    if text.count(change.old) != 1:
        raise ValueError(
            f"{change.file} has {change.old!r} {text.count(change.old)} times, not once"
        )
    path.write_text(text.replace(change.old, change.new))


def _command(sanitizer: Sanitizer, source: Path) -> list[str]:
    flags = [*FLAGS.split(), f"-fsanitize={sanitizer.name}", *sanitizer.flags.split()]
    # Reports name a file as the repository does, also where it was compiled from a changed copy.
    names = [f"-ffile-prefix-map={root}/=" for root in (source.parent, HERE.parents[1])]
    return [*shlex.split(cpu_compiler()), *flags, *names, f"-I{source}"]


def _compile(command: list[str], unit: Path, version: str) -> tuple[Path, bool]:
    command = [*command, "-include", str(HERE / "visible_stores.h")]
    # A change of one header compiles what includes it, wherever this copy of the sources lies.
    rule = run([*command, "-MM", str(unit)]).replace("\\\n", " ")
    facts = [version, *(part for part in command if not part.startswith(("-I", "-ffile-p")))]
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in map(Path, rule.partition(":")[2].split()):
        digest.update(path.name.encode() + path.read_bytes())
    target = cache_directory() / "sanitize" / f"{digest.hexdigest()[:20]}.o"
    if target.is_file():
        return target, False
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_suffix(f".{os.getpid()}")
    run([*command, "-c", str(unit), "-o", str(made)])
    made.rename(target)
    return target, True


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def probe(sanitizer: Sanitizer) -> None:
    """Whether an empty program can be built and run.

    Raises:
        Unsupported: it can't.
    """
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "empty"
        source = program.with_suffix(".cc")
        source.write_text("int main() {}\n")
        try:
            run([*_command(sanitizer, HERE), str(source), "-o", str(program)])
        except RuntimeError as error:
            raise Unsupported(
                f"{cpu_compiler()} has no -fsanitize={sanitizer.name}. g++ brings it on x86-64 and "
                "aarch64 (Debian: libgcc-12-dev; Fedora: libtsan libasan libubsan), clang with its "
                f"compiler-rt (Debian: libclang-rt-14-dev); CXX chooses between them.\n{error}"
            ) from None
        try:
            run([str(program)])
        except RuntimeError as error:
            raise Unsupported(
                f"programs with -fsanitize={sanitizer.name} don't start here. Where addresses are "
                "randomized by more than 28 bits, g++ 12 and clang 14 can't place their shadow "
                f"memory: sysctl vm.mmap_rnd_bits=28, or setarch -R make sanitize.\n{error}"
            ) from None


def play(
    sanitizer: Sanitizer, program: Path, rounds: int, first_only: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs the program; a report of the sanitizer makes it fail, at once if only the first counts.

    Raises:
        subprocess.TimeoutExpired: ranks wait for each other for ever.
    """
    environment = {**os.environ, **sanitizer.options}
    if first_only:
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
    return subprocess.run(
        [program, str(rounds)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
