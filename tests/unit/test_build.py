"""The build cache: one build for many processes, nothing half-built, errors with the command."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moe_a2a import _build
from moe_a2a.errors import BuildError

# A compiler that only takes notes and time, so that eight processes meet in the middle of a build.
FAKE = """#!/bin/sh
case "$*" in *--version*) echo fake; exit 0;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
sleep 0.05
echo "$out" >> "$NOTES"
echo built > "$out"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text(FAKE)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("MOE_A2A_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_processes_that_race_build_once(fake):
    code = "from moe_a2a._build import build_cpu; print(build_cpu())"
    root = Path(_build.__file__).parents[1]
    racers = [
        subprocess.Popen([sys.executable, "-S", "-c", bare(root) + code], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    found = {racer.communicate(timeout=60)[0] for racer in racers}
    assert len(found) == 1
    library = Path(found.pop().decode().strip())
    assert library.read_text() == "built\n"
    links = [n for n in (fake / "notes").read_text().split() if n.endswith(".so")]
    assert len(links) == 1, links
    left = [path.name for path in library.parents[1].iterdir()]
    assert not [name for name in left if name.startswith(".")], left


def bare(root):
    """Imports _build without torch, which the package's __init__ loads: 4 s of four processes."""
    return (
        f"import sys, types; sys.path[:0] = {[str(root), *sys.path]!r}\n"
        "package = types.ModuleType('moe_a2a')\n"
        f"package.__path__ = [{str(root / 'moe_a2a')!r}]\n"
        "sys.modules['moe_a2a'] = package\n"
    )


def test_a_change_of_source_flags_or_compiler_is_another_build(fake, monkeypatch):
    first = _build.build_cpu()
    assert _build.build_cpu() == first
    monkeypatch.setattr(_build, "_CPU_FLAGS", _build._CPU_FLAGS + " -g")
    second = _build.build_cpu()
    assert second != first
    compiler = fake / "c++"
    compiler.write_text(FAKE.replace("echo fake", "echo newer"))
    assert _build.build_cpu() not in (first, second)


def test_a_compiler_that_fails_shows_command_and_output(fake):
    compiler = fake / "c++"
    compiler.write_text(FAKE.replace("sleep 0.05", "echo it broke here; exit 3"))
    with pytest.raises(BuildError, match=r"(?s)c\+\+ .*-o .*it broke here"):
        _build.build_cpu()
    cache = fake / "cache"
    assert not [path for path in cache.rglob("*") if path.suffix == ".so"]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    compiler.write_text(FAKE)
    assert _build.build_cpu().is_file(), "the next try builds"


def test_a_cache_that_cannot_be_written_says_what_to_set(fake, monkeypatch):
    (fake / "file").write_text("")
    monkeypatch.setenv("MOE_A2A_CACHE", str(fake / "file" / "cache"))
    with pytest.raises(BuildError, match="MOE_A2A_CACHE"):
        _build.build_cpu()


def test_no_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(BuildError, match=r"g\+\+"):
        _build.cpu_compiler()
